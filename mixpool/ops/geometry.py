"""Where a convolution and a pooling look: sizes, strides and borders, as pairs (y, x)."""

from __future__ import annotations

from typing import NamedTuple

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


def centers_are_inside(pool: PoolGeometry) -> bool:
    """Whether every window's centre lies on the map whatever the map's size (true for all common stems)."""
    return all(
        center >= padding and unreached(size, stride, padding, center, pool.ceil_mode) >= 0
        for size, stride, padding, center in zip(pool.size, pool.stride, pool.padding, pool.center, strict=True)
    )


def unreached(size: int, stride: int, padding: int, center: int, ceil_mode: bool) -> int:
    """How many positions at the end of a map no window's centre can reach; negative if a centre can fall outside."""
    return size - 1 - center - padding - (stride - 1 if ceil_mode else 0)


def _pooled_length(length: int, size: int, stride: int, padding: int, ceil_mode: bool) -> int:
    count = (length + 2 * padding - size + (stride - 1 if ceil_mode else 0)) // stride + 1
    if ceil_mode and (count - 1) * stride >= length + padding:
        count -= 1
    return count
