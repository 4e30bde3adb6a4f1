"""The reference's `convolve_and_pool` with the fused operator in the place of the poolings that have a kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mixpool.ops import reference
from mixpool.ops.fused import ops
from mixpool.ops.fused.geometry import Channels, StemGeometry
from mixpool.ops.geometry import ConvGeometry, PoolGeometry
from mixpool.ops.merge import affine
from mixpool.ops.modes import compute_dtype
from mixpool.ops.moments import Moments
from mixpool.ops.reference import POOLINGS, Group, Pooled


def convolve_and_pool(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_imag: Tensor | None,
    groups: Sequence[Group],
    conv: ConvGeometry,
    pool: PoolGeometry,
    *,
    with_moments: bool = False,
) -> list[Pooled]:
    """As `reference.convolve_and_pool`, on calls that `backend` lets pass; group by group."""
    parts, first_imag = [], 0
    for group in groups:
        entry, imag = POOLINGS[group.pooling], None
        if entry.is_complex:
            imag = weight_imag[first_imag : first_imag + len(group.index)]
            first_imag += len(group.index)
        if entry.kernel is None:
            options = {"with_moments": with_moments}
            parts += reference.convolve_and_pool(x, weight, bias, imag, [group], conv, pool, **options)
        else:
            parts.append(_by_kernel(x, weight, bias, imag, group, conv, pool, with_moments))
    return parts


def _by_kernel(x, weight, bias, weight_imag, group, conv, pool, with_moments) -> Pooled:
    entry = POOLINGS[group.pooling]
    own = weight.index_select(0, group.index)
    places = torch.arange(len(group.index), device=group.index.device)
    channels = Channels(places[:0], places) if entry.is_complex else Channels(places, places[:0])
    pooled, moments = ops.convolve_and_pool(
        x,
        own,
        weight_imag,
        channels,
        conv,
        pool,
        blur=1 if entry.kernel == "modulus1" else 3,
        with_moments=with_moments,
        dtype=compute_dtype(x),
    )
    own_bias = None if bias is None or entry.is_complex else bias.index_select(0, group.index)
    if own_bias is not None:
        pooled = affine(pooled, None, own_bias)
    if moments is None:
        return Pooled(pooled, None)
    count = len(x) * StemGeometry.of(x, own, conv, pool).positions(entry.kernel)
    # As the reference has them, to the last detail, since another process may be on it (its part of a batch may be
    # empty): the mean of a modulus has no gradient.
    mean = moments[0].detach() if entry.is_complex else moments[0] if own_bias is None else moments[0] + own_bias
    return Pooled(pooled, Moments(mean, moments[1], count))
