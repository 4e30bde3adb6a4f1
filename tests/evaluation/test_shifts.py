"""The change under shifts, against cases whose answer is known."""

import math

import pytest
import torch

from mixpool.evaluation.shifts import change_curve, relative_change, shifted_crop


def test_crop_moves_the_content_left_and_up():
    images = torch.arange(8.0).repeat(8, 1)[None, None] + 10 * torch.arange(8.0)[:, None]
    assert shifted_crop(images, 4, 0)[0, 0, 0, 0] == 22
    assert shifted_crop(images, 4, 1, "horizontal")[0, 0, 0, 0] == 23
    assert shifted_crop(images, 4, 2, "vertical")[0, 0, 0, 0] == 42
    assert shifted_crop(images, 4, -2, "diagonal")[0, 0, 0, 0] == 0
    assert shifted_crop(images, 4, 1).shape == (1, 1, 4, 4)


@pytest.mark.parametrize("shift, direction", [(3, "horizontal"), (-3, "vertical"), (3, "diagonal")])
def test_too_small_a_margin_is_an_error(shift, direction):
    with pytest.raises(ValueError, match="margin of 3"):
        shifted_crop(torch.zeros(1, 3, 8, 8), 4, shift, direction)


def test_unknown_direction():
    with pytest.raises(ValueError, match="sideways"):
        shifted_crop(torch.zeros(1, 3, 8, 8), 4, 1, "sideways")


def test_change_worked_by_hand():
    before = torch.tensor([[0.0, 2.0], [2.0, 0.0]])[None, None]  # mean 1, standard deviation 1
    after = before + 0.5
    assert relative_change(before, after, border=0).item() == pytest.approx(0.5)


def test_border_is_left_out():
    before = torch.randn(2, 3, 8, 8)
    after = before.clone()
    after[..., :2, :] += 5
    after[..., -2:] -= 5
    assert relative_change(before, after, border=2).abs().max() == 0
    assert relative_change(before, after, border=1).min() > 0
    with pytest.raises(ValueError, match="border of 4"):
        relative_change(before, after, border=4)


def test_channels_are_apart_and_constant_ones_are_nan():
    before = torch.randn(2, 3, 16, 16)
    before[:, 2] = 7
    after = before.clone()
    after[:, 1] += 1
    change = relative_change(before, after)
    assert change[0] == 0 and change[1] > 0.5 and change[2].isnan()


def test_a_stem_that_does_not_move_and_noise():
    images = torch.rand(2, 3, 80, 80, generator=torch.Generator().manual_seed(0))
    blind = change_curve(lambda x: x * 0 + torch.linspace(0, 1, x.shape[-1]), images, 64, [1, 4])
    assert blind.shape == (2, 3) and blind.max() == 0
    # White noise that moved is unrelated to what it was: sqrt(2).
    noise = change_curve(lambda x: x, images, 64, [0, 1, 5], "diagonal")
    assert noise[0].max() == 0
    torch.testing.assert_close(noise[1:], torch.full((2, 3), math.sqrt(2)), atol=0.05, rtol=0)


def test_a_sine_changes_as_the_formula_says():
    """sin(w n) against sin(w (n + k)): rms of the difference over the deviation is 2 |sin(w k / 2)|."""
    w = 2 * math.pi / 16
    images = torch.sin(w * torch.arange(80.0)).expand(1, 1, 80, 80)
    curve = change_curve(lambda x: x, images, 64, [1, 3, 8], border=0)[:, 0]
    expected = torch.tensor([2 * abs(math.sin(w * k / 2)) for k in (1, 3, 8)])
    torch.testing.assert_close(curve, expected, atol=1e-4, rtol=0)
    assert change_curve(lambda x: x, images, 64, [3], "vertical", border=0).item() == 0
