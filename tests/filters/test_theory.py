"""The closed forms against loops over the phase, values worked by hand, and signals that meet the assumptions.

Legend: B frequencies, S samples of the phase, N images, (G, G) the image and its frequency grid.
"""

from __future__ import annotations

import doctest
import math

import pytest
import torch
from support import assert_close
from torch import Tensor
from waves import SPECIAL, filtered, frequencies, norms, simulate

from mixpool.filters import theory
from mixpool.filters.theory import (
    expected_gap,
    expected_max,
    modulus_shift_bound,
)

PI = math.pi
STRIDES = [1, 2, 4, (2, 1)]
WINDOWS = [1, 2, 3, 4, 5, (1, 3), (3, 2)]


def closed_forms(frequency: Tensor, stride, window) -> dict[str, Tensor]:
    return {
        "expected_max": expected_max(frequency, stride, window),
        "expected_gap": expected_gap(frequency, stride, window),
    }


# --- the definition ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("stride", STRIDES, ids=str)
def test_quadrature_over_the_phase(stride, window):
    frequency = frequencies(4)
    phase = (torch.arange(8000, dtype=torch.float64) + 0.5) / 8000 * 2 * PI
    closed = closed_forms(frequency, stride, window)
    each = [simulate(phase, f, torch.zeros(2), stride, window) for f in frequency]
    for name, values in closed.items():
        # The rule's own error at a kink is of the order of the squared step, 6e-7.
        assert_close(name, values, torch.stack([one[name] for one in each]), (1e-6, 0.0))


@pytest.mark.parametrize("stride, window", [(2, 3), ((4, 1), (2, 3))], ids=str)
def test_random_phases(stride, window):
    """Plain Monte-Carlo: 4 million phases, 1e-3 is at least three of its standard deviations."""
    frequency = frequencies(1)[0]
    phase = torch.rand(2**22, dtype=torch.float64) * 2 * PI
    simulated = simulate(phase, frequency, torch.zeros(2), stride, window)
    for name, value in closed_forms(frequency, stride, window).items():
        assert_close(name, value, simulated[name], (1e-3, 0.0))


def test_the_equation_of_the_paper():
    """gamma^2 as arXiv 2209.11740 writes it, with the gaps of a 3 x 3 window found in another way."""
    for frequency in frequencies(10).tolist():
        angles = [2 * (frequency[0] * y + frequency[1] * x) for y in (-1, 0, 1) for x in (-1, 0, 1)]
        angles = sorted(math.atan2(math.sin(a), math.cos(a)) for a in angles)
        gaps = [b - a for a, b in zip(angles, angles[1:] + [angles[0] + 2 * PI])]
        square = 1.5 + sum(math.sin(d) - 8 * math.sin(d / 2) for d in gaps) / (4 * PI)
        assert expected_gap(frequency, 2).item() == pytest.approx(math.sqrt(square), abs=1e-7)


# --- by hand ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "omega, window, gaps",
    [
        ((0, 0), 3, [2 * PI]),
        ((1.3, -0.4), 1, [2 * PI]),  # no pooling
        ((2 * PI, -4 * PI), 3, [2 * PI]),  # aliased to 0
        ((PI, 0), 3, [PI, PI]),
        ((PI, PI), 5, [PI, PI]),
        ((PI, 0), (1, 3), [2 * PI]),  # the window does not extend along the wave
        ((PI / 2, PI), 2, [PI / 2] * 4),
        ((0, PI / 2), 3, [PI / 2, PI / 2, PI]),
        ((0, 2 * PI / 3), 3, [2 * PI / 3] * 3),
        ((0.3, 0), 2, [0.3, 2 * PI - 0.3]),
        ((2 * PI / 9, 2 * PI / 3), 3, [2 * PI / 9] * 9),
    ],
    ids=str,
)
def test_gaps_known_by_hand(omega, window, gaps):
    mean = sum(math.sin(d / 2) for d in gaps) / PI
    square = 0.5 + sum(math.sin(d) for d in gaps) / (4 * PI)
    assert expected_max(omega, 1, window).item() == pytest.approx(mean, abs=1e-12)
    assert expected_gap(omega, 1, window).item() == pytest.approx(math.sqrt(square - 2 * mean + 1), abs=1e-12)


def test_numbers_known_by_hand():
    assert expected_max((0.0, 0.0), 2).item() == pytest.approx(0, abs=1e-12)
    assert expected_gap((0.0, 0.0), 2).item() == pytest.approx(math.sqrt(1.5))
    assert expected_max((PI / 2, 0.0), 2).item() == pytest.approx(2 / PI)
    assert expected_gap((PI / 2, 0.0), 2).item() == pytest.approx(math.sqrt(1.5 - 4 / PI))
    assert modulus_shift_bound(0.5, (0.0, -3.0)).item() == 0.75
    assert modulus_shift_bound(torch.tensor([0.5, 0.1]), (2.0, 3.0)).item() == pytest.approx(0.65)


# --- properties -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_symmetries(window):
    omega = frequencies(50)
    close = (1e-7, 0.0)  # of a root: 1e-14 of its square
    for other in (-omega, omega + 2 * PI, omega - torch.tensor([0, 4 * PI], dtype=torch.float64)):
        assert_close("gap", expected_gap(other, 1, window), expected_gap(omega, 1, window), close)
        assert_close("max", expected_max(other, 1, window), expected_max(omega, 1, window))
    mirrored = omega * torch.tensor([1, -1])
    assert_close("mirror", expected_gap(mirrored, 1, window), expected_gap(omega, 1, window), close)
    assert_close("stride", expected_gap(omega / 2, 2, window), expected_gap(omega, 1, window), close)
    if not isinstance(window, int):
        turned = expected_gap(omega.flip(-1), 1, window[::-1])
        assert_close("turned", turned, expected_gap(omega, 1, window), close)


def test_a_rounding_of_the_frequency_changes_little():
    for size in (1e-15, -1e-15, 1e-9):
        for window in (2, 3, 5):
            before, after = closed_forms(SPECIAL, 1, window), closed_forms(SPECIAL + size, 1, window)
            for name, values in before.items():
                assert_close(name, after[name], values, (1e-6, 0.0))


def test_many_phases_make_a_modulus():
    golden = (math.sqrt(5) - 1) * PI  # whose multiples never coincide
    gaps = torch.stack([expected_gap((0.0, golden), 1, (1, 4**k)) for k in range(6)])
    assert (gaps[1:] < gaps[:-1] / 4).all() and gaps[-1] < 1e-5
    assert expected_max((0.0, golden), 1, (1, 1024)).item() == pytest.approx(1, abs=1e-4)
    even = expected_gap((0.0, 2 * PI / 30), 1, (1, 30)).item()
    assert even == pytest.approx((PI / 30) ** 2 / math.sqrt(20), rel=1e-2)


def test_ranges_and_order():
    frequency = frequencies(2000)
    for window in (1, 2, 3, 5):
        mean, gap = expected_max(frequency, 2, window), expected_gap(frequency, 2, window)
        assert mean.min() > -1e-12 and mean.max() < 1
        assert gap.min() > 0 and gap.max() < math.sqrt(1.5) + 1e-12
        assert (gap >= 1 - mean - 1e-12).all(), "a root mean square is at least the mean"
        assert (expected_gap(frequency, 2, window + 1) <= gap + 1e-12).all(), "more phases, smaller gaps"


def test_shapes_dtypes_and_broadcasting():
    gap = expected_gap(torch.rand(3, 1, 2), 2)
    assert gap.shape == (3, 1) and gap.dtype == torch.float64
    assert modulus_shift_bound(torch.rand(3, 1, 1), torch.rand(5, 2)).shape == (3, 5)
    assert expected_gap(torch.rand(0, 2), 2).shape == (0,)
    assert expected_gap((1, 2), 2).shape == ()
    assert expected_max((math.nan, 0.0), 2).isnan()


def test_gradients():
    frequency = torch.tensor([[0.4, 1.1], [-0.9, 0.2]], dtype=torch.float64, requires_grad=True)
    for function in (expected_max, expected_gap):
        assert torch.autograd.gradcheck(lambda f, function=function: function(f, 2), (frequency,))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_the_gpu():
    frequency = frequencies(20)
    for name, value in closed_forms(frequency.cuda(), 2, 3).items():
        assert value.is_cuda
        assert_close(name, value, closed_forms(frequency, 2, 3)[name], (1e-7, 0.0))


def test_examples_run():
    result = doctest.testmod(theory, extraglobs={"torch": torch})
    assert result.attempted > 0 and result.failed == 0


# --- signals that meet the assumptions --------------------------------------------------------------------------------


def test_the_shifted_response_is_that_of_the_shifted_image():
    images = torch.randn(2, 32, 32, dtype=torch.float64)
    moved = images.roll((2, -3), dims=(-2, -1))
    assert_close("moved", filtered(images, (5, -7), 3, (2, -3)).real, filtered(moved, (5, -7), 3).real)
    assert_close("strided", filtered(images, (5, 7), 3, stride=4).imag, filtered(images, (5, 7), 3)[..., ::4, ::4].imag)


@pytest.mark.parametrize("shift", [(0, 1), (1, 1), (0, -2), (0.5, 0), (0.3, -0.7)], ids=str)
@pytest.mark.parametrize("stride", [1, 2, 4])
def test_the_bound_of_the_modulus_on_every_image(stride, shift):
    size = 64
    half_width = (size // (2 * stride) - 1) // 2  # 2 half_width + 1 bins still fit pi / stride
    bandwidth = 2 * half_width * 2 * PI / size
    assert bandwidth <= PI / stride
    images = torch.randn(20, size, size, dtype=torch.float64).cumsum(-1).cumsum(-2)
    images[0] = 0
    images[0, 20, 30] = 1
    before, after = (filtered(images, (11, -14), half_width, u, stride=2 * stride).abs() for u in ((0, 0), shift))
    change = norms(after - before) / norms(before)
    bound = modulus_shift_bound(bandwidth, shift).item()
    assert_close("norm", norms(after), norms(before), (1e-9, 1e-9))
    assert change.max() <= bound
    assert change.max() > bound / 20, "a bound that says something"


def test_the_bound_of_the_modulus_on_average_in_spite_of_aliasing():
    images = torch.randn(100, 64, 64, dtype=torch.float64)  # stationary
    before, after = (filtered(images, (12, 15), 12, (0, u), stride=8).abs() for u in (0, 1))
    bandwidth = 24 * 2 * PI / 64
    assert bandwidth > 2 * PI / 8
    rms = (after - before).square().mean().sqrt() / before.square().mean().sqrt()
    assert rms <= modulus_shift_bound(bandwidth, (0, 1))


@pytest.mark.parametrize("center", [(0, 40), (80, 60), (128, 128), (48, -100), (170, 86)], ids=str)
def test_the_maximum_on_a_narrow_band(center):
    """The measured gap is the predicted one, but for the envelope."""
    size, stride = 512, 2
    images = torch.randn(40, size, size, dtype=torch.float64)
    frequency = tuple(c * 2 * PI / size for c in center)
    z = filtered(images, center, 1, (0, 0), stride)
    maximum, modulus = torch.nn.functional.max_pool2d(z.real, 3, 2), z.abs()[..., 1:-1:2, 1:-1:2]
    # The rms offset of the 3 x 3 bins is 0.014 rad/px: at a corner of the window, 2 pixels off along both axes, the
    # response differs by 0.03 from the centre's wave, and the maximum takes the largest of the differences.
    envelope = 0.05
    gap = (norms(maximum - modulus) / norms(modulus)).square().mean().sqrt()
    assert gap.item() == pytest.approx(expected_gap(frequency, stride).item(), abs=envelope)
    assert (maximum.sum() / modulus.sum()).item() == pytest.approx(expected_max(frequency, stride).item(), abs=envelope)


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [expected_gap, expected_max])
def test_wrong_arguments(function):
    with pytest.raises(ValueError, match=r"frequency of shape \(..., 2\).*got \(3,\)"):
        function(torch.zeros(3), 2)
    with pytest.raises(ValueError, match=r"frequency.*got \(\)"):
        function(1.0, 2)
    for stride in (0, 2.0, (1, -1)):
        with pytest.raises(ValueError, match="expected stride a positive integer or a pair"):
            function((0.0, 1.0), stride)
    for window in (0, (3, 1.5)):
        with pytest.raises(ValueError, match="expected window a positive integer or a pair"):
            function((0.0, 1.0), 2, window)
    for neither in ((2, 2, 2), "3", (3,)):
        with pytest.raises(ValueError, match="expected one integer or a pair of them"):
            function((0.0, 1.0), 2, neither)


def test_wrong_shifts_and_bandwidths():
    with pytest.raises(ValueError, match="shift of shape"):
        modulus_shift_bound(0.5, torch.zeros(3))
    with pytest.raises(ValueError, match=r"bandwidth a number or of shape .* got \(64,\)"):
        modulus_shift_bound(torch.ones(64), torch.zeros(64, 2))
    with pytest.raises(ValueError, match="at least 0, got -0.5"):
        modulus_shift_bound(-0.5, (0, 1))
