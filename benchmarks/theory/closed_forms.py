"""What the experiment adds to the closed forms of `mixpool.filters.theory`: their map, and the bound of RMax's change.

The legend of that file holds: frequencies and shifts are (..., 2) in the order (y, x), in radians per pixel and pixels,
results are float64. So do its assumptions 1 and 2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mixpool.filters.theory import Vectors, expected_gap, expected_max, modulus_shift_bound


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
