"""Where a convolution and a pooling look: sizes, strides and borders, as pairs (y, x); and how maps lie in memory."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

Pair = tuple[int, int]


class ConvGeometry(NamedTuple):
    """Where a convolution looks: (y, x) pairs in pixels, as `nn.Conv2d` with zero padding and groups=1."""

    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)


class PoolGeometry(NamedTuple):
    """Where a pooling looks: (y, x) pairs in steps of the convolution, as `nn.MaxPool2d` with dilation=1."""

    size: Pair = (3, 3)
    stride: Pair = (2, 2)
    padding: Pair = (0, 0)
    ceil_mode: bool = False

    @property
    def center(self) -> Pair:
        """Index of a window's centre; of an even window, the upper left of the central positions."""
        return ((self.size[0] - 1) // 2, (self.size[1] - 1) // 2)

    def output_size(self, height: int, width: int) -> Pair:
        """(height, width) after the max pool; with ceil_mode the last window starts inside the input or its padding."""
        return tuple(
            _pooled_length(n, *axis, self.ceil_mode)
            for n, axis in zip((height, width), zip(self.size, self.stride, self.padding, strict=True), strict=True)
        )


def check_pool(pool: PoolGeometry) -> PoolGeometry:
    """The geometry, or ValueError for one that this package does not define."""
    if not set(pool.size) <= {2, 3}:
        raise ValueError(f"expected a pooling window of 2 or 3, got {pool.size}")
    if any(not 0 <= 2 * padding <= size for padding, size in zip(pool.padding, pool.size, strict=True)):
        raise ValueError(f"expected a pooling padding from 0 to half the window {pool.size}, got {pool.padding}")
    if min(pool.stride) < 1:
        raise ValueError(f"expected a positive pooling stride, got {pool.stride}")
    return pool


def centers_are_inside(pool: PoolGeometry) -> bool:
    """Whether every window's centre lies on the map whatever the map's size (true for all common stems)."""
    return all(
        center >= padding and unreached(size, stride, padding, center, pool.ceil_mode) >= 0
        for size, stride, padding, center in zip(pool.size, pool.stride, pool.padding, pool.center, strict=True)
    )


def unreached(size: int, stride: int, padding: int, center: int, ceil_mode: bool) -> int:
    """How many positions at the end of a map no window's centre can reach; negative if a centre can fall outside."""
    count = size - 1 - center - padding - (stride - 1 if ceil_mode else 0)
    return max(count, -center) if ceil_mode else count  # every window starts on the map or before it


def is_channels_last(x: Tensor) -> bool:
    """Whether the channels of `x` lie side by side (also in a crop)."""
    return x.stride(1) == 1 and x.shape[2] * x.shape[3] > 1


def memory_format_of(x: Tensor) -> torch.memory_format:
    return torch.channels_last if is_channels_last(x) else torch.contiguous_format


def _pooled_length(length: int, size: int, stride: int, padding: int, ceil_mode: bool) -> int:
    count = (length + 2 * padding - size + (stride - 1 if ceil_mode else 0)) // stride + 1
    if ceil_mode and (count - 1) * stride >= length + padding:
        count -= 1
    return count
