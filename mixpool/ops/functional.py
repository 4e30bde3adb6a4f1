"""`mixpool2d`, and the one pass behind it and behind the stem: convolution, pooling, affine step, activation, merge."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mixpool.filters.partner import analytic_partner
from mixpool.filters.spectrum import pair
from mixpool.ops.backend import Call, takes_fused
from mixpool.ops.fused import groups as fused
from mixpool.ops.geometry import ConvGeometry, PoolGeometry, check_pool, memory_format_of
from mixpool.ops.merge import activate_and_merge, affine
from mixpool.ops.modes import is_compiled_for_one_size, is_eager, needs_gradient
from mixpool.ops.reference import (
    POOLINGS,
    Group,
    Pooled,
    check_poolings,
    convolve_and_pool,
    groups_of,
)
from mixpool.ops.renamed import name_for_each, refuse_old

MAX_PARTS = 4  # of a batch in a compiled graph, which holds the operators of each
MAP_BYTES = 24 * 2**20  # of a convolution's map that is computed at a time, on a CPU and without gradients


def mixed_pool(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_imag: Tensor | None,
    groups: Sequence[Group],
    conv: ConvGeometry,
    pool: PoolGeometry,
    *,
    normalize: Callable[[list[Pooled]], list[Tensor]],
    act: Callable[[Tensor], Tensor],
    backend: str,
    with_moments: bool = False,
    needs_grad: bool = True,
) -> Tensor:
    """The pass over some channels, each by its pooling; arguments as for `reference.convolve_and_pool`, and

    normalize: the affine step of pooled groups, before the activation.
    act: elementwise non-decreasing function.
    backend: "auto", "reference" or "fused"; needs_grad tells the choice whether a backward pass will come.
    """
    if takes_fused(backend, Call(x, weight, groups, conv, pool, needs_grad)):
        parts = fused.convolve_and_pool(x, weight, bias, weight_imag, groups, conv, pool, with_moments=with_moments)
    else:
        count = None if needs_grad or with_moments else _images_at_a_time(x, groups, conv)
        options = {"with_moments": with_moments, "images_at_a_time": count}
        parts = convolve_and_pool(x, weight, bias, weight_imag, groups, conv, pool, **options)
    return activate_and_merge(normalize(parts), groups, act, pool, memory_format_of(x))


def _images_at_a_time(x: Tensor, groups: Sequence[Group], conv: ConvGeometry) -> int | None:
    """How many images' maps take less than the 32 MiB from which glibc takes memory anew, page by page; None for all.

    New pages take as long as half of the stem. (A backward pass gains nothing from parts.) Real poolings alone stay
    whole, to repeat the stock convolution bit by bit.
    """
    if x.device.type != "cpu" or not (is_eager() or is_compiled_for_one_size(x)):
        return None
    is_complex = [POOLINGS[group.pooling].is_complex for group in groups]
    filters = sum(len(group.index) * (1 + flag) for group, flag in zip(groups, is_complex, strict=True))
    positions = (x.shape[2] // conv.stride[0]) * (x.shape[3] // conv.stride[1])
    count = max(1, MAP_BYTES // max(1, filters * positions * x.element_size()))
    if not any(is_complex) or (not is_eager() and len(x) > MAX_PARTS * count):
        return None
    return count


def mixpool2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    pooling: str | Sequence[str] = "modulus",
    weight_imag: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    act: Callable[[Tensor], Tensor] = F.relu,
    conv_stride: int | Sequence[int] = 1,
    conv_padding: int | Sequence[int] = 0,
    conv_dilation: int | Sequence[int] = 1,
    pool_size: int | Sequence[int] = 3,
    pool_stride: int | Sequence[int] = 2,
    pool_padding: int | Sequence[int] = 0,
    ceil_mode: bool = False,
    backend: str = "auto",
    **old: Any,
) -> Tensor:
    """Convolve, then pool each channel by its maximum or by the modulus of its complex convolution.

    With a = scale, b = scale * bias + shift, z = conv(x; W + iV) and windows as `nn.MaxPool2d` has them:

        "max"       act(max over the window of (a conv(x; W) + b))
        "blurpool"  the same at every position, then a binomial mean at the pooling's stride, as BlurPool does
        "modulus"   act(|a| mean over the window of |z| + b)
        "energy"    act(|a| root of the mean over the window of |z|^2 + b)
        "cmod"      act(|a| |z| at the window's centre + b)

    The window's mean has the weights [1 2 1] x [1 2 1] ([1 1] x [1 1] on windows of 2), scaled up at the border so
    that they sum to 1. Modulus and root have derivative 0 at 0.

    Args:
        x: images, (N, C_in, H, W), any float dtype, any strides; N may be 0.
        weight: W, (C_out, C_in, kH, kW).
        bias: (C_out,) of the convolution.
        pooling: a name for all channels, or C_out names.
        weight_imag: V, shape of `weight` (rows of "max" and "blurpool" are not read); default
            `analytic_partner(weight)`.
        scale, shift: (C_out,) of the affine step, as a normalisation layer gives them; default 1 and 0.
        act: elementwise non-decreasing function.
        conv_stride, conv_padding, conv_dilation: as `nn.Conv2d`, in pixels.
        pool_size, pool_stride, pool_padding, ceil_mode: as `nn.MaxPool2d`; the size is 2 or 3.
        backend: "auto", "reference" (plain PyTorch) or "fused" (Triton, raises where it cannot run). "auto" leaves it
            to the environment variable MIXPOOL_BACKEND, if set, and is the reference without it.
    Returns:
        (N, C_out, H_out, W_out), size as `nn.MaxPool2d` after `nn.Conv2d`, memory format of `x`, dtype of the
        convolution.
    Raises:
        ValueError: a size or an option does not fit; the message shows what was expected and what came.
        RuntimeError: the fused path was asked for by name and cannot run; the message says why.
    Reference: Leterme et al., From CNNs to Shift-Invariant Twin Models Based on Complex Wavelets, arXiv 2212.00394
        ("cmod"); Zhang 2019, arXiv 1904.11486 ("blurpool").
    Example:
        >>> x, weight = torch.randn(2, 3, 32, 32), torch.randn(4, 3, 7, 7)
        >>> out = mixpool2d(x, weight, pooling=["modulus", "max"] * 2, conv_stride=2, conv_padding=3)
        >>> tuple(out.shape)
        (2, 4, 7, 7)
    """
    refuse_old("mixpool2d", old, max_blur=name_for_each)
    if x.ndim != 4 or weight.ndim != 4 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"expected x (N, C, H, W) and weight (C_out, C, kH, kW), got {x.shape=} and {weight.shape=}")
    groups = groups_of(check_poolings(pooling, len(weight)), weight.device)
    if weight_imag is not None and weight_imag.shape != weight.shape:
        raise ValueError(f"expected weight_imag of the shape of weight, got {weight_imag.shape=} and {weight.shape=}")
    for name, vector in {"bias": bias, "scale": scale, "shift": shift}.items():
        if vector is not None and vector.shape != weight.shape[:1]:
            raise ValueError(f"expected {name} of shape {tuple(weight.shape[:1])}, got {tuple(vector.shape)}")
    conv = ConvGeometry(pair(conv_stride), pair(conv_padding), pair(conv_dilation))
    pool = check_pool(PoolGeometry(pair(pool_size), pair(pool_stride), pair(pool_padding), bool(ceil_mode)))

    if scale is not None:
        sign = torch.where(scale < 0, -1.0, 1.0).to(weight.dtype)
        weight = weight * sign[:, None, None, None]
        bias = None if bias is None else bias * sign
        weight_imag = None if weight_imag is None else weight_imag * sign[:, None, None, None]
        scale = scale.abs()
    imag = None
    complex_indices = [group.index for group in groups if POOLINGS[group.pooling].is_complex]
    if complex_indices:
        index = torch.cat(complex_indices)
        own = weight if weight_imag is None else weight_imag
        imag = own.index_select(0, index)
        imag = analytic_partner(imag) if weight_imag is None else imag

    def normalize(parts: list[Pooled]) -> list[Tensor]:
        out = []
        for (values, _), group in zip(parts, groups, strict=True):
            own_scale, own_shift, own_bias = (
                None if v is None else v.index_select(0, group.index) for v in (scale, shift, bias)
            )
            if POOLINGS[group.pooling].is_complex:  # real channels hold it already
                values = affine(values, None, own_bias)
            out.append(affine(values, own_scale, own_shift))
        return out

    return mixed_pool(
        x,
        weight,
        bias,
        imag,
        groups,
        conv,
        pool,
        normalize=normalize,
        act=act,
        backend=backend,
        needs_grad=needs_gradient(x, weight, imag, bias, scale, shift),
    )
