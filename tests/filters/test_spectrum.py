"""The power spectrum and what is read off it, held against waves of known frequency and against plain sums.

Legend: C channels, I input channels, (K, K) taps, frequencies (fy, fx) in radians per pixel, x right and y down.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from support import assert_close, gabor
from torch import Tensor

from mixpool import analytic_partner, analyze
from mixpool.filters.partner import PRIOR_SIZE
from mixpool.filters.spectrum import (
    bandwidth,
    center_frequency,
    concentration,
    dc_share,
    orientation,
    power_spectrum,
)

ANGLES = torch.arange(10).mul(math.pi / 10).add(0.01).tolist()


# --- centre frequency and orientation ---------------------------------------------------------------------------------


def test_waves_under_a_hann_window():
    window = torch.hann_window(27, periodic=False, dtype=torch.float64)
    at = torch.arange(27, dtype=torch.float64)
    for fy, fx in ((0.0, 1.3), (1.5, 0.0), (1.3, -1.5), (0.9, 2.0)):
        weight = (torch.cos(fy * at[:, None] + fx * at) * window[:, None] * window)[None, None]
        measured = center_frequency(weight)[0]
        assert_close("frequency", measured, torch.tensor([fy, fx]), (0.01 * math.hypot(fy, fx), 0))


def test_orientation_is_of_the_frequency_vector_with_y_down():
    vectors = torch.tensor([[0.0, 1.0], [1.0, 1.0], [1.0, 0.0], [1.0, -1.0], [0.0, -1.0], [-1.0, -1.0]])
    assert_close("angles", orientation(vectors) * 4 / math.pi, torch.tensor([0.0, 1, 2, 3, 0, 1]))
    rows = torch.tensor([[1.0, 1, 1], [0, 0, 0], [-1, -1, -1]])[None, None]  # changes along y
    assert_close("horizontal stripes", analyze(rows).orientation, torch.tensor([math.pi / 2]), (1e-6, 0))
    assert_close("vertical stripes", analyze(rows.mT).orientation.sin(), torch.zeros(1), (1e-6, 0))


# --- the other numbers ------------------------------------------------------------------------------------------------


def test_power_spectrum_is_the_discrete_fourier_sum():
    weight = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    power = power_spectrum(weight, 7)
    expected = np.zeros((2, 7, 7))
    for i in range(7):
        for j in range(7):
            wave = np.exp(-2j * np.pi * (i * np.arange(4)[:, None] + j * np.arange(5)) / 7)
            expected[:, i, j] = (np.abs((weight.numpy() * wave).sum((2, 3))) ** 2).sum(1)
    assert_close("power", power, expected)
    assert power_spectrum(weight).shape == (2, 65, 65)
    assert power_spectrum(torch.randn(1, 1, 31, 3)).shape[-1] >= 4 * 31


@pytest.mark.parametrize("sigma", [2.0, 2.5, 3.0])
def test_bandwidth_of_a_gaussian_is_one_over_its_width(sigma):
    """The energy's spectrum is a Gaussian of variance 1 / (2 sigma^2) per axis, so its rms radius is 1 / sigma."""
    weight = torch.cat([gabor(1.5, angle, 31, sigma, phase=0.4) for angle in ANGLES])
    assert_close("bandwidth", bandwidth(weight), torch.full((10,), 1 / sigma), (0, 0.005))
    stats = analyze(weight, 2)
    assert_close("relative", stats.relative_bandwidth, stats.bandwidth * 4 / math.pi)


@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (4, 4), (2, 3)], ids=str)
def test_concentration_against_a_search_over_all_windows(stride):
    weight = torch.cat([torch.randn(2, 2, 7, 5).double(), gabor(2.6, 0.6, (7, 5), 1.2, 0.5, (1.0, -1.0))])
    grid = np.fft.fftfreq(65) * 2 * np.pi
    sides = [max(1, int(65 / (2 * step))) for step in stride]  # bins in pi / stride
    for channel, (fy, fx) in enumerate(center_frequency(weight).tolist()):
        energy = (np.abs(np.fft.fft2(weight[channel].numpy(), s=(65, 65))) ** 2).sum(0)
        energy *= (1 + side_of(grid[:, None], grid, torch.tensor((fy, fx)), 65)) / 2
        energy /= energy.sum()
        best = max(
            np.roll(energy, (-i, -j), (0, 1))[: sides[0], : sides[1]].sum() for i in range(65) for j in range(65)
        )
        assert_close("concentration", concentration(weight, stride)[channel], torch.tensor(best), (1e-9, 0))


def test_concentration_of_known_filters():
    narrow = gabor(1.5, 0.6, 31, 5.0)
    delta = torch.zeros(1, 1, 7, 7)
    delta[..., 3, 3] = 1
    assert concentration(narrow, 2) > 0.99
    assert_close("delta", concentration(delta, 1).double(), torch.tensor([0.5]), (0.05, 0))  # a square in a half plane
    assert concentration(delta, 4) < 0.08


def test_dc_share_of_known_filters():
    box, edge = torch.ones(1, 2, 5, 5), torch.cat([torch.ones(1, 2, 5, 2), torch.zeros(1, 2, 5, 1)], dim=3)
    edge = torch.cat([edge, -edge[..., :2]], dim=3)
    assert_close("box", dc_share(box), torch.ones(1))
    assert_close("edge", dc_share(edge), torch.zeros(1))
    assert_close("opposite colours", dc_share(box * torch.tensor([1.0, -1.0])[None, :, None, None]), torch.ones(1))
    weight = torch.randn(5, 3, 7, 7, dtype=torch.float64)
    peak = (np.abs(np.fft.fft2(weight.numpy(), s=(65, 65))) ** 2).sum(1).max((1, 2))
    assert_close("random", dc_share(weight), weight.sum((2, 3)).square().sum(1).numpy() / peak)


# --- the analytic partner ---------------------------------------------------------------------------------------------


def side_of(fy: np.ndarray, fx: np.ndarray, direction: Tensor, size: int = PRIOR_SIZE) -> np.ndarray:
    """The sign of <xi, direction>; in the bins that the dividing line cuts, rising from -1 to 1 across one bin."""
    dy, dx = direction.tolist()
    return np.clip((fy * dy + fx * dx) / math.hypot(dy, dx) / (math.pi / size), -1, 1)


# --- batching, gradients, dtypes --------------------------------------------------------------------------------------


def test_batched_equals_one_by_one():
    wave = gabor(1.4, 0.3, 7, 1.6, 0.0, (1.0, 0.5))
    weight = torch.cat([torch.randn(4, 2, 7, 7).double(), wave, torch.zeros(1, 2, 7, 7).double()])
    functions = {
        "center_frequency": center_frequency,
        "bandwidth": bandwidth,
        "concentration": lambda w: concentration(w, 2),
        "dc_share": dc_share,
        "analytic_partner": analytic_partner,
    }
    for name, function in functions.items():
        assert_close(name, function(weight), torch.cat([function(row[None]) for row in weight]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_finite_also_of_a_zero_filter(dtype):
    functions = (center_frequency, bandwidth, lambda w: concentration(w, 2), dc_share, analytic_partner)
    for function in functions:
        weight = torch.randn(3, 2, 5, 5, dtype=dtype)
        weight[1] = 0
        weight.requires_grad_()
        out = function(weight)
        assert torch.isfinite(out).all()
        (grad,) = torch.autograd.grad(out, weight, torch.randn_like(out))
        assert torch.isfinite(grad).all() and grad.dtype == dtype
        assert grad[0].any() and grad[2].any()


def test_gradients_against_finite_differences():
    """At a fixed half plane, which is a choice and not differentiated."""
    weight = torch.randn(2, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    direction = center_frequency(weight).detach()
    for function in (
        lambda w: bandwidth(w, direction),
        lambda w: concentration(w, 2, direction),
        dc_share,
        lambda w: analytic_partner(w, direction),
    ):
        assert torch.autograd.gradcheck(function, (weight,))


def test_gradient_of_the_center_frequency():
    """Of a wave: the derivative with respect to its own frequency is 1, and with respect to its amplitude 0."""
    frequency = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    at = torch.arange(25, dtype=torch.float64) - 12
    envelope = torch.exp(-(at[:, None] ** 2 + at**2) / (2 * 3.5**2))
    weight = (torch.cos(frequency * (0.6 * at[:, None] + 0.8 * at)) * envelope)[None, None]
    fy, fx = center_frequency(weight)[0]
    for component, expected in ((fy, 0.6), (fx, 0.8)):
        grads = torch.autograd.grad(component, (frequency, weight), retain_graph=True)
        assert_close("frequency", grads[0], torch.tensor(expected), (0.01, 0))
        assert_close("amplitude", (grads[1] * weight).sum(), torch.tensor(0.0))


# --- analyze ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [64, 5])
def test_power_spectrum_wants_an_odd_grid_that_holds_the_kernel(size):
    with pytest.raises(ValueError, match="expected an odd size of at least 7"):
        power_spectrum(torch.randn(1, 1, 7, 7), size)
