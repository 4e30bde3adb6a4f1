"""The gradients of `windows`: by the filters, and by the convolution's map for who wants those by the images.

The same walk down the cells, each row of the convolution once: its products are computed again where z or the batch
statistics need them, its gradient is gathered from the windows it lies in. The tile's halo is its last column of cells,
whose window also covers the right of the one before.

Gradients of the filters are partial sums per program, added up afterwards: no atomics, the same bits every time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mixpool.ops.fused.packing import load_slices, split_column
from mixpool.ops.fused.patches import load_patch
from mixpool.ops.fused.windows import inverse_weight

SMALLEST = tl.constexpr(2.0**-126)  # rsqrt takes smaller numbers for 0


@triton.jit
def load_upstream(
    grad_out,
    argmax,
    image,
    p,
    q,
    out_channel,
    channel,
    is_output,
    below,
    P: tl.constexpr,
    OUT_N: tl.constexpr,
    OUT_C: tl.constexpr,
    OUT_H: tl.constexpr,
    OUT_W: tl.constexpr,
    ARGMAX_N: tl.constexpr,
    ARGMAX_C: tl.constexpr,
    ARGMAX_H: tl.constexpr,
    ARGMAX_W: tl.constexpr,
    KIND: tl.constexpr,
):
    """Gradients of window (p, q) and, if it shares the row, of the window below, and the places of their maxima."""
    reads_this = (is_output & (p >= 0) & (p < P))[:, None]
    reads_next = (is_output & (below == 1) & (p + 1 < P))[:, None]
    source = (image * OUT_N + p * OUT_H + q * OUT_W)[:, None] + (out_channel * OUT_C)[None, :]
    grad_this = tl.load(grad_out + source, mask=reads_this, other=0.0)
    grad_next = tl.load(grad_out + (source + OUT_H), mask=reads_next, other=0.0)
    place_this, place_next = grad_this, grad_next  # not read
    if KIND == "max":
        source = (image * ARGMAX_N + p * ARGMAX_H + q * ARGMAX_W)[:, None] + (channel * ARGMAX_C)[None, :]
        place_this = tl.load(argmax + source, mask=reads_this, other=9)
        place_next = tl.load(argmax + (source + ARGMAX_H), mask=reads_next, other=9)
    return grad_this, grad_next, place_this, place_next


@triton.jit(do_not_specialize=["n_columns", "n_items"])
def backward(
    x,  # (N, C_in, H, W)
    packed,  # of `packing.pack`
    channels,  # (n,)
    grad_out,  # (N, C_out, P, Q)
    argmax,  # (N, n rounded up, P, Q) int8
    coefficients,  # (2, groups * columns) of `moments.spread`
    grad_conv,  # (N, n or 2 n, CONV_H, CONV_W), written: the gradient of the convolution's map, [re, im]
    grad_packed,  # (programs, groups, DEPTH / BLOCK_K, columns, BLOCK_K), written: partial sums
    n_channels,
    n_columns,
    n_items,  # tiles times strips
    X_N: tl.constexpr,
    X_C: tl.constexpr,
    X_H: tl.constexpr,
    X_W: tl.constexpr,
    OUT_N: tl.constexpr,
    OUT_C: tl.constexpr,
    OUT_H: tl.constexpr,
    OUT_W: tl.constexpr,
    ARGMAX_N: tl.constexpr,
    ARGMAX_C: tl.constexpr,
    ARGMAX_H: tl.constexpr,
    ARGMAX_W: tl.constexpr,
    CONV_N: tl.constexpr,
    CONV_C: tl.constexpr,
    CONV_Y: tl.constexpr,
    CONV_X: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    C_IN: tl.constexpr,
    CONV_H: tl.constexpr,
    CONV_W: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    POOL_PADDING: tl.constexpr,
    KERNEL: tl.constexpr,
    TAPS: tl.constexpr,
    START: tl.constexpr,
    FIRST_P: tl.constexpr,
    END_P: tl.constexpr,
    FIRST_Q: tl.constexpr,
    CELLS_Q: tl.constexpr,
    KIND: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    N_COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr,  # slices of the depth that a program sums up; a divisor of all of them
    BLOCK: tl.constexpr,
    STRIP: tl.constexpr,
    WITH_SUMS: tl.constexpr,  # the statistics have gradients
    WITH_CONV: tl.constexpr,
    WITH_WEIGHT: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Gradients by the matrix and by the convolution's map, from that of the pooled map and of the statistics.

    With g the gradient that reaches a position through the windows it lies in, a and b from the statistics:
    max      dy = g where it is the maximum, + a + b y;       modulus3  dz = (g / |z| + b) z, and 0 where z = 0
    """
    SLICES: tl.constexpr = DEPTH // BLOCK_K
    NEEDS_PRODUCTS: tl.constexpr = (KIND == "modulus3") or WITH_SUMS
    # Whether all columns of all cells lie on the map, so that only rows have to be checked.
    FULL: tl.constexpr = (FIRST_Q == 0) and (2 * CELLS_Q - POOL_PADDING < CONV_W)
    HOISTED: tl.constexpr = (DEPTH <= 256) and (not NEEDS_PRODUCTS) and (not WITH_CONV)
    # Whether gradients are loaded together with the pixels; in NCHW and in chunks there are no registers left for that.
    EARLY: tl.constexpr = (OUT_C == 1) and (CHUNK == SLICES)
    group = tl.program_id(1)
    first_slice = tl.program_id(2) * CHUNK
    channel = group * GROUP + tl.arange(0, GROUP)
    # Channels beyond the last repeat it, for columns that nobody reads.
    out_channel = tl.load(channels + tl.minimum(channel, n_channels - 1)).to(tl.int32)

    of_column, position, part = split_column(tl.arange(0, N_COLUMNS), KIND)
    of_column += group * GROUP
    is_column = of_column < n_channels
    level = coefficients + group * N_COLUMNS + tl.arange(0, N_COLUMNS)
    slope = level + GROUPS * N_COLUMNS
    if NEEDS_PRODUCTS:
        filters = load_slices(packed, group, DEPTH, N_COLUMNS, BLOCK_K)

    lane = tl.arange(0, BLOCK)
    right_lane = tl.broadcast_to(tl.minimum(lane + 1, BLOCK - 1)[:, None], (BLOCK, GROUP))
    STRIPS: tl.constexpr = (END_P - FIRST_P + STRIP - 1) // STRIP
    totals = ()
    for _ in tl.static_range(CHUNK):
        totals = totals + (tl.zeros((N_COLUMNS, BLOCK_K), tl.float32),)

    for item in range(tl.program_id(0), n_items, tl.num_programs(0)):
        p0 = FIRST_P + (item % STRIPS) * STRIP
        flat = (item // STRIPS) * (BLOCK - 1) + lane  # the last lane is the halo
        flat_inside = tl.minimum(flat, n_columns - 1)
        image = flat_inside // CELLS_Q
        q = flat_inside % CELLS_Q + FIRST_Q
        center_column = 2 * q - POOL_PADDING + 1
        is_own = (lane < BLOCK - 1) & (flat < n_columns)
        is_output = (flat < n_columns) & (q >= 0) & (q < Q)
        has_right = (is_own & (q + 1 < Q))[:, None]
        center_inside = is_own & (center_column >= 0) & (center_column < CONV_W)
        right_inside = is_own & (center_column + 1 < CONV_W)
        in_map = tl.where((position == 0)[None, :], center_inside[:, None], right_inside[:, None])
        element = (2 * STRIDE * q + START) * X_W
        patch = (image * X_N + element)[:, None]
        # Far left of the image: the halo's pixels are 0. (A product, whose divisibility the compiler can see.)
        element -= (1 - is_own.to(tl.int32)) * 1073741824

        for i in tl.range(0, 2 * tl.minimum(STRIP, END_P - p0), num_stages=STAGES):
            p = p0 + i // 2
            below = i % 2  # 0 in the centre row of window p, 1 in its bottom row, the top row of window p + 1
            row = 2 * p - POOL_PADDING + 1 + below
            line = STRIDE * row - PADDING
            row_inside = (row >= 0) & (row < CONV_H)

            if EARLY:
                upstream = load_upstream(
                    grad_out, argmax, image, p, q, out_channel, channel, is_output, below, P,
                    OUT_N, OUT_C, OUT_H, OUT_W, ARGMAX_N, ARGMAX_C, ARGMAX_H, ARGMAX_W, KIND,
                )  # fmt: skip
            if NEEDS_PRODUCTS or WITH_WEIGHT:
                offset = patch + line * X_H
                unknown = 0 if HOISTED else (i - n_columns > 1048576).to(tl.int32)  # 0
                first = (element + 16 * unknown)[:, None]
                pixels = ()
                if CHUNK == SLICES:
                    for s in tl.static_range(SLICES):
                        of_slice = load_patch(
                            x, offset, first, line, s + unknown, X_C, X_H, X_W, H, W, C_IN, KERNEL, TAPS, BLOCK_K
                        )
                        pixels = pixels + (of_slice.to(packed.dtype.element_ty),)
            if NEEDS_PRODUCTS:
                products = tl.zeros((BLOCK, N_COLUMNS), tl.float32)
                for s in tl.static_range(SLICES):
                    if CHUNK == SLICES:
                        of_slice = pixels[s]
                    else:
                        of_slice = load_patch(
                            x, offset, first, line, s + unknown, X_C, X_H, X_W, H, W, C_IN, KERNEL, TAPS, BLOCK_K
                        ).to(packed.dtype.element_ty)
                    products = tl.dot(of_slice, filters[s], products, input_precision=PRECISION)

            if not EARLY:
                upstream = load_upstream(
                    grad_out, argmax, image, p, q, out_channel, channel, is_output, below, P,
                    OUT_N, OUT_C, OUT_H, OUT_W, ARGMAX_N, ARGMAX_C, ARGMAX_H, ARGMAX_W, KIND,
                )  # fmt: skip
            grad_this, grad_next, place_this, place_next = upstream
            grad_this = grad_this.to(tl.float32)
            grad_next = grad_next.to(tl.float32)
            if KIND == "max":
                place = 3 * (1 + below)
                of_left = tl.where(place_this == place, grad_this, 0.0) + tl.where(place_next == 0, grad_next, 0.0)
                center = tl.where(place_this == place + 1, grad_this, 0.0) + tl.where(place_next == 1, grad_next, 0.0)
                right = tl.where(place_this == place + 2, grad_this, 0.0) + tl.where(place_next == 2, grad_next, 0.0)
            else:
                grad_this *= inverse_weight(p, q, CONV_H, CONV_W, POOL_PADDING)[:, None]
                grad_next *= inverse_weight(p + 1, q, CONV_H, CONV_W, POOL_PADDING)[:, None]
                of_left = tl.where(below == 0, 2.0 * grad_this, grad_this + grad_next)
                center = 2.0 * of_left
                right = of_left
            right += tl.where(has_right, tl.gather(of_left, right_lane, 0), 0.0)

            if KIND == "max":
                grad = tl.reshape(tl.join(center, right), (BLOCK, N_COLUMNS))
                if WITH_SUMS:
                    grad += tl.load(level)[None, :] + tl.load(slope)[None, :] * products
            else:
                re, im = tl.split(tl.reshape(products, (BLOCK, GROUP // 4, 2, 4, 2)))
                energy = re * re + im * im
                of_modulus = tl.reshape(tl.join(center, right), (BLOCK, GROUP // 4, 4, 2))
                ratio = tl.permute(of_modulus, (0, 1, 3, 2)) * tl.where(energy >= SMALLEST, tl.rsqrt(energy), 0.0)
                factor = tl.reshape(tl.join(ratio, ratio), (BLOCK, N_COLUMNS))
                if WITH_SUMS:
                    factor += tl.load(slope)[None, :]
                grad = factor * products
            if FULL:
                grad = tl.where(row_inside, grad, 0.0)
            else:
                grad = tl.where(in_map & row_inside, grad, 0.0)
            grad = grad.to(packed.dtype.element_ty)

            if WITH_CONV:
                target = (image * CONV_N + row * CONV_Y + center_column * CONV_X)[:, None] + (
                    (of_column + part * n_channels) * CONV_C + position * CONV_X
                )[None, :]
                tl.store(grad_conv + target, grad, mask=in_map & row_inside & is_column[None, :])
            if WITH_WEIGHT:
                if CHUNK != SLICES:
                    for s in tl.static_range(CHUNK):
                        of_slice = load_patch(
                            x, offset, first, line, first_slice + s + unknown,
                            X_C, X_H, X_W, H, W, C_IN, KERNEL, TAPS, BLOCK_K,
                        )  # fmt: skip
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
