"""How RMax changes, its bound and the map, against loops over the phase and on signals that meet the assumptions."""

from __future__ import annotations

import doctest
import math

import pytest
import torch
from support import assert_close
from waves import PI, SPECIAL, filtered, frequencies, norms, shifts, simulate

from benchmarks.theory import closed_forms
from benchmarks.theory.closed_forms import expected_max_square, frequency_map, max_shift_bound, max_shift_change
from mixpool.filters.theory import expected_gap, expected_max


def test_examples_run():
    result = doctest.testmod(closed_forms)
    assert result.attempted > 0 and result.failed == 0


# --- how RMax changes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 2, 3, 4, 5, (1, 3), (3, 2)], ids=str)
@pytest.mark.parametrize("stride", [1, 2, 4, (2, 1)], ids=str)
def test_quadrature_over_the_phase(stride, window):
    frequency = frequencies(4)
    shift = shifts(len(frequency))
    phase = (torch.arange(8000, dtype=torch.float64) + 0.5) / 8000 * 2 * PI
    each = [simulate(phase, f, u, stride, window) for f, u in zip(frequency, shift)]
    found = {
        "expected_max_square": expected_max_square(frequency, stride, window),
        "max_shift_change": max_shift_change(frequency, shift, stride, window),
    }
    for name, values in found.items():
        # The rule's own error at a kink is of the order of the squared step, 6e-7.
        assert_close(name, values, torch.stack([one[name] for one in each]), (1e-6, 0.0))


@pytest.mark.parametrize(
    "omega, window, gaps",
    [
        ((0, 0), 3, [2 * PI]),
        ((PI, PI), 5, [PI, PI]),
        ((0, PI / 2), 3, [PI / 2, PI / 2, PI]),
        ((0.3, 0), 2, [0.3, 2 * PI - 0.3]),
        ((2 * PI / 9, 2 * PI / 3), 3, [2 * PI / 9] * 9),
    ],
    ids=str,
)
def test_squares_known_by_hand(omega, window, gaps):
    square = 0.5 + sum(math.sin(d) for d in gaps) / (4 * PI)
    assert expected_max_square(omega, 1, window).item() == pytest.approx(square, abs=1e-12)


def test_changes_known_by_hand():
    # One phase alone is a cosine: it changes by 2 |sin(advance / 2)| of itself.
    for shift in (0.0, 0.5, 1.0, -3.0):
        change = max_shift_change((0.0, 1.1), (7.0, shift), 2, window=1)
        assert change.item() == pytest.approx(2 * abs(math.sin(1.1 * shift / 2)), abs=1e-12)
    # Two phases pi apart are |cos|: after a quarter turn |sin|, and E[(|cos| - |sin|)^2] = 1 - 2 / pi.
    assert max_shift_change((PI, 0.0), (0.5, 0.0), 1).item() == pytest.approx(math.sqrt(2 - 4 / PI))
    assert max_shift_change((PI, 0.0), (1.0, 0.0), 1).item() == pytest.approx(0, abs=1e-7)
    golden = (math.sqrt(5) - 1) * PI  # whose multiples never coincide
    assert max_shift_change((0.0, golden), (0.0, 0.3), 1, (1, 1024)) < 1e-4, "many phases make a modulus"


def test_symmetry_range_and_roundings():
    frequency, shift = frequencies(500), shifts(500 + len(SPECIAL))
    for window in (1, 2, 3, 5):
        change, square = max_shift_change(frequency, shift, 2, window), expected_max_square(frequency, 2, window)
        assert change.min() >= 0 and change.max() < 2 + 1e-12
        assert square.min() > 0.5 - 1e-12 and square.max() < 1
        assert_close("back", max_shift_change(frequency, -shift, 2, window), change, (1e-7, 0.0))
        for size in (1e-15, -1e-15, 1e-9):
            moved = max_shift_change(SPECIAL + size, shift[: len(SPECIAL)], 1, window)
            assert_close("rounding", moved, max_shift_change(SPECIAL, shift[: len(SPECIAL)], 1, window), (1e-6, 0.0))


def test_shapes_gradients_and_errors():
    frequency, shift = torch.rand(3, 1, 2), torch.rand(5, 2)
    change = max_shift_change(frequency, shift, 2)
    assert change.shape == (3, 5) and change.dtype == torch.float64
    assert_close("one", change[1, 4], max_shift_change(frequency[1, 0], shift[4], 2))
    assert max_shift_change(torch.rand(0, 2), (0, 1), 2).shape == (0,)
    assert max_shift_change((math.nan, 0.0), (0.0, 1.0), 2).isnan()
    frequency = torch.tensor([[0.4, 1.1], [-0.9, 0.2]], dtype=torch.float64, requires_grad=True)
    shift = torch.tensor([0.3, 1.2], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda f: expected_max_square(f, 2), (frequency,))
    assert torch.autograd.gradcheck(lambda f, u: max_shift_change(f, u, 2), (frequency, shift))
    with pytest.raises(ValueError, match="shift of shape"):
        max_shift_change((0.0, 1.0), 1.0, 2)
    with pytest.raises(ValueError, match="expected stride a positive integer or a pair"):
        expected_max_square((0.0, 1.0), 0)


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
        # A wave has no bandwidth: the value stays below the bound, both relative to CMod, and below the sharper one.
        assert (change <= max_shift_bound(frequency, 0.0, shift, 2, window) + 1e-12).all()
        assert (change <= math.sqrt(2) * expected_gap(frequency, 2, window) + 1e-12).all()


@pytest.mark.parametrize("center", [(0, 40), (80, 60), (128, 128), (48, -100), (170, 86)], ids=str)
def test_a_narrow_band(center):
    """The measured change is the predicted one, but for the envelope (see test_theory.py), and below the bound."""
    size, stride = 512, 2
    images = torch.randn(40, size, size, dtype=torch.float64)
    frequency = tuple(c * 2 * PI / size for c in center)
    bandwidth = 2 * 2 * PI / size
    z = filtered(images, center, 1, (0, 0), stride)
    maximum, modulus = torch.nn.functional.max_pool2d(z.real, 3, 2), z.abs()[..., 1:-1:2, 1:-1:2]
    for shift in ((0, 1), (1, -1), (0.5, 0.25)):
        moved = torch.nn.functional.max_pool2d(filtered(images, center, 1, shift, stride).real, 3, 2)
        change = ((moved - maximum).square().sum() / maximum.square().sum()).sqrt()
        assert change.item() == pytest.approx(max_shift_change(frequency, shift, stride).item(), abs=0.05)
        ratio = norms(moved - maximum) / norms(modulus)
        bound = max_shift_bound(frequency, bandwidth, shift, stride).item()
        assert ratio.mean() <= ratio.square().mean().sqrt() <= bound


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_the_gpu():
    frequency, shift = frequencies(20), shifts(27)
    change = max_shift_change(frequency.cuda(), shift.cuda(), 2)
    assert change.is_cuda
    assert_close("change", change, max_shift_change(frequency, shift, 2), (1e-7, 0.0))
    assert max_shift_bound(torch.rand(5, 2).cuda(), 0.5, (0, 1), 2).is_cuda
