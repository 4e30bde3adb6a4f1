"""The modulus channels by the fused operator, the maxima by the reference: for max_blur=3, which has no kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from mixpool.ops import reference
from mixpool.ops.fused import ops
from mixpool.ops.fused.geometry import StemGeometry
from mixpool.ops.geometry import ConvGeometry, PoolGeometry
from mixpool.ops.moments import Moments
from mixpool.ops.reference import Channels, Pooled


def convolve_and_pool(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_imag: Tensor,
    channels: Channels,
    conv: ConvGeometry,
    pool: PoolGeometry,
    *,
    blur: int,
    max_blur: int,
    with_moments: bool = False,
    dtype: torch.dtype | None = None,
) -> Pooled:
    """`reference.convolve_and_pool` for channels of both kinds; `dtype` is that of the fused operator's output."""
    none = channels.max[:0]
    options = {"max_blur": max_blur, "with_moments": with_moments}
    maxima = reference.convolve_and_pool(x, weight, bias, None, Channels(channels.max, none), conv, pool, **options)
    own = weight.index_select(0, channels.modulus)
    places = torch.arange(len(channels.modulus), device=channels.modulus.device)
    options = {"blur": blur, "with_moments": with_moments, "dtype": dtype}
    pooled, moments = ops.convolve_and_pool(x, own, weight_imag, Channels(none, places), conv, pool, **options)
    if moments is not None:
        geometry = StemGeometry.of(x, own, conv, pool)
        # as the reference has them: the mean of the modulus has no gradient
        moments = Moments(moments[0].detach(), moments[1], len(x) * geometry.positions(f"modulus{blur}"))
    return Pooled(maxima.max, pooled, maxima.max_moments, moments)
