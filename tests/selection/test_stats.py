"""FilterStats: the numbers of `analyze` on waves of known frequency, and the predictions that they carry.

Legend: C channels, I input channels, (K, K) taps, frequencies (fy, fx) in radians per pixel, x right and y down.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from support import assert_close, assert_same_bits, gabor
from torch import Tensor, nn

import mixpool
from mixpool import analytic_partner, analyze
from mixpool.filters.gabor import _wave
from mixpool.filters.spectrum import (
    center_frequency,
)
from mixpool.selection.predict import predict

ANGLES = torch.arange(10).mul(math.pi / 10).add(0.01).tolist()
COLORS = {1: (1.0,), 2: (0.4, -1.0), 3: (1.0, -0.5, -0.5), 4: (0.2, 0.9, -0.3, 0.0)}


def angle_between(a: Tensor, b: Tensor) -> Tensor:
    """Of two undirected orientations, radians."""
    difference = (a - b).remainder(math.pi)
    return torch.minimum(difference, math.pi - difference)


# --- frequency and orientation ----------------------------------------------------------------------------------------


# From K = 15 on, a Gaussian of these widths fits into the kernel and its spectrum into the half plane.
WIDE_KERNELS = {"17x17": (17, 2.9), "18x18": (18, 2.9), "17x25": ((17, 25), 2.9), "24x18": ((24, 18), 3.1)}


@pytest.mark.parametrize("in_channels", COLORS)
@pytest.mark.parametrize("kernel_size, sigma", WIDE_KERNELS.values(), ids=WIDE_KERNELS)
def test_measured_frequency_of_gabor_filters(kernel_size, sigma, in_channels):
    truth = [(f, angle, phase) for f in (0.8, 1.3, 2.1) for angle in ANGLES for phase in (0.0, 1.0)]
    weight = torch.cat([gabor(f, a, kernel_size, sigma, phase, COLORS[in_channels]) for f, a, phase in truth])
    frequency, angle, _ = torch.tensor(truth, dtype=torch.float64).unbind(dim=1)
    stats = analyze(weight)
    assert stats.kernel_size == tuple(weight.shape[-2:])
    assert ((stats.frequency / frequency - 1).abs() < 0.01).all()
    assert (angle_between(stats.orientation, angle) < math.radians(0.5)).all()
    assert ((stats.center_frequency[:, 0] > 0) | (stats.center_frequency[:, 0].abs() < 1e-9)).all()


def test_measured_frequency_of_small_filters():
    """7x7 taps hold no narrow band: 3 % for the middle of the spectrum."""
    truth = [(f, angle, phase) for f in (1.4, 1.6, 1.8) for angle in ANGLES for phase in (0.0, 1.0)]
    weight = torch.cat([gabor(f, angle, 7, 1.7, phase) for f, angle, phase in truth])
    frequency, angle, _ = torch.tensor(truth, dtype=torch.float64).unbind(dim=1)
    stats = analyze(weight)
    assert ((stats.frequency / frequency - 1).abs() < 0.03).all()
    assert (angle_between(stats.orientation, angle) < math.radians(3)).all()


def test_statistics_do_not_depend_on_the_scale_or_the_sign():
    weight = torch.randn(6, 3, 7, 7, dtype=torch.float64)
    reference = analyze(weight, 2)
    for factor in (-1.0, 1e-4, 3e5):
        stats = analyze(weight * factor, 2)
        for name in ("center_frequency", "bandwidth", "concentration", "dc_share"):
            assert_close(f"{name} * {factor}", getattr(stats, name), getattr(reference, name), (1e-9, 1e-9))


def test_statistics_follow_a_transposed_and_a_mirrored_filter():
    weight = torch.randn(6, 3, 7, 5, dtype=torch.float64)
    stats, transposed, mirrored = analyze(weight, 2), analyze(weight.mT, 2), analyze(weight.flip(3), 2)
    assert_close("transposed", transposed.center_frequency.abs(), stats.center_frequency.flip(1).abs())
    assert_close("mirrored", mirrored.center_frequency.abs(), stats.center_frequency.abs())
    angle = angle_between(mirrored.orientation, math.pi - stats.orientation)
    assert_close("mirrored orientation", angle, torch.zeros(6))
    for name in ("bandwidth", "concentration", "dc_share"):
        for other in (transposed, mirrored):
            assert_close(name, getattr(other, name), getattr(stats, name))


def test_phase_step_is_the_stride_times_the_frequency():
    weight = torch.cat([gabor(1.5, angle, 21, 3.0) for angle in (0.0, math.pi / 2, math.pi / 4)])
    stats = analyze(weight, (2, 4))
    expected = 1.5 * torch.tensor([4.0, 2.0, math.hypot(2, 4) / math.sqrt(2)])  # angle 0 is along x
    assert_close("phase step", stats.phase_step, expected, (0, 0.01))
    assert len(stats) == 3


# --- predictions ------------------------------------------------------------------------------------------------------


def bank(frequencies, angles=(0.0, 0.6, math.pi / 2, 2.3), taps=7) -> Tensor:
    """(C, 3, taps, taps) gray waves without a mean, frequencies slowest."""
    waves = [_wave(frequency, angle, 0.4, taps) for frequency in frequencies for angle in angles]
    return torch.stack(waves)[:, None].expand(-1, 3, -1, -1).float().contiguous()


def test_stats_carry_the_predictions():
    weight = bank([0.7, 1.7])
    stats = analyze(torch.nn.Parameter(weight), 2)
    expected = predict(weight, 2)
    assert all(torch.equal(own, wanted) for own, wanted in zip(stats.predicted, expected))
    assert torch.equal(stats.predicted_correlation_blur3, expected.correlation_blur3)
    assert stats.predicted is stats.predicted, "computed once"
    window = analyze(weight, 2, window=2)
    assert torch.equal(window.predicted.gap, predict(weight, 2, window=2).gap)
    assert not torch.equal(window.predicted.gap, stats.predicted.gap)


def test_stats_keep_the_weights_they_describe():
    conv = torch.nn.Conv2d(3, 4, 5, 2)
    stats = analyze(conv)
    before = stats.weight.clone()
    with torch.no_grad():
        conv.weight.zero_()
    assert torch.equal(stats.weight, before) and not stats.weight.requires_grad
    assert stats.kernel_size == (5, 5)


# --- hard filters, dtypes, errors -------------------------------------------------------------------------------------


def test_zero_filters():
    stats = analyze(torch.zeros(2, 3, 7, 7), 2)
    for name in ("center_frequency", "bandwidth", "concentration", "dc_share", "orientation", "phase_step"):
        assert not getattr(stats, name).any(), name
    assert not analytic_partner(torch.zeros(2, 3, 7, 7)).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_precision(dtype):
    """The statistics are computed in float64 whatever the weight; the functions in float32 at least."""
    weight = torch.randn(5, 3, 7, 7).to(dtype)
    exact = analyze(weight.double(), 2)
    stats = analyze(weight, 2)
    for name in ("center_frequency", "bandwidth", "concentration", "dc_share"):
        assert_same_bits(name, getattr(stats, name), getattr(exact, name))
    assert_close("frequency", center_frequency(weight).float(), exact.center_frequency)
    partner = analytic_partner(weight)
    assert partner.dtype == dtype
    expected = analytic_partner(weight.double(), exact.center_frequency)
    # Because V is a small difference of large terms.
    limit = {torch.float32: 3e-4, torch.bfloat16: 0.02, torch.float16: 0.003}[dtype]
    assert (partner.double() - expected).norm() < limit * expected.norm()


def test_analyze_reads_the_stride_of_a_module():
    conv = nn.Conv2d(3, 8, 5, stride=(2, 3))
    stats = analyze(conv)
    assert stats.stride == (2, 3) and stats.kernel_size == (5, 5) and len(stats) == 8
    assert not stats.center_frequency.requires_grad
    assert analyze(conv, 4).stride == (4, 4) and analyze(conv.weight).stride == (1, 1)
    assert mixpool.analyze is analyze


ERRORS = {
    "no weight": (nn.ReLU(), None, "expected a convolution with a weight, got ReLU"),
    "linear": (nn.Linear(3, 4), None, r"shape \(C_out, C_in, kH, kW\), got \(4, 3\)"),
    "3-D": (torch.randn(3, 5, 5), None, r"got \(3, 5, 5\) torch.float32"),
    "integers": (torch.ones(1, 1, 3, 3, dtype=torch.int64), None, "torch.int64"),
    "array": (np.ones((1, 1, 3, 3)), None, "got ndarray"),
    "stride 0": (torch.randn(1, 1, 3, 3), 0, "expected a positive stride, got"),
    "stride of three": (torch.randn(1, 1, 3, 3), (1, 2, 3), "expected one integer or a pair"),
    "NaN": (torch.full((1, 1, 3, 3), math.nan), None, "expected finite weights, got NaN or infinity"),
    "infinity": (torch.full((1, 1, 3, 3), math.inf), None, "expected finite weights"),
}


@pytest.mark.parametrize("weight, stride, message", ERRORS.values(), ids=ERRORS)
def test_errors_of_analyze(weight, stride, message):
    with pytest.raises(ValueError, match=message):
        analyze(weight, stride)


def test_analyze_refuses_other_windows():
    with pytest.raises(ValueError, match="expected a pooling window of 2 or 3, got 5"):
        analyze(torch.randn(2, 3, 7, 7), 2, window=5)
