"""What the experiment adds to the closed forms of `mixpool.filters.theory`: how RMax changes, its bound, and a map.

The legend of that file holds: frequencies and shifts are (..., 2) in the order (y, x), in radians per pixel and pixels,
results are float64. So do its assumptions 1 and 2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mixpool.filters.theory import TURN, Vectors, expected_gap, expected_max, gaps, modulus_shift_bound, phases, vectors


class FrequencyMap(NamedTuple):
    """Maps over the plane of centre frequencies; row i, column j is at (frequency[i], frequency[j]).

    Attributes:
        frequency: (size,) from -pi to pi, both included, 0 in the middle, radians per pixel; the axis of fy and of fx.
        expected_gap: (size, size), see the function of this name.
        expected_max: (size, size), likewise.
    """

    frequency: Tensor
    expected_gap: Tensor
    expected_max: Tensor


def frequency_map(stride: int | Sequence[int], window: int | Sequence[int] = 3, size: int = 129) -> FrequencyMap:
    """`expected_gap` and `expected_max` over the whole plane [-pi, pi]^2 of centre frequencies.

    Args:
        stride, window: as `expected_max`.
        size: odd number of frequencies per axis, so that 0 is one of them; memory grows as size^2 * window^2.
    Raises:
        ValueError: size is even or below 3, or as `expected_max`.
    Example:
        >>> frequency_map(stride=2).expected_gap.shape
        torch.Size([129, 129])
    """
    if size < 3 or size % 2 == 0:
        raise ValueError(f"expected an odd size of at least 3, got {size=}")
    half = size // 2
    axis = torch.arange(-half, half + 1, dtype=torch.float64) / half * math.pi  # exactly 0 and exactly +-pi
    plane = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), dim=-1)
    return FrequencyMap(axis, expected_gap(plane, stride, window), expected_max(plane, stride, window))


def expected_max_square(frequency: Vectors, stride: int | Sequence[int], window: int | Sequence[int] = 3) -> Tensor:
    """Mean of (RMax / CMod)^2, from 1/2 to 1; arguments and assumptions of `expected_max`.

    E[RMax^2] / CMod^2 = 1/2 + 1/(4 pi) * sum of sin d_i.
    """
    return 0.5 + gaps(phases(vectors("frequency", frequency), stride, window)).sin().sum(dim=-1) / (2 * TURN)


def max_shift_change(
    frequency: Vectors, shift: Vectors, stride: int | Sequence[int], window: int | Sequence[int] = 3
) -> Tensor:
    """Expected change of RMax when the image moves by u pixels, relative to RMax's own root mean square.

    sqrt(E[(RMax(T_u x) - RMax(x))^2] / E[RMax^2]), under 1 and 2 and with an envelope that does not change under the
    shift: the phase advances by <theta, u> everywhere, and CMod does not change at all. No bound but the value itself;
    what a slowly varying envelope multiplies cancels. From 0 to 2, the latter for one phase alone turned by pi.

    Between the places where RMax, before or after the shift, turns to another position of the window, both are cosines.
    With a and b their difference and the difference of their slopes in the middle of such a piece of length L,
    E[(difference)^2] / CMod^2 = 1/(4 pi) * sum over the pieces of (a^2 (L + sin L) + b^2 (L - sin L)).

    Args:
        frequency: (..., 2) centre frequencies, radians per pixel.
        shift: (..., 2) displacement u of the image, pixels, any sign and fraction.
        stride, window: as `expected_max`.
    Returns:
        (...) float64.
    Raises:
        ValueError: as `expected_max`, and shift is not (..., 2).
    Example:
        >>> round(max_shift_change((0.0, 0.0), (0.0, 1.0), stride=2).item(), 4)  # a phase that does not advance
        0.0
    """
    frequency, shift = vectors("frequency", frequency), vectors("shift", shift)
    frequency, shift = torch.broadcast_tensors(frequency, shift.to(frequency.device))
    advance = (frequency * shift).sum(dim=-1, keepdim=True)
    angles = phases(frequency, stride, window)
    turning = angles + gaps(angles) / 2  # midway between two phases RMax turns from one to the other
    pieces = torch.cat([turning, turning - advance], dim=-1).remainder(TURN).sort(dim=-1).values
    length = gaps(pieces)
    middle = pieces + length / 2
    before = _signed_distance(middle, angles, turning)
    after = _signed_distance(middle + advance, angles, turning)
    value, slope = after.cos() - before.cos(), after.sin() - before.sin()
    square = value.square() * (length + length.sin()) + slope.square() * (length - length.sin())
    square = square.sum(dim=-1) / (2 * TURN) / expected_max_square(frequency, stride, window)
    return square.clamp_min(0).sqrt()


def max_shift_bound(
    frequency: Vectors,
    bandwidth: float | Tensor,
    shift: Vectors,
    stride: int | Sequence[int],
    window: int | Sequence[int] = 3,
) -> Tensor:
    """Bound of the expected change of RMax when the image moves by u pixels, relative to the norm of CMod.

    E[ ||RMax(T_u x) - RMax(x)|| / ||CMod(x)|| ] <= 2 gamma + alpha: from RMax to CMod, along CMod, and back. The root
    mean square of the ratio has the same bound. It needs 1 and 2 for x and for T_u x, and the bandwidth's condition in
    `modulus_shift_bound`, which also makes ||CMod(T_u x)|| = ||CMod(x)||.

    Args:
        frequency, stride, window: as `expected_max`.
        bandwidth, shift: as `modulus_shift_bound`.
    Returns:
        (...) float64. Not the sharpest: as RMax never exceeds CMod, both errors have one sign, their scalar product is
        not negative, and sqrt(2) gamma + alpha holds as well. For a pure wave `max_shift_change` is the value itself.
    """
    gap = expected_gap(frequency, stride, window)
    return 2 * gap + modulus_shift_bound(bandwidth, torch.as_tensor(shift, device=gap.device))


def _signed_distance(angle: Tensor, points: Tensor, turning: Tensor) -> Tensor:
    """(..., k) angles minus the nearest of the points (..., n) on the circle, `turning` the middles between those."""
    start = turning[..., -1:] - TURN
    angle = (angle - start).remainder(TURN) + start
    nearest = torch.searchsorted(turning.contiguous(), angle.contiguous()).clamp_max(points.shape[-1] - 1)
    return angle - points.gather(-1, nearest)
