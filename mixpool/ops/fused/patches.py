"""Pixels under the filters, as rows of a matrix: read where they lie, never copied to a matrix in memory."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_patch(
    x,
    offset,  # (rows, 1) of the first element of each patch, from x; may lie outside of the image
    element,  # (rows, 1) of the same within its image row
    line,  # image row of the same: a number, or (rows, 1)
    slice_index,
    X_C: tl.constexpr,
    X_H: tl.constexpr,
    X_W: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    C_IN: tl.constexpr,
    KERNEL: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """(rows, BLOCK_K): elements `slice_index * BLOCK_K` and on of the patches, 0 outside of the image.

    A patch is flattened as its memory lies, so that neighbours are read together: (row, tap, channel) in channels_last,
    (channel, row, tap) in NCHW.
    """
    k = slice_index * BLOCK_K + tl.arange(0, BLOCK_K)
    if X_W == 1:
        tap = k % TAPS
        dy = (k // TAPS) % KERNEL
        step = (k // (TAPS * KERNEL)) * X_C + dy * X_H + tap
    else:
        tap = k % (TAPS * C_IN)
        dy = k // (TAPS * C_IN)
        step = dy * X_H + tap
    elements = element + tap[None, :]
    lines = line + dy[None, :]
    inside = (elements >= 0) & (elements < W * X_W) & (lines >= 0) & (lines < H)
    inside &= (k < TAPS * C_IN * KERNEL)[None, :]
    return tl.load(x + (offset + step[None, :]), mask=inside, other=0.0)
