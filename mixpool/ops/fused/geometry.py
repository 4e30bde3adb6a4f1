"""What a kernel has to know of a stem, as integers that are constants to its compiler.

Legend: m stride of the convolution, k kernel side, (P, Q) size of the pooled map, (p, q) a position of it.

The window of (p, q) covers the convolution's rows 2p - pad .. 2p - pad + 2 and the same columns. Every position of the
convolution belongs to one *cell*: cell (p, q) has the centre row of window p and the row below it, and the centre
column of window q and the column right of it. So a window is its own cell, plus a row of the cell above and a column of
the cell on its left: kernels that walk down the cells of a column compute each position once.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from mixpool.ops.geometry import ConvGeometry, PoolGeometry

KINDS = ("max", "modulus1", "modulus3")
COLUMNS = {"max": 2, "modulus1": 2, "modulus3": 4}  # of the matrix product per channel: positions of a cell x re and im


class Channels(NamedTuple):
    """Which output channels are pooled how: two disjoint (n,) int64 index tensors that cover all of them."""

    max: Tensor
    modulus: Tensor


class StemGeometry(NamedTuple):
    """A stem on images of one size. Lengths in pixels, except those of the convolution's map and the pooled map."""

    kernel_size: int
    stride: int  # m
    padding: int
    pool_padding: int
    ceil_mode: bool
    in_channels: int
    height: int
    width: int

    @classmethod
    def of(cls, x: Tensor, weight: Tensor, conv: ConvGeometry, pool: PoolGeometry) -> StemGeometry:
        """That of a stem in which `backend` sees no obstacle, on images of this size."""
        return cls(weight.shape[2], conv.stride[0], conv.padding[0], pool.padding[0], pool.ceil_mode, *x.shape[1:])

    @property
    def conv_size(self) -> tuple[int, int]:
        """(rows, columns) of the convolution's map."""
        return tuple((n + 2 * self.padding - self.kernel_size) // self.stride + 1 for n in (self.height, self.width))

    @property
    def pooled_size(self) -> tuple[int, int]:
        """(P, Q)."""
        pool = PoolGeometry(padding=(self.pool_padding,) * 2, ceil_mode=self.ceil_mode)
        return pool.output_size(*self.conv_size)

    @property
    def first_cell(self) -> int:
        """0, or -1 where the first window starts at the map's first row, which then belongs to the cell before."""
        return 0 if self.pool_padding == 1 else -1

    @property
    def cells_end(self) -> tuple[int, int]:
        """One past the last cell, along rows and columns: all of the map, also what no window covers."""
        ends = ((n + self.pool_padding - 2) // 2 + 1 for n in self.conv_size)
        return tuple(max(end, pooled) for end, pooled in zip(ends, self.pooled_size, strict=True))

    def window_start(self) -> tuple[int, int]:
        """(start, lead): pixels from 2 m q to where cell q's patch starts, a multiple of 4, and to the first tap in it.

        A start that is a multiple of 4 keeps loads aligned; the taps before `lead` have weight 0.
        """
        first_tap = self.stride * (1 - self.pool_padding) - self.padding
        return first_tap - first_tap % 4, first_tap % 4

    def num_taps(self, kind: str) -> int:
        """Pixels in a row of a patch: room for the filter, at two positions where the kind looks at a whole cell."""
        _, lead = self.window_start()
        taps = lead + self.kernel_size + (0 if kind == "modulus1" else self.stride)
        return -(-taps // 4) * 4

    def depth(self, kind: str) -> int:
        """Length of a patch, (channels x rows x taps): the inner dimension of the matrix product."""
        return self.in_channels * self.kernel_size * self.num_taps(kind)

    def positions(self, kind: str) -> int:
        """Positions per image over which batch statistics are taken."""
        rows, columns = self.pooled_size if kind == "modulus1" else self.conv_size
        return rows * columns

    def constants(self, kind: str) -> dict[str, int]:
        """The arguments of `load_patch`, `windows` and `centers` that depend on the stem alone."""
        start, lead = self.window_start()
        height, width = self.conv_size
        pooled_height, pooled_width = self.pooled_size
        return {
            "H": self.height,
            "W": self.width,
            "C_IN": self.in_channels,
            "CONV_H": height,
            "CONV_W": width,
            "P": pooled_height,
            "Q": pooled_width,
            "STRIDE": self.stride,
            "PADDING": self.padding,
            "POOL_PADDING": self.pool_padding,
            "KERNEL": self.kernel_size,
            "TAPS": self.num_taps(kind),
            "START": start,
        }


def padded_places(n_max: int) -> int:
    """Channels of the bytes that keep the maxima's places: whole groups of the backward pass, in aligned vectors."""
    return -(-n_max // 32) * 32
