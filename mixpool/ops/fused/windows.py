"""Channels that look at a whole pooling window: the maximum of a convolution, or the binomial mean of its modulus.

    max       max over the window of y,                    y = conv(x; W)
    modulus3  sum of w |z| over the window / sum of w,     z = conv(x; W + iV), w = [1 2 1] x [1 2 1]

The convolution's map, four to eight times the output, is never written. A program takes BLOCK - 1 neighbouring columns
of cells and one more on the left as a halo, and walks down the convolution's rows; what a row means for the window is
carried in registers, so each row is computed once. One matrix product per row gives both positions of a cell that lie
in it, centre and right; the third of the window, left, is the neighbour's right.

For the backward pass (`windows_backward`) nothing of the map is kept but a maximum's place in its window, in a byte.

Where the pixels of a patch lie does not depend on the row, so the compiler would compute it once for the whole walk and
keep it, in some hundred registers. To `unknown`, a zero that it cannot see through, it has to be added in every row.

Legend: rows of a tile are columns of cells, flattened over images: (n, q). Row i of the walk is the convolution's row
2 p0 - pad + i: top row of the first window, then centre and bottom of each, a bottom row being the next one's top.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mixpool.ops.fused.packing import load_slices
from mixpool.ops.fused.patches import load_patch

NAN = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit
def energies(products, ROWS: tl.constexpr, C: tl.constexpr):
    """(centre, right) of |z|^2, (ROWS, C) each, from the columns as `packing` orders them."""
    re, im = tl.split(tl.reshape(products, (ROWS, C // 4, 2, 4, 2)))
    energy = tl.permute(re * re + im * im, (0, 1, 3, 2))
    return tl.split(tl.reshape(energy, (ROWS, C, 2)))


@triton.jit
def pair_sums(values, ROWS: tl.constexpr, C: tl.constexpr):
    """(ROWS / 16, 8, C): sums of rows that lie 8 apart, which one thread holds after a matrix product."""
    return tl.sum(tl.reshape(values, (ROWS // 16, 2, 8, C)), 1)


@triton.jit(do_not_specialize=["n_columns"])  # the batch size compiles nothing anew
def forward(
    x,  # (N, C_in, H, W)
    packed,  # of `packing.pack`
    channels,  # (n,) places of the kind's channels among all
    out,  # (N, C_out, P, Q); the kind's channels are written
    argmax,  # (N, n rounded up, P, Q) int8: 3 row + column of the maximum in its window, the first one in that order
    pivot,  # (C_out,) about which sums of y are taken
    sums,  # (programs, 2, groups * GROUP): sums of y and y^2 (of nothing and |z|^2) over the cells of the program
    n_channels,
    n_columns,  # images times CELLS_Q
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
    FIRST_P: tl.constexpr,  # cells along rows: FIRST_P to END_P - 1
    END_P: tl.constexpr,
    FIRST_Q: tl.constexpr,
    CELLS_Q: tl.constexpr,
    KIND: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,  # channels of a program
    EVEN: tl.constexpr,  # whether all programs have all of theirs
    IDENTITY: tl.constexpr,  # whether the kind has all channels, so that they lie side by side
    N_COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK: tl.constexpr,  # rows of a tile
    STRIP: tl.constexpr,  # cells that a program walks down
    WITH_ARGMAX: tl.constexpr,
    WITH_SUMS: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    # Inference over short patches has these registers, unless a blurred modulus has to check the left border too.
    IS_SHORT: tl.constexpr = (DEPTH <= 256) and (not WITH_ARGMAX) and (not WITH_SUMS)
    HOISTED: tl.constexpr = IS_SHORT and (KIND == "max" or POOL_PADDING == 1)
    group = tl.program_id(0) % GROUPS
    tile = tl.program_id(0) // GROUPS
    channel = group * GROUP + tl.arange(0, GROUP)
    is_channel = channel < n_channels
    out_channel = channel if IDENTITY else tl.load(channels + channel, mask=is_channel, other=0).to(tl.int32)
    filters = load_slices(packed, group, DEPTH, N_COLUMNS, BLOCK_K)

    lane = tl.arange(0, BLOCK)
    flat = tile * (BLOCK - 1) - 1 + lane  # lane 0 is the halo
    flat_inside = tl.minimum(tl.maximum(flat, 0), n_columns - 1)
    image = flat_inside // CELLS_Q
    q = flat_inside % CELLS_Q + FIRST_Q
    center_column = 2 * q - POOL_PADDING + 1
    left_inside = (center_column >= 1)[:, None]
    center_inside = ((center_column >= 0) & (center_column < CONV_W))[:, None]
    right_inside = (center_column + 1 < CONV_W)[:, None]
    is_own = (lane >= 1) & (flat < n_columns)
    is_output = is_own & (q >= 0) & (q < Q)
    left_lane = tl.broadcast_to(tl.maximum(lane - 1, 0)[:, None], (BLOCK, GROUP))
    element = (2 * STRIDE * q + START) * X_W
    patch = (image * X_N + element)[:, None]

    # The two columns of a cell are carried apart: lanes exchange values once per window, not once per row.
    EMPTY = float("-inf") if KIND == "max" else 0.0
    carry_center = tl.full((BLOCK, GROUP), EMPTY, tl.float32)
    carry_right = tl.full((BLOCK, GROUP), EMPTY, tl.float32)
    if WITH_ARGMAX:  # rows of the carried maxima in their window: that of the centre + 4 times that of the right
        rows = tl.zeros((BLOCK, GROUP), tl.int32)
    if WITH_SUMS:
        sum_1 = tl.zeros((BLOCK // 16, 8, GROUP), tl.float32)
        sum_2 = tl.zeros((BLOCK // 16, 8, GROUP), tl.float32)
        middle = tl.load(pivot + out_channel, mask=is_channel, other=0.0)[None, :] if KIND == "max" else 0.0

    p0 = FIRST_P + tl.program_id(1) * STRIP
    for i in tl.range(0, 1 + 2 * tl.minimum(STRIP, END_P - p0), num_stages=STAGES):
        row = 2 * p0 - POOL_PADDING + i
        row_inside = (row >= 0) & (row < CONV_H)
        line = STRIDE * row - PADDING
        unknown = 0 if HOISTED else (i - n_columns > 1048576).to(tl.int32)  # 0
        first = (element + 16 * unknown)[:, None]
        products = tl.zeros((BLOCK, N_COLUMNS), tl.float32)
        for s in tl.static_range(DEPTH // BLOCK_K):
            pixels = load_patch(
                x, patch + line * X_H, first, line, s + unknown, X_C, X_H, X_W, H, W, C_IN, KERNEL, TAPS, BLOCK_K
            )
            products = tl.dot(pixels.to(packed.dtype.element_ty), filters[s], products, input_precision=PRECISION)
        if KIND == "max":
            center, right = tl.split(tl.reshape(products, (BLOCK, GROUP, 2)))
        else:
            center, right = energies(products, BLOCK, GROUP)

        if WITH_SUMS:  # the top row of the walk belongs to the cells above
            counts = is_own[:, None] & row_inside & (i > 0)
            center_counted = tl.where(counts & center_inside, center - middle, 0.0)
            right_counted = tl.where(counts & right_inside, right - middle, 0.0)
            if KIND == "max":
                sum_1 += pair_sums(center_counted + right_counted, BLOCK, GROUP)
                sum_2 += pair_sums(center_counted * center_counted + right_counted * right_counted, BLOCK, GROUP)
            else:
                sum_2 += pair_sums(center_counted + right_counted, BLOCK, GROUP)

        is_bottom = i % 2 == 0
        if KIND == "max":
            center = tl.where(row_inside, center, EMPTY)
            right = tl.where(row_inside, right, EMPTY)
            if WITH_ARGMAX:
                this_row = tl.where(is_bottom, 2, 1)
                rows = tl.where(center > carry_center, (rows & 12) | this_row, rows)
                rows = tl.where(right > carry_right, (rows & 3) | (4 * this_row), rows)
            carry_center = tl.maximum(carry_center, center, propagate_nan=NAN)
            carry_right = tl.maximum(carry_right, right, propagate_nan=NAN)
        else:
            center = tl.where(row_inside, tl.sqrt(center), EMPTY)
            right = tl.where(row_inside, tl.sqrt(right), EMPTY)
            weight = tl.where(is_bottom, 1.0, 2.0)
            carry_center += weight * center
            carry_right += weight * right

        if is_bottom:
            p = p0 + i // 2 - 1
            if (i > 0) & (p >= 0) & (p < P):
                carry_left = tl.where(left_inside, tl.gather(carry_right, left_lane, 0), EMPTY)
                at_center = tl.where(center_inside, carry_center, EMPTY)
                at_right = tl.where(right_inside, carry_right, EMPTY)
                if KIND == "max":
                    pooled = tl.maximum(carry_left, at_center, propagate_nan=NAN)
                    if WITH_ARGMAX:
                        place = 3 * (tl.gather(rows, left_lane, 0) >> 2)
                        other = 3 * (rows & 3) + 1
                        is_other = (at_center > carry_left) | ((at_center == carry_left) & (other < place))
                        place = tl.where(is_other, other, place)
                        other = 3 * (rows >> 2) + 2
                        is_other = (at_right > pooled) | ((at_right == pooled) & (other < place))
                        place = tl.where(is_other, other, place)
                    pooled = tl.maximum(pooled, at_right, propagate_nan=NAN)
                else:
                    pooled = carry_left + 2.0 * at_center + at_right
                    pooled = pooled * inverse_weight(p, q, CONV_H, CONV_W, POOL_PADDING)[:, None]
                is_written = is_output[:, None] if EVEN else is_output[:, None] & is_channel[None, :]
                target = (image * OUT_N + p * OUT_H + q * OUT_W)[:, None] + (out_channel * OUT_C)[None, :]
                tl.store(out + target, pooled.to(out.dtype.element_ty), mask=is_written)
                if WITH_ARGMAX:
                    target = (image * ARGMAX_N + p * ARGMAX_H + q * ARGMAX_W)[:, None] + (channel * ARGMAX_C)[None, :]
                    tl.store(argmax + target, place.to(tl.int8), mask=is_written)
            carry_center = center
            carry_right = right
            if WITH_ARGMAX:
                rows = tl.zeros((BLOCK, GROUP), tl.int32)

    if WITH_SUMS:
        target = sums + (tile * tl.num_programs(1) + tl.program_id(1)) * (2 * GROUPS * GROUP) + channel
        tl.store(target, tl.sum(tl.sum(sum_1.to(tl.float64), 0), 0))
        tl.store(target + GROUPS * GROUP, tl.sum(tl.sum(sum_2.to(tl.float64), 0), 0))


@triton.jit
def inverse_weight(p, q, CONV_H: tl.constexpr, CONV_W: tl.constexpr, POOL_PADDING: tl.constexpr):
    """1 / the sum of the binomial weights of window (p, q) that lie on the map."""
    return 1.0 / (axis_weight(p, CONV_H, POOL_PADDING) * axis_weight(q, CONV_W, POOL_PADDING))


@triton.jit
def axis_weight(p, LENGTH: tl.constexpr, POOL_PADDING: tl.constexpr):
    """The sum of [1 2 1] over the positions of a window that lie on the map, along an axis; at least 1."""
    center = 2 * p - POOL_PADDING + 1
    weight = tl.where((center >= 0) & (center < LENGTH), 2, 0)
    weight += tl.where((center >= 1) & (center <= LENGTH), 1, 0)
    weight += tl.where((center >= -1) & (center < LENGTH - 1), 1, 0)
    return tl.maximum(weight, 1).to(tl.float32)
