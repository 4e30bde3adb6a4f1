"""The Gabor bank: what its docstring says of norms, means, frequencies, and what the automatic plan makes of it."""

import math

import pytest
import torch

from mixpool.filters.gabor import _wave, gabor_bank
from mixpool.selection.rules import select_by_filter
from mixpool.selection.stats import analyze


@pytest.mark.parametrize("out_channels, in_channels, kernel_size", [(64, 3, 7), (96, 3, 7), (33, 1, 11), (16, 4, 6)])
def test_shape_norm_and_determinism(out_channels, in_channels, kernel_size):
    bank = gabor_bank(out_channels, in_channels, kernel_size)
    assert bank.shape == (out_channels, in_channels, kernel_size, kernel_size) and bank.dtype == torch.float32
    torch.testing.assert_close(bank.flatten(1).norm(dim=1), torch.ones(out_channels))
    torch.manual_seed(1)
    assert torch.equal(bank, gabor_bank(out_channels, in_channels, kernel_size))


def test_waves_have_zero_mean_and_blobs_do_not():
    bank = gabor_bank(64)
    sums = bank.sum(dim=(2, 3)).abs().amax(dim=1)  # per input channel: opponents' blobs cancel only over the colours
    assert sums[:60].max() < 1e-5
    assert sums[60:].min() > 1


def test_no_filter_is_there_twice():
    bank = gabor_bank(64).flatten(1)
    similarity = (bank @ bank.T).abs() - torch.eye(64)
    assert similarity.max() < 0.98


def test_most_are_gray_and_some_are_opponent():
    bank = gabor_bank(64)
    is_gray = ((bank - bank.mean(dim=1, keepdim=True)).abs().amax(dim=(1, 2, 3)) < 1e-6).sum()
    is_opponent = (bank.sum(dim=1).abs().amax(dim=(1, 2)) < 1e-5).sum()
    assert is_gray == 49 and is_opponent == 15


@pytest.mark.parametrize("frequency", [0.8, 1.4, 2.0])
@pytest.mark.parametrize("angle", [0.0, 0.7, 2.5])
def test_a_wave_lies_at_its_frequency_and_orientation(frequency, angle):
    stats = analyze(_wave(frequency, angle, 0.5, kernel_size=15)[None, None])
    assert stats.frequency.item() == pytest.approx(frequency, rel=0.06)
    turn = (stats.orientation.item() - angle + math.pi / 2) % math.pi - math.pi / 2
    assert abs(turn) < 0.05


def test_the_automatic_plan_takes_about_half_of_a_resnet_stem():
    mask, _ = select_by_filter(analyze(gabor_bank(64), stride=2))
    assert 24 <= int(mask.sum()) <= 44
    assert not mask[60:].any()  # no blob


@pytest.mark.parametrize(
    "options, message",
    [
        ({"out_channels": 0}, "out_channels=0"),
        ({"out_channels": 8, "kernel_size": 2}, "kernel_size=2"),
        ({"out_channels": 8, "frequencies": ()}, "frequencies"),
        ({"out_channels": 8, "frequencies": (1.0, 3.2)}, "3.2"),
        ({"out_channels": 8, "color_share": 0.8, "blob_share": 0.3}, "blob_share=0.3"),
    ],
)
def test_errors_name_the_number(options, message):
    with pytest.raises(ValueError, match=message):
        gabor_bank(**options)
