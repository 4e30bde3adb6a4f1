"""`mixpool2d`: convolution, affine step, activation and mixed pooling as one function of tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mixpool.filters.partner import analytic_partner
from mixpool.filters.spectrum import pair
from mixpool.ops.backend import Call, compute_dtype, needs_gradient, takes_fused
from mixpool.ops.fused import halves, ops
from mixpool.ops.geometry import ConvGeometry, PoolGeometry
from mixpool.ops.reference import Channels, activate_and_merge, affine, convolve_and_pool


def mixpool2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    is_modulus: Sequence[bool],
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
    blur: int = 3,
    max_blur: int = 1,
    backend: str = "auto",
) -> Tensor:
    """Convolve, then pool each channel by its maximum or by the modulus of its complex convolution.

    With a = scale, b = scale * bias + shift and windows as `nn.MaxPool2d` has them:

        max channels      act(max over the window of (a conv(x; W) + b))
        modulus channels  act(|a| mean over the window of |conv(x; W + iV)| + b)

    `blur=3` weights the window's mean by [1 2 1] x [1 2 1] ([1 1] x [1 1] on windows of 2), scaled up at the border
    so that the weights sum to 1; `blur=1` takes the window's centre alone. `max_blur=3` takes the maxima at every
    position and then a binomial mean of act, as BlurPool does. The modulus has derivative 0 at 0.

    Args:
        x: images, (N, C_in, H, W), any float dtype, any strides; N may be 0.
        weight: W, (C_out, C_in, kH, kW).
        bias: (C_out,) of the convolution.
        is_modulus: C_out booleans, True where the channel takes the modulus.
        weight_imag: V, shape of `weight` (rows of max channels are not read); default `analytic_partner(weight)`.
        scale, shift: (C_out,) of the affine step, as a normalisation layer gives them; default 1 and 0.
        act: elementwise non-decreasing function.
        conv_stride, conv_padding, conv_dilation: as `nn.Conv2d`, in pixels.
        pool_size, pool_stride, pool_padding, ceil_mode: as `nn.MaxPool2d`; the size is 2 or 3.
        blur, max_blur: 1 or 3.
        backend: "auto": the fused path where it can run and was measured to be faster, and the reference elsewhere;
            "reference" or "fused" by name. "auto" leaves it to the environment variable MIXPOOL_BACKEND, if set.
    Returns:
        (N, C_out, H_out, W_out), size as `nn.MaxPool2d` after `nn.Conv2d`, memory format of `x`, dtype of the
        convolution.
    Raises:
        ValueError: a size or an option does not fit; the message shows what was expected and what came.
        RuntimeError: the fused path was asked for by name and cannot run; the message says why.
    Reference: Leterme et al., From CNNs to Shift-Invariant Twin Models Based on Complex Wavelets, arXiv 2212.00394
        (CMod, blur=1); Zhang 2019, arXiv 1904.11486 (max_blur=3).
    Example:
        >>> x, weight = torch.randn(2, 3, 32, 32), torch.randn(4, 3, 7, 7)
        >>> out = mixpool2d(x, weight, is_modulus=[True, False, True, False], conv_stride=2, conv_padding=3)
        >>> tuple(out.shape)
        (2, 4, 7, 7)
    """
    if x.ndim != 4 or weight.ndim != 4 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"expected x (N, C, H, W) and weight (C_out, C, kH, kW), got {x.shape=} and {weight.shape=}")
    is_modulus = [bool(flag) for flag in is_modulus]
    if len(is_modulus) != len(weight):
        raise ValueError(f"expected {len(weight)} booleans in is_modulus, one per channel, got {len(is_modulus)}")
    if weight_imag is not None and weight_imag.shape != weight.shape:
        raise ValueError(f"expected weight_imag of the shape of weight, got {weight_imag.shape=} and {weight.shape=}")
    for name, vector in {"bias": bias, "scale": scale, "shift": shift}.items():
        if vector is not None and vector.shape != weight.shape[:1]:
            raise ValueError(f"expected {name} of shape {tuple(weight.shape[:1])}, got {tuple(vector.shape)}")
    conv = ConvGeometry(pair(conv_stride), pair(conv_padding), pair(conv_dilation))
    pool = PoolGeometry(pair(pool_size), pair(pool_stride), pair(pool_padding), bool(ceil_mode))
    check_pooling(pool, blur, max_blur)

    channels = split_channels(is_modulus, weight.device)
    if scale is not None:
        sign = torch.where(scale < 0, -1.0, 1.0).to(weight.dtype)
        weight = weight * sign[:, None, None, None]
        bias = None if bias is None else bias * sign
        weight_imag = None if weight_imag is None else weight_imag * sign[:, None, None, None]
        scale = scale.abs()
    if len(channels.modulus) == 0:
        imag = None
    elif weight_imag is None:
        imag = analytic_partner(weight.index_select(0, channels.modulus))
    else:
        imag = weight_imag.index_select(0, channels.modulus)
    needs_grad = needs_gradient(x, weight, imag, bias, scale, shift)
    operation, dtype = convolve_and_pool, {}
    is_fused = takes_fused(backend, Call(x, weight, len(channels.modulus), conv, pool, blur, max_blur, needs_grad))
    if is_fused and max_blur == 3 and len(channels.max) > 0:
        operation, dtype = halves.convolve_and_pool, {"dtype": compute_dtype(x)}
    elif is_fused:
        options = {"blur": blur, "dtype": compute_dtype(x)}
        scale, shift = _one_affine(scale, bias, shift, len(weight), x.device)
        relu = act in (F.relu, torch.relu)
        if needs_grad:
            pooled, _ = ops.convolve_and_pool(x, weight, imag, channels, conv, pool, **options)
            out = ops.affine_relu(pooled, scale, shift, relu)
        else:
            options |= {"scale": scale, "shift": shift, "relu": relu}
            out, _ = ops.convolve_and_pool(x, weight, imag, channels, conv, pool, **options)
        return out if relu else act(out)
    pooled = operation(x, weight, bias, imag, channels, conv, pool, blur=blur, max_blur=max_blur, **dtype)

    parts = []
    for part, index, offset in ((pooled.max, channels.max, None), (pooled.modulus, channels.modulus, bias)):
        if part is not None:
            if offset is not None:
                part = affine(part, None, offset.index_select(0, index))
            part = affine(part, *(None if v is None else v.index_select(0, index) for v in (scale, shift)))
        parts.append(part)
    return activate_and_merge(*parts, channels, act, pool, max_blur, memory_format_of(x))


def _one_affine(
    scale: Tensor | None, bias: Tensor | None, shift: Tensor | None, num_channels: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """scale (y + bias) + shift as one affine map: (scale, shift), (C_out,) float32."""
    scale = torch.ones(num_channels, dtype=torch.float32, device=device) if scale is None else scale.float()
    total = torch.zeros_like(scale) if shift is None else shift.float()
    return scale, total if bias is None else total + scale * bias.float()


def split_channels(is_modulus: Sequence[bool], device: torch.device | None = None) -> Channels:
    """The two index tensors of a mask."""
    kinds = [(i, bool(flag)) for i, flag in enumerate(is_modulus)]
    index = [[i for i, flag in kinds if flag == wanted] for wanted in (False, True)]
    return Channels(*(torch.tensor(i, dtype=torch.int64, device=device) for i in index))


def check_pooling(pool: PoolGeometry, blur: int, max_blur: int) -> None:
    """Raise ValueError for a pooling that this package does not define."""
    if not set(pool.size) <= {2, 3}:
        raise ValueError(f"expected a pooling window of 2 or 3, got {pool.size}")
    if any(not 0 <= 2 * padding <= size for padding, size in zip(pool.padding, pool.size, strict=True)):
        raise ValueError(f"expected a pooling padding from 0 to half the window {pool.size}, got {pool.padding}")
    if min(pool.stride) < 1:
        raise ValueError(f"expected a positive pooling stride, got {pool.stride}")
    for name, value in {"blur": blur, "max_blur": max_blur}.items():
        if value not in (1, 3):
            raise ValueError(f"expected {name} to be 1 or 3, got {value!r}")


def memory_format_of(x: Tensor) -> torch.memory_format:
    """channels_last if the channels of `x` lie side by side (also in a crop), else contiguous."""
    is_channels_last = x.stride(1) == 1 and x.shape[2] * x.shape[3] > 1
    return torch.channels_last if is_channels_last else torch.contiguous_format
