"""Filters as a matrix whose columns meet the rows of `patches`, and the gradient of that matrix as filters again.

A channel has a column for each position of a cell that its kind looks at (the centre, and the position on its right,
where the taps lie a stride further), and for each of re and im. The four columns of a blurred modulus are ordered so
that the tensor core leaves all of them with one thread: 16 columns are 4 channels, (position, channel, part).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def split_column(column, KIND: tl.constexpr):
    """(channel, position 0 or 1, part 0 or 1) of a column."""
    if KIND == "max":
        return column // 2, column % 2, column * 0
    if KIND == "modulus1":
        return column // 2, column * 0, column % 2
    return column // 16 * 4 + column % 8 // 2, column // 8 % 2, column % 2


@triton.jit
def split_depth(k, KERNEL: tl.constexpr, TAPS: tl.constexpr, C_IN: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """(channel, row, tap) of an element of a patch; the row is beyond the kernel where k is beyond the patch."""
    if CHANNELS_LAST:
        return k % C_IN, k // (TAPS * C_IN), k // C_IN % TAPS
    channel = k // (TAPS * KERNEL)
    return channel, tl.where(channel < C_IN, k // TAPS % KERNEL, KERNEL), k % TAPS


@triton.jit
def pack(
    real,  # (C_out, C_in, k, k)
    imag,  # (n, C_in, k, k), of the kind's channels
    channels,  # (n,) the kind's channels
    packed,  # (groups, slices, BLOCK_K, columns), dtype of the products
    n,
    real_o,
    real_i,
    real_h,
    real_w,
    imag_o,
    imag_i,
    imag_h,
    imag_w,
    KIND: tl.constexpr,
    KERNEL: tl.constexpr,
    TAPS: tl.constexpr,
    LEAD: tl.constexpr,
    STRIDE: tl.constexpr,
    C_IN: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    GROUP: tl.constexpr,
    N_COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The matrix, group by group of GROUP channels; rows beyond the patch and channels beyond n are 0."""
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)[:, None]
    group = tl.program_id(1)
    column = tl.arange(0, N_COLUMNS)[None, :]
    channel, position, part = split_column(column, KIND)
    channel += group * GROUP
    c, y, tap = split_depth(k, KERNEL, TAPS, C_IN, CHANNELS_LAST)
    x = tap - LEAD - position * STRIDE
    inside = (channel < n) & (y < KERNEL) & (x >= 0) & (x < KERNEL)
    out_channel = tl.load(channels + channel, mask=channel < n, other=0)
    values = tl.load(
        real + (out_channel * real_o + c * real_i + y * real_h + x * real_w), mask=inside & (part == 0), other=0.0
    )
    if KIND != "max":
        values += tl.load(
            imag + (channel * imag_o + c * imag_i + y * imag_h + x * imag_w), mask=inside & (part == 1), other=0.0
        )
    target = (group * DEPTH + k) * N_COLUMNS + column
    tl.store(packed + target, values.to(packed.dtype.element_ty))


@triton.jit
def unpack(
    packed,  # (groups, DEPTH / BLOCK_K, columns, BLOCK_K) float32, the gradient of the matrix, transposed
    channels,  # (n,)
    real,  # (C_out, C_in, k, k), written at `channels`
    imag,  # (n, C_in, k, k), written
    n,
    KIND: tl.constexpr,
    KERNEL: tl.constexpr,
    TAPS: tl.constexpr,
    LEAD: tl.constexpr,
    STRIDE: tl.constexpr,
    C_IN: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    GROUP: tl.constexpr,
    N_COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The filters' gradient: each tap sums what its places in the matrix got (one per position of a cell)."""
    channel = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    inside = i < C_IN * KERNEL * KERNEL
    c, y, x = i // (KERNEL * KERNEL), i // KERNEL % KERNEL, i % KERNEL
    group, local = channel // GROUP, channel % GROUP
    out_channel = tl.load(channels + channel)
    for part in tl.static_range(1 if KIND == "max" else 2):
        total = tl.zeros((BLOCK,), tl.float32)
        for position in tl.static_range(1 if KIND == "modulus1" else 2):
            if KIND == "max":
                column = local * 2 + position
            elif KIND == "modulus1":
                column = local * 2 + part
            else:
                column = local // 4 * 16 + position * 8 + local % 4 * 2 + part
            tap = x + LEAD + position * STRIDE
            if CHANNELS_LAST:
                k = (y * TAPS + tap) * C_IN + c
            else:
                k = (c * KERNEL + y) * TAPS + tap
            source = group * (DEPTH * N_COLUMNS) + (k // BLOCK_K * N_COLUMNS + column) * BLOCK_K + k % BLOCK_K
            total += tl.load(packed + source, mask=inside, other=0.0)
        if part == 0:
            tl.store(real + out_channel * (C_IN * KERNEL * KERNEL) + i, total.to(real.dtype.element_ty), mask=inside)
        else:
            tl.store(imag + channel * (C_IN * KERNEL * KERNEL) + i, total.to(imag.dtype.element_ty), mask=inside)


@triton.jit
def load_slices(packed, group, DEPTH: tl.constexpr, N_COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr):
    """The matrix of a group as a tuple of slices: loaded before a loop, it stays in shared memory."""
    k = tl.arange(0, BLOCK_K)
    column = tl.arange(0, N_COLUMNS)
    slices = ()
    for s in tl.static_range(DEPTH // BLOCK_K):
        row = group * DEPTH + s * BLOCK_K + k
        slices = slices + (tl.load(packed + row[:, None] * N_COLUMNS + column[None, :]),)
    return slices
