"""The operation in plain PyTorch: the definition that every faster path is tested against.

Legend: N images, C channels, (H, W) of the tensor at hand, W + iV the complex kernel, z = conv(x; W + iV).
An image flows through this file from top to bottom:

    convolve ------------------> max_pool                     the kind "max"
    convolve_complex -> modulus -> lowpass_pool or centre     the kind "modulus"
                                   -> affine -> act [-> binomial_decimate] -> merge

Pooling comes before the affine step: an increasing function commutes with a maximum, so
max_pool(act(a y + b)) == act(|a| max_pool(sign(a) y) + b), and four times fewer numbers are normalised.
The caller folds sign(a) into W and V.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mixpool.ops.geometry import ConvGeometry, Pair, PoolGeometry, centers_are_inside, unreached
from mixpool.ops.modes import in_functorch, widened, without_autocast
from mixpool.ops.modulus import modulus
from mixpool.ops.moments import Moments, energy_moments, real_moments


class Channels(NamedTuple):
    """Which output channels are pooled how: two disjoint (n,) int64 index tensors that cover all of them."""

    max: Tensor
    modulus: Tensor


class Pooled(NamedTuple):
    """What `convolve_and_pool` returns: each kind's pooled channels, None if it has none, and its moments if asked."""

    max: Tensor | None
    modulus: Tensor | None
    max_moments: Moments | None = None
    modulus_moments: Moments | None = None


def convolve_and_pool(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_imag: Tensor | None,
    channels: Channels,
    conv: ConvGeometry,
    pool: PoolGeometry,
    *,
    blur: int = 3,
    max_blur: int = 1,
    with_moments: bool = False,
) -> Pooled:
    """Convolve and pool each channel by its kind; the affine step, the activation and the merge are the caller's.

    Args:
        x: images, (N, C_in, H, W), any float dtype, any strides.
        weight: (C_out, C_in, kH, kW), the real part, sign of the affine scale folded in.
        bias: (C_out,) or None; added to the max channels only (a modulus has no use for it before the affine step).
        weight_imag: (n_modulus, C_in, kH, kW), the imaginary parts of the modulus channels, in the order of `channels`.
        channels: the max and the modulus channels.
        conv, pool: the geometry of the stem.
        blur: 3 for the binomial mean of the modulus over the window, 1 for its centre alone (paper 2's CMod).
        max_blur: 3 leaves the max channels at stride 1 for `binomial_decimate`; 1 pools them as `nn.MaxPool2d`.
        with_moments: also return batch statistics: of the real convolution for max channels; mean 0 and
            mean(|z|^2) / 2 over the positions computed for modulus channels (paper 2's non-centred rule).
    """
    all_max, all_modulus = len(channels.max) == len(weight), len(channels.modulus) == len(weight)
    as_channels_last = x.device.type == "cpu" and not torch.compiler.is_compiling() and not in_functorch()
    pooled_max = pooled_modulus = max_moments = modulus_moments = None
    # On CPU, PyTorch pools channels_last tensors about ten times faster. An all-max plan convolves in the layout that
    # came in, so that it repeats the stock convolution bit by bit.
    if as_channels_last and len(channels.modulus) > 0:
        x = x.contiguous(memory_format=torch.channels_last)

    if len(channels.max) > 0:
        weight_max, bias_max = weight, bias
        if not all_max:
            weight_max = weight.index_select(0, channels.max)
            bias_max = None if bias is None else bias.index_select(0, channels.max)
        y = F.conv2d(x, weight_max, bias_max, conv.stride, conv.padding, conv.dilation)
        max_moments = real_moments(y) if with_moments else None
        if as_channels_last:
            y = y.contiguous(memory_format=torch.channels_last)
        pooled_max = dense_max_pool(y, pool) if max_blur == 3 else max_pool(y, pool)

    if len(channels.modulus) > 0:
        with without_autocast(weight):  # it refuses to join the half types that are not its own
            weight_real = weight if all_modulus else weight.index_select(0, channels.modulus)
            weight_modulus = torch.cat([weight_real, weight_imag])
        if blur == 1 and centers_are_inside(pool):
            z = convolve_at_centers(x, weight_modulus, conv, pool)
        else:
            z = F.conv2d(x, weight_modulus, None, conv.stride, conv.padding, conv.dilation)
        envelope = modulus(z)
        modulus_moments = energy_moments(envelope) if with_moments else None
        if blur == 3:
            envelope = lowpass_pool(envelope, pool)
        elif not centers_are_inside(pool):
            envelope = nearest_centers(envelope, pool)
        pooled_modulus = envelope.to(z.dtype)
    return Pooled(pooled_max, pooled_modulus, max_moments, modulus_moments)


# --- the max branch ---------------------------------------------------------------------------------------------------


def max_pool(y: Tensor, pool: PoolGeometry) -> Tensor:
    """Maximum over each window; positions outside `y` do not count."""
    return F.max_pool2d(y, pool.size, pool.stride, pool.padding, ceil_mode=pool.ceil_mode)


def dense_max_pool(y: Tensor, pool: PoolGeometry) -> Tensor:
    """Maximum over the same windows at every position (stride 1): the first half of BlurPool's max pooling.

    With ceil_mode the map reaches as far as the last window that hangs over the border.
    """
    if pool.ceil_mode:
        height, width = y.shape[-2:]
        out_height, out_width = pool.output_size(height, width)
        below = (out_height - 1) * pool.stride[0] + pool.size[0] - 2 * pool.padding[0] - height
        right = (out_width - 1) * pool.stride[1] + pool.size[1] - 2 * pool.padding[1] - width
        y = F.pad(y, (0, max(right, 0), 0, max(below, 0)), value=float("-inf"))
    return F.max_pool2d(y, pool.size, 1, pool.padding)


def binomial_decimate(out: Tensor, pool: PoolGeometry) -> Tensor:
    """BlurPool's second half: [1 2 1] x [1 2 1] / 16 on a reflected border, then every `pool.stride`-th value.

    Reference: Zhang, Making Convolutional Networks Shift-Invariant Again, 2019, arXiv 1904.11486, section 3.2.
    """
    height, width = out.shape[-2:]
    dtype = out.dtype
    if out.device.type == "cpu":  # where torch's backward pass of the half types is slower by far
        out = widened(out)
    kernel = binomial_kernel((3, 3), out).expand(out.shape[1], 1, 3, 3)
    with without_autocast(out):  # it would make the border float32 and the sums bfloat16
        if min(height, width) > 1:
            out = F.pad(out, (1, 1, 1, 1), mode="reflect")
        else:  # a line has nothing to reflect across itself
            out = F.pad(out, (0, 0, 1, 1), mode="reflect" if height > 1 else "replicate")
            out = F.pad(out, (1, 1, 0, 0), mode="reflect" if width > 1 else "replicate")
        return F.conv2d(out, kernel, stride=pool.stride, groups=out.shape[1]).to(dtype)


# --- the modulus branch -----------------------------------------------------------------------------------------------


def lowpass_pool(envelope: Tensor, pool: PoolGeometry) -> Tensor:
    """Binomial mean over each window: [1 2 1] x [1 2 1] on windows of 3, [1 1] x [1 1] on windows of 2.

    Positions outside `envelope` do not count and the other weights are scaled up to sum to 1 (constant in, constant
    out). The output size is the max pool's.
    """
    out_height, out_width = pool.output_size(*envelope.shape[-2:]) if pool.ceil_mode else (None, None)
    kernel = binomial_kernel(pool.size, envelope)

    def window_sums(values: Tensor) -> Tensor:
        if not pool.ceil_mode:
            padding = pool.padding
        else:  # one more stride of zeros below and right, for the windows that hang over the border
            (pad_y, pad_x), padding = pool.padding, (0, 0)
            values = F.pad(values, (pad_x, pad_x + pool.stride[1] - 1, pad_y, pad_y + pool.stride[0] - 1))
        channels = values.shape[1]
        sums = F.conv2d(values, kernel.expand(channels, 1, *pool.size), None, pool.stride, padding, groups=channels)
        return sums[..., :out_height, :out_width]

    with without_autocast(envelope):
        if not pool.ceil_mode and pool.padding == (0, 0):
            return window_sums(envelope)
        return window_sums(envelope) / window_sums(torch.ones_like(envelope[:1, :1]))


def convolve_at_centers(x: Tensor, weight: Tensor, conv: ConvGeometry, pool: PoolGeometry) -> Tensor:
    """The convolution at the windows' centres only, at the total stride, where `centers_are_inside` holds.

    The first centre lies `center - padding` steps into the map, so the input loses that many strides on its first
    side; on its last side it loses what no window's centre reaches. Nothing here depends on the input's size.
    """
    pads = []
    for stride, padding, size, step, pool_padding, center in zip(
        conv.stride, conv.padding, pool.size, pool.stride, pool.padding, pool.center, strict=True
    ):
        end = unreached(size, step, pool_padding, center, pool.ceil_mode)
        pads.append((padding - stride * (center - pool_padding), padding - stride * end))
    (top, bottom), (left, right) = pads
    stride = (conv.stride[0] * pool.stride[0], conv.stride[1] * pool.stride[1])
    if top == bottom and left == right and min(top, left) >= 0:
        return F.conv2d(x, weight, None, stride, (top, left), conv.dilation)
    return F.conv2d(F.pad(x, (left, right, top, bottom)), weight, None, stride, 0, conv.dilation)


def nearest_centers(envelope: Tensor, pool: PoolGeometry) -> Tensor:
    """The envelope at the windows' centres, taken at the nearest position on the map where a centre lies outside."""
    height, width = envelope.shape[-2:]
    out_height, out_width = pool.output_size(height, width)
    rows = torch.arange(out_height, device=envelope.device) * pool.stride[0] + pool.center[0] - pool.padding[0]
    columns = torch.arange(out_width, device=envelope.device) * pool.stride[1] + pool.center[1] - pool.padding[1]
    return envelope[:, :, rows.clamp(0, height - 1)[:, None], columns.clamp(0, width - 1)]


# --- both branches ----------------------------------------------------------------------------------------------------


def affine(pooled: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """scale * pooled + shift per channel, in float32 or better, returned in the dtype of `pooled`."""
    if scale is None:  # batch_norm has wrong second derivatives then (torch 2.14)
        return pooled if shift is None else (pooled + shift[:, None, None]).to(pooled.dtype)
    dtype = torch.promote_types(pooled.dtype, torch.float32)
    zeros = torch.zeros(pooled.shape[1], dtype=dtype, device=pooled.device)
    shift = None if shift is None else shift.to(dtype)
    # The batch norm of mean 0 and variance 1: one pass over memory there, and one back.
    return F.batch_norm(pooled, zeros, torch.ones_like(zeros), scale.to(dtype), shift, False, 0.0, 0.0)


def activate_and_merge(
    max_part: Tensor | None,
    modulus_part: Tensor | None,
    channels: Channels,
    act: Callable[[Tensor], Tensor],
    pool: PoolGeometry,
    max_blur: int,
    memory_format: torch.memory_format,
) -> Tensor:
    """act, BlurPool's decimation of the max channels, and all channels back in their places."""
    if max_part is not None:
        max_part = act(max_part)
        if max_blur == 3:
            max_part = binomial_decimate(max_part, pool)
    if modulus_part is not None:
        modulus_part = act(modulus_part)
    if max_part is None or modulus_part is None:
        part = modulus_part if max_part is None else max_part
        return part.contiguous(memory_format=memory_format)
    if in_functorch():  # vmap can neither fill a new tensor in place nor lay one out
        order = torch.cat([channels.max, channels.modulus]).argsort()
        return torch.cat([max_part, modulus_part], dim=1).index_select(1, order)
    size = (max_part.shape[0], len(channels.max) + len(channels.modulus), *max_part.shape[-2:])
    out = torch.empty(size, dtype=max_part.dtype, device=max_part.device, memory_format=memory_format)
    return out.index_copy_(1, channels.max, max_part).index_copy_(1, channels.modulus, modulus_part)


def binomial_kernel(size: Pair, like: Tensor) -> Tensor:
    """(1, 1, *size) binomial weights that sum to 1, [1], [1 1] or [1 2 1] per axis; exact in every float dtype."""
    axes = []
    for n in size:
        # (n + 1) / 2 - distance from the middle: computed on the device, so that a CUDA graph can hold it.
        tap = torch.arange(n, dtype=like.dtype, device=like.device)
        axes.append(((n + 1) / 2 - (tap - (n - 1) / 2).abs()) / ((n + 1) // 2 * ((n + 2) // 2)))
    return (axes[0][:, None] * axes[1])[None, None]
