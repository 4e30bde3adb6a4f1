"""The map of the closed forms, and the bound of RMax's change, on waves and on signals that meet the assumptions."""

from __future__ import annotations

import doctest
import math

import pytest
import torch
from support import assert_close
from waves import PI, SPECIAL, filtered, frequencies, norms, shifts

from benchmarks.theory import closed_forms
from benchmarks.theory.closed_forms import frequency_map, max_shift_bound
from mixpool.filters.theory import expected_gap, expected_max, expected_max_square, max_shift_change


def test_examples_run():
    result = doctest.testmod(closed_forms)
    assert result.attempted > 0 and result.failed == 0


# --- the map ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride, window", [(2, 3), ((4, 1), (2, 3))], ids=str)
def test_map_is_the_functions_point_by_point(stride, window):
    maps = frequency_map(stride, window, size=33)
    assert maps.frequency[16] == 0 and maps.frequency[0] == -PI and maps.frequency[-1] == PI
    assert maps.expected_gap.shape == maps.expected_max.shape == (33, 33)
    for i, j in [(0, 0), (16, 16), (3, 20), (32, 7), (16, 32)]:
        frequency = torch.stack([maps.frequency[i], maps.frequency[j]])
        assert_close("gap", maps.expected_gap[i, j], expected_gap(frequency, stride, window))
        assert_close("max", maps.expected_max[i, j], expected_max(frequency, stride, window))
    assert_close("through 0", maps.expected_gap, maps.expected_gap.flip(0, 1), (1e-7, 0.0))
    assert_close("the ends meet", maps.expected_gap[0], maps.expected_gap[-1], (1e-7, 0.0))


def test_a_large_map():
    maps = frequency_map(2, window=5, size=257)
    assert torch.isfinite(maps.expected_gap).all() and maps.expected_gap.max() < 1.23


def test_wrong_sizes():
    for size in (1, 128):
        with pytest.raises(ValueError, match=f"odd size of at least 3, got {size=}"):
            frequency_map(2, size=size)


# --- the bound --------------------------------------------------------------------------------------------------------


def test_the_bound_by_hand():
    assert max_shift_bound((0.0, 0.0), 0.5, (1.0, 1.0), 2).item() == pytest.approx(2 * math.sqrt(1.5) + 0.5)
    assert max_shift_bound(torch.rand(3, 1, 2), torch.rand(5, 1), torch.rand(5, 2), 2).shape == (3, 5)
    with pytest.raises(ValueError, match="at least 0, got -0.5"):
        max_shift_bound((0.0, 1.0), -0.5, (0, 1), 2)


def test_a_wave_stays_below_the_bound():
    frequency, shift = frequencies(2000), shifts(2000 + len(SPECIAL))
    for window in (1, 2, 3, 5):
        change = max_shift_change(frequency, shift, 2, window) * expected_max_square(frequency, 2, window).sqrt()
        assert (change <= max_shift_bound(frequency, 0.0, shift, 2, window) + 1e-12).all(), "both relative to CMod"


@pytest.mark.parametrize("center", [(0, 40), (80, 60), (128, 128), (48, -100), (170, 86)], ids=str)
def test_a_narrow_band_stays_below_the_bound(center):
    size, stride = 512, 2
    images = torch.randn(40, size, size, dtype=torch.float64)
    frequency = tuple(c * 2 * PI / size for c in center)
    bandwidth = 2 * 2 * PI / size
    z = filtered(images, center, 1, (0, 0), stride)
    maximum, modulus = torch.nn.functional.max_pool2d(z.real, 3, 2), z.abs()[..., 1:-1:2, 1:-1:2]
    for shift in ((0, 1), (1, -1), (0.5, 0.25)):
        moved = torch.nn.functional.max_pool2d(filtered(images, center, 1, shift, stride).real, 3, 2)
        ratio = norms(moved - maximum) / norms(modulus)
        bound = max_shift_bound(frequency, bandwidth, shift, stride).item()
        assert ratio.mean() <= ratio.square().mean().sqrt() <= bound


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_bound_on_the_gpu():
    assert max_shift_bound(torch.rand(5, 2).cuda(), 0.5, (0, 1), 2).is_cuda
