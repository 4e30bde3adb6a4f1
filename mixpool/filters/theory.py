"""What theory expects of the maximum (RMax) and of the modulus (CMod) of one filter's response, in closed form.

A convolution of stride m with an analytic filter of centre frequency theta gives the complex map z. Its two poolings at
output position n are CMod = |z(n)| and RMax = max over p of Re z(n + p), p over the window (activation comes later).
Two assumptions:

1. Narrow band: inside a window |z| is constant and z(n + p) = z(n) exp(i <omega, p>), omega = m * theta. Then RMax is
   CMod times max over p of cos(phi + <omega, p>), phi the phase of z(n); only omega modulo 2 pi matters (aliasing),
   and a blur of the modulus changes nothing.
2. Uniform phase: phi is uniform on the circle and independent of |z|, as for an image whose position is random.

The phases <omega, p> mod 2 pi, sorted, cut the circle into gaps d_i, sum of d_i = 2 pi. The maximum is the cosine of
the distance from -phi to the nearest of them, at most d_i / 2, so each expectation is a sum over the gaps. Where the
phases pile up, as at omega = 0 or (pi, pi), a large gap is left: there max pooling is no modulus, and unstable unless
theta itself is near 0, where a shift hardly turns the phase.

A real filter breaks 1 the more, the nearer its band comes to pi / m: z varies inside the window in other ways too, so
that small gaps grow (at pi / m, on noise, from 0.04 to 0.5) and phases that pile up spread. What is computed here is
the limit of a narrow band: it orders filters by frequency, stride and window, and says less of wide ones.

Source: Leterme, Polisano, Perrier, Alahari, On the Shift Invariance of Max Pooling Feature Maps in Convolutional Neural
Networks, arXiv 2209.11740 (odd windows); the sums hold for any window.
Legend: frequencies and shifts are (..., 2) in the order (y, x), in radians per pixel and pixels, and broadcast; results
are float64 on the device of the first of them. Stride and window are one integer or a pair (y, x).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mixpool.filters.spectrum import pair

Vectors = Tensor | Sequence[float]  # (..., 2) in the order (y, x)
TURN = 2 * math.pi


def expected_max(frequency: Vectors, stride: int | Sequence[int], window: int | Sequence[int] = 3) -> Tensor:
    """Mean of RMax / CMod, from 0 (one phase alone) to 1 (phases everywhere).

    E[RMax] / CMod = 1/pi * sum of sin(d_i / 2), under assumptions 1 and 2.

    Args:
        frequency: (..., 2) centre frequencies, radians per pixel.
        stride: pixels per step of the convolution.
        window: positions of the convolution under one pooling window.
    Returns:
        (...) float64; differentiable almost everywhere.
    Raises:
        ValueError: frequency is not (..., 2), or stride or window is no positive integer nor a pair of them.
    Example:
        >>> round(expected_max((0.0, math.pi), stride=1).item(), 4)  # two phases, pi apart: 2 / pi
        0.6366
    """
    gap = gaps(phases(vectors("frequency", frequency), stride, window))
    return (gap / 2).sin().sum(dim=-1) / math.pi


def expected_gap(frequency: Vectors, stride: int | Sequence[int], window: int | Sequence[int] = 3) -> Tensor:
    """The paper's gamma_q(m theta): root mean square of RMax - CMod over CMod; arguments as `expected_max`.

    gamma^2 = 3/2 + 1/(4 pi) * sum of (sin d_i - 8 sin(d_i / 2)), under assumptions 1 and 2; q = (window - 1) / 2 in the
    paper. sqrt(3/2) = 1.22 for one phase alone, about (pi / n)^2 / sqrt(20) for n phases evenly spaced.

    Over a whole map: given the modulus, the mean of ||RMax - CMod||^2 is gamma^2 ||CMod||^2, whether or not the phases
    of its positions depend on each other, and so the mean of ||RMax - CMod|| is at most gamma ||CMod||.
    """
    gap = gaps(phases(vectors("frequency", frequency), stride, window))
    # 3/2 = 1/(4 pi) * sum of 3 d_i: each term is then the integral of (1 - cos)^2 over a gap, and none is negative.
    square = (3 * gap + gap.sin() - 8 * (gap / 2).sin()).sum(dim=-1) / (2 * TURN)
    return square.clamp_min(0).sqrt()


def modulus_shift_bound(bandwidth: float | Tensor, shift: Vectors) -> Tensor:
    """The paper's alpha(kappa u): bound of the relative change of CMod when the image moves by u pixels.

    ||CMod(T_u x) - CMod(x)|| <= alpha ||CMod(x)||, alpha = |kappa u|_1 / 2 = (kappa_y |u_y| + kappa_x |u_x|) / 2, for a
    filter whose Fourier support lies in a rectangle of sides kappa, and CMod without blur. It holds for every image, l2
    norms over all output positions, if no side exceeds 2 pi / (total stride of CMod), which keeps the map free of
    aliasing: pi / m for a pooling stride of 2. For any kappa it holds for the root mean squares of the two sides over a
    stationary random image. Neither assumption 1 nor 2 is needed.

    Args:
        bandwidth: full sides kappa, radians per pixel: a number or (..., 1) for a square, (..., 2) for a rectangle
            (y, x). Not `FilterStats.bandwidth`, which is the rms distance from the centre.
        shift: (..., 2) displacement u of the image, pixels, any sign and fraction.
    Returns:
        (...) float64.
    Raises:
        ValueError: shift is not (..., 2), or bandwidth is negative or of another shape.
    Example:
        >>> modulus_shift_bound(0.5, [(0.0, 1.0), (1.0, 1.0)])
        tensor([0.2500, 0.5000], dtype=torch.float64)
    """
    shift = vectors("shift", shift)
    sides = torch.as_tensor(bandwidth, dtype=torch.float64, device=shift.device)
    if sides.ndim and sides.shape[-1] not in (1, 2):
        raise ValueError(f"expected bandwidth a number or of shape (..., 1) or (..., 2), got {tuple(sides.shape)}")
    if (sides < 0).any():
        raise ValueError(f"expected a bandwidth of at least 0, got {sides.min().item():g}")
    return (sides * shift.abs()).sum(dim=-1) / 2


def phases(frequency: Tensor, stride: int | Sequence[int], window: int | Sequence[int]) -> Tensor:
    """(..., n) phases of a window's n positions, sorted, in [0, 2 pi].

    Equal phases stay apart by a rounding, also across 0: that leaves gaps of about 0, which count for nothing.
    """
    omega = frequency * frequency.new_tensor(_positive_pair("stride", stride))
    steps = [torch.arange(count, dtype=omega.dtype, device=omega.device) for count in _positive_pair("window", window)]
    position = torch.cartesian_prod(*steps)  # only differences of phases matter, so no position need be the centre
    return (omega @ position.T).remainder(TURN).sort(dim=-1).values


def gaps(points: Tensor) -> Tensor:
    """(..., n) distances from each of the sorted points on the circle to the next, the last one to the first."""
    return torch.cat([points[..., 1:], points[..., :1] + TURN], dim=-1) - points


def vectors(name: str, value: Vectors) -> Tensor:
    """(..., 2) float64; ValueError for anything else."""
    found = torch.as_tensor(value, dtype=torch.float64)
    if found.ndim == 0 or found.shape[-1] != 2:
        raise ValueError(f"expected {name} of shape (..., 2), (y, x), got {tuple(found.shape)}")
    return found


def _positive_pair(name: str, value: int | Sequence[int]) -> tuple[int, int]:
    values = pair(value)
    if not all(isinstance(number, int) and number >= 1 for number in values):
        raise ValueError(f"expected {name} a positive integer or a pair (y, x) of them, got {value!r}")
    return values
