"""Channels that look at the centre of each pooling window: out = |z|, z = conv(x; W + iV) at the total stride.

A program takes tiles of BLOCK positions, flattened over images, in turn: the filters stay in shared memory. Neither re
nor im is written; the backward pass computes them again.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mixpool.ops.fused.packing import load_slices, split_column
from mixpool.ops.fused.patches import load_patch

SMALLEST = tl.constexpr(2.0**-126)  # rsqrt takes smaller numbers for 0


@triton.jit
def offset_of(
    flat, P: tl.constexpr, Q: tl.constexpr, N_STRIDE: tl.constexpr, P_STRIDE: tl.constexpr, Q_STRIDE: tl.constexpr
):
    """Offset of positions counted over images; without a division where memory counts alike (channels_last)."""
    if (N_STRIDE == P * P_STRIDE) and (P_STRIDE == Q * Q_STRIDE):
        return flat * Q_STRIDE
    return flat // (P * Q) * N_STRIDE + flat % (P * Q) // Q * P_STRIDE + flat % Q * Q_STRIDE


@triton.jit(do_not_specialize=["n_positions"])  # the batch size compiles nothing anew
def forward(
    x,  # (N, C_in, H, W)
    packed,  # of `packing.pack`
    channels,  # (n,) places of the kind's channels among all
    out,  # (N, C_out, P, Q); the kind's channels are written
    sums,  # (programs, 2, groups * GROUP): sums of nothing and of |z|^2
    n_channels,
    n_positions,  # N P Q
    X_N: tl.constexpr,
    X_C: tl.constexpr,
    X_H: tl.constexpr,
    X_W: tl.constexpr,
    OUT_N: tl.constexpr,
    OUT_C: tl.constexpr,
    OUT_H: tl.constexpr,
    OUT_W: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    C_IN: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    POOL_PADDING: tl.constexpr,
    KERNEL: tl.constexpr,
    TAPS: tl.constexpr,
    START: tl.constexpr,
    KIND: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,  # channels of a program
    EVEN: tl.constexpr,  # whether all programs have all of theirs
    IDENTITY: tl.constexpr,  # whether the kind has all channels, so that they lie side by side
    N_COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK: tl.constexpr,
    WITH_SUMS: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    group = tl.program_id(1)
    channel = group * GROUP + tl.arange(0, GROUP)
    is_channel = channel < n_channels
    out_channel = channel if IDENTITY else tl.load(channels + channel, mask=is_channel, other=0).to(tl.int32)
    if WITH_SUMS:
        sum_2 = tl.zeros((BLOCK, GROUP), tl.float32)
    filters = load_slices(packed, group, DEPTH, N_COLUMNS, BLOCK_K)

    n_tiles = (n_positions + BLOCK - 1) // BLOCK
    for tile in tl.range(tl.program_id(0), n_tiles, tl.num_programs(0), num_stages=STAGES):
        flat = tile * BLOCK + tl.arange(0, BLOCK)
        is_position = (flat < n_positions)[:, None]
        flat = tl.minimum(flat, n_positions - 1)
        image = flat // (P * Q)
        p = flat % (P * Q) // Q
        q = flat % Q
        line = ((2 * p + 1 - POOL_PADDING) * STRIDE - PADDING)[:, None]
        element = ((2 * STRIDE * q + START) * X_W)[:, None]
        patch = (image * X_N)[:, None] + line * X_H + element
        products = tl.zeros((BLOCK, N_COLUMNS), tl.float32)
        for s in tl.static_range(DEPTH // BLOCK_K):
            pixels = load_patch(x, patch, element, line, s, X_C, X_H, X_W, H, W, C_IN, KERNEL, TAPS, BLOCK_K)
            products = tl.dot(pixels.to(packed.dtype.element_ty), filters[s], products, input_precision=PRECISION)
        re, im = tl.split(tl.reshape(products, (BLOCK, GROUP, 2)))
        energy = re * re + im * im
        if WITH_SUMS:
            sum_2 += tl.where(is_position, energy, 0.0)
        pooled = tl.sqrt(energy)
        target = offset_of(flat, P, Q, OUT_N, OUT_H, OUT_W)[:, None] + (out_channel * OUT_C)[None, :]
        is_written = is_position if EVEN else is_position & is_channel[None, :]
        tl.store(out + target, pooled.to(out.dtype.element_ty), mask=is_written)

    if WITH_SUMS:
        target = sums + tl.program_id(0) * (2 * GROUPS * GROUP) + channel
        tl.store(target, tl.zeros((GROUP,), tl.float64))
        tl.store(target + GROUPS * GROUP, tl.sum(sum_2.to(tl.float64), 0))


@triton.jit(do_not_specialize=["n_positions"])
def backward(
    x,  # (N, C_in, H, W)
    packed,  # of `packing.pack`
    channels,  # (n,)
    grad_out,  # (N, C_out, P, Q)
    coefficients,  # (2, groups * columns) of `moments.spread`
    grad_conv,  # (N, 2 n, P, Q), written: the gradients of re and im
    grad_packed,  # (programs, groups, DEPTH / BLOCK_K, columns, BLOCK_K), written: partial sums
    n_channels,
    n_positions,
    X_N: tl.constexpr,
    X_C: tl.constexpr,
    X_H: tl.constexpr,
    X_W: tl.constexpr,
    OUT_N: tl.constexpr,
    OUT_C: tl.constexpr,
    OUT_H: tl.constexpr,
    OUT_W: tl.constexpr,
    CONV_N: tl.constexpr,
    CONV_C: tl.constexpr,
    CONV_Y: tl.constexpr,
    CONV_X: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    C_IN: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    POOL_PADDING: tl.constexpr,
    KERNEL: tl.constexpr,
    TAPS: tl.constexpr,
    START: tl.constexpr,
    KIND: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    N_COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr,  # slices of the depth that a program sums up; a divisor of all of them
    BLOCK: tl.constexpr,
    WITH_SUMS: tl.constexpr,  # the statistics have gradients
    WITH_CONV: tl.constexpr,
    WITH_WEIGHT: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dz = (g / |z| + b) z, and 0 where z = 0, with g the gradient of the pooled map and b from the statistics."""
    SLICES: tl.constexpr = DEPTH // BLOCK_K
    group = tl.program_id(1)
    first_slice = tl.program_id(2) * CHUNK
    channel = group * GROUP + tl.arange(0, GROUP)
    # Channels beyond the last repeat it, for columns that nobody reads.
    out_channel = tl.load(channels + tl.minimum(channel, n_channels - 1)).to(tl.int32)
    of_column, position, part = split_column(tl.arange(0, N_COLUMNS), KIND)
    of_column += group * GROUP
    is_column = of_column < n_channels
    slope = coefficients + (GROUPS + group) * N_COLUMNS + tl.arange(0, N_COLUMNS)
    filters = load_slices(packed, group, DEPTH, N_COLUMNS, BLOCK_K)
    totals = ()
    for _ in tl.static_range(CHUNK):
        totals = totals + (tl.zeros((N_COLUMNS, BLOCK_K), tl.float32),)

    n_tiles = (n_positions + BLOCK - 1) // BLOCK
    for tile in tl.range(tl.program_id(0), n_tiles, tl.num_programs(0), num_stages=STAGES):
        flat = tile * BLOCK + tl.arange(0, BLOCK)
        is_position = (flat < n_positions)[:, None]
        flat = tl.minimum(flat, n_positions - 1)
        image = flat // (P * Q)
        p = flat % (P * Q) // Q
        q = flat % Q
        line = ((2 * p + 1 - POOL_PADDING) * STRIDE - PADDING)[:, None]
        element = ((2 * STRIDE * q + START) * X_W)[:, None]
        patch = (image * X_N)[:, None] + line * X_H + element
        products = tl.zeros((BLOCK, N_COLUMNS), tl.float32)
        pixels = ()
        for s in tl.static_range(SLICES):
            of_slice = load_patch(x, patch, element, line, s, X_C, X_H, X_W, H, W, C_IN, KERNEL, TAPS, BLOCK_K)
            of_slice = of_slice.to(packed.dtype.element_ty)
            products = tl.dot(of_slice, filters[s], products, input_precision=PRECISION)
            if CHUNK == SLICES:
                pixels = pixels + (of_slice,)

        source = offset_of(flat, P, Q, OUT_N, OUT_H, OUT_W)[:, None] + (out_channel * OUT_C)[None, :]
        of_modulus = tl.load(grad_out + source, mask=is_position, other=0.0).to(tl.float32)
        re, im = tl.split(tl.reshape(products, (BLOCK, GROUP, 2)))
        energy = re * re + im * im
        ratio = of_modulus * tl.where(energy >= SMALLEST, tl.rsqrt(energy), 0.0)
        factor = tl.reshape(tl.join(ratio, ratio), (BLOCK, N_COLUMNS))
        if WITH_SUMS:
            factor += tl.load(slope)[None, :]
        grad = tl.where(is_position, factor * products, 0.0).to(packed.dtype.element_ty)

        if WITH_CONV:
            target = (
                offset_of(flat, P, Q, CONV_N, CONV_Y, CONV_X)[:, None]
                + ((of_column + part * n_channels) * CONV_C)[None, :]
            )
            tl.store(grad_conv + target, grad, mask=is_position & is_column[None, :])
        if WITH_WEIGHT:
            if CHUNK != SLICES:
                for s in tl.static_range(CHUNK):
                    of_slice = load_patch(
                        x, patch, element, line, first_slice + s, X_C, X_H, X_W, H, W, C_IN, KERNEL, TAPS, BLOCK_K
                    )
                    pixels = pixels + (of_slice.to(packed.dtype.element_ty),)
            transposed = tl.trans(grad)
            new_totals = ()
            for s in tl.static_range(CHUNK):
                new_totals = new_totals + (tl.dot(transposed, pixels[s], totals[s], input_precision=PRECISION),)
            totals = new_totals

    if WITH_WEIGHT:
        target = ((tl.program_id(0) * GROUPS + group) * SLICES + first_slice) * (N_COLUMNS * BLOCK_K)
        within = tl.arange(0, N_COLUMNS)[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
        for s in tl.static_range(CHUNK):
            tl.store(grad_packed + target + s * (N_COLUMNS * BLOCK_K) + within, totals[s])
