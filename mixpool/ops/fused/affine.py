"""out = act(scale x + shift) per channel, at pooled size, in one pass; backward in one pass too.

Partial sums per program, added up afterwards: no atomics, the same bits every time.
"""

from __future__ import annotations

import triton
import triton.language as tl

NAN = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit
def positions_of(program, n_positions, HW: tl.constexpr, X_N: tl.constexpr, X_P: tl.constexpr, BLOCK: tl.constexpr):
    """Offsets and mask of a tile of positions, flattened over images; both map axes as one of stride X_P."""
    flat = program * BLOCK + tl.arange(0, BLOCK)
    return (flat // HW) * X_N + (flat % HW) * X_P, flat < n_positions


@triton.jit(do_not_specialize=["n_positions"])  # the batch size compiles nothing anew
def forward(
    x,  # (N, C, P, Q) in either memory format
    scale,  # (C,)
    shift,  # (C,)
    out,  # as x
    n_channels,
    n_positions,  # N P Q
    HW: tl.constexpr,
    X_N: tl.constexpr,
    X_C: tl.constexpr,
    X_P: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
    RELU: tl.constexpr,
):
    offset, is_position = positions_of(tl.program_id(0), n_positions, HW, X_N, X_P, BLOCK)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_channel = channel < n_channels
    gain = tl.load(scale + channel, mask=is_channel, other=0.0)[None, :]
    base = tl.load(shift + channel, mask=is_channel, other=0.0)[None, :]
    where = offset[:, None] + (channel * X_C)[None, :]
    inside = is_position[:, None] & is_channel[None, :]
    value = tl.load(x + where, mask=inside, other=0.0).to(tl.float32) * gain + base
    if RELU:
        value = tl.maximum(value, 0.0, propagate_nan=NAN)
    tl.store(out + where, value.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["n_positions"])
def backward(
    x,  # (N, C, P, Q)
    scale,
    shift,
    grad_out,  # strides of x
    grad_x,  # strides of x, written
    sums,  # (programs, 2, C), written: partial sums of the gradients of scale and shift
    n_channels,
    n_positions,
    HW: tl.constexpr,
    X_N: tl.constexpr,
    X_C: tl.constexpr,
    X_P: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
    RELU: tl.constexpr,
):
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_channel = channel < n_channels
    gain = tl.load(scale + channel, mask=is_channel, other=0.0)[None, :]
    base = tl.load(shift + channel, mask=is_channel, other=0.0)[None, :]
    grad_scale = tl.zeros((BLOCK, BLOCK_C), tl.float32)
    grad_shift = tl.zeros((BLOCK, BLOCK_C), tl.float32)
    n_tiles = (n_positions + BLOCK - 1) // BLOCK
    for tile in range(tl.program_id(0), n_tiles, tl.num_programs(0)):
        offset, is_position = positions_of(tile, n_positions, HW, X_N, X_P, BLOCK)
        where = offset[:, None] + (channel * X_C)[None, :]
        inside = is_position[:, None] & is_channel[None, :]
        value = tl.load(x + where, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_out + where, mask=inside, other=0.0).to(tl.float32)
        if RELU:
            grad = tl.where(value * gain + base <= 0, 0.0, grad)  # a NaN passes, as in torch
        grad_scale += grad * value
        grad_shift += grad
        tl.store(grad_x + where, (grad * gain).to(grad_x.dtype.element_ty), mask=inside)
    target = sums + tl.program_id(0) * (2 * n_channels) + channel
    tl.store(target, tl.sum(grad_scale, 0), mask=is_channel)
    tl.store(target + n_channels, tl.sum(grad_shift, 0), mask=is_channel)
