"""Batch statistics: from the kernels' partial sums, and their share in the gradient of the convolution's map.

    max       mean and biased variance of y;      modulus  mean 0 and mean(|z|^2) / 2

What one thread sees is added up in float32, threads and programs in float64. Sums of y and y^2 are taken about a pivot,
since about 0 they would lose (mean / std)^2 of their precision.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mixpool.ops.fused.packing import split_column


@triton.jit(do_not_specialize=["n_programs", "count"])  # the batch size compiles nothing anew
def finish(
    sums,  # (programs, 2, width) float64
    channels,  # (n,)
    pivot,  # (C_out,) what the sums of "max" were taken about
    moments,  # (2, C_out), written at `channels`
    n_programs,
    width,
    n_out_channels,
    count,  # positions, over all images
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Mean and variance of one channel per program."""
    channel = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    sum_1 = tl.zeros((BLOCK,), tl.float64)
    sum_2 = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, n_programs, BLOCK):
        source = sums + (first + lane) * (2 * width) + channel
        inside = first + lane < n_programs
        sum_1 += tl.load(source, mask=inside, other=0.0).to(tl.float64)
        sum_2 += tl.load(source + width, mask=inside, other=0.0).to(tl.float64)
    positions = count.to(tl.float64)
    out_channel = tl.load(channels + channel)
    if KIND == "max":
        mean = tl.sum(sum_1, 0) / positions
        var = tl.sum(sum_2, 0) / positions - mean * mean
        var = tl.where(var < 0, 0.0, var)  # a NaN stays
        mean += tl.load(pivot + out_channel).to(tl.float64)
    else:
        mean = tl.sum(sum_1, 0) * 0
        var = tl.sum(sum_2, 0) / positions * 0.5
    tl.store(moments + out_channel, mean.to(tl.float32))
    tl.store(moments + n_out_channels + out_channel, var.to(tl.float32))


@triton.jit
def spread(
    moments,  # (2, C_out) mean and variance
    grad_moments,  # (2, C_out)
    channels,  # (n,)
    coefficients,  # (2, groups * columns), written
    n_channels,
    n_out_channels,
    inverse_count,  # 1 / positions, over all images
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    N_COLUMNS: tl.constexpr,
):
    """(level, slope) of every column: the statistics add level + slope y (slope z) to the gradient of each position."""
    group = tl.program_id(0)
    column = tl.arange(0, N_COLUMNS)
    channel, _, _ = split_column(column, KIND)
    channel += group * GROUP
    inside = channel < n_channels
    out_channel = tl.load(channels + channel, mask=inside, other=0)
    slope = tl.load(grad_moments + n_out_channels + out_channel, mask=inside, other=0.0) * inverse_count
    if KIND == "max":
        mean = tl.load(moments + out_channel, mask=inside, other=0.0)
        slope *= 2.0
        level = tl.load(grad_moments + out_channel, mask=inside, other=0.0) * inverse_count - slope * mean
    else:
        level = tl.zeros((N_COLUMNS,), tl.float32)
    target = coefficients + group * N_COLUMNS + column
    tl.store(target, level)
    tl.store(target + tl.num_programs(0) * N_COLUMNS, slope)
