"""The operation in plain PyTorch: the definition that every faster path is tested against.

Legend: N images, C channels, (H, W) of the tensor at hand, W + iV the complex kernel, z = conv(x; W + iV).
An image flows through this file from top to bottom, each channel by the pooling that its name stands for in POOLINGS:

    convolve -> max_pool                               "max"        as the stock stem
                dense_max_pool .. binomial_decimate    "blurpool"   BlurPool's order: maxima, activation, decimation
                mean_modulus                           "modulus"    binomial mean of |z| over the window
                root_mean_energy                       "energy"     root of the binomial mean of |z|^2
    convolve_at_centers -> central_modulus             "cmod"       |z| at the window's centre (paper 2's CMod)
                -> affine -> act [-> finish] -> merge      (merge.py)

Pooling comes before the affine step: an increasing function commutes with a maximum, so
max_pool(act(a y + b)) == act(|a| max_pool(sign(a) y) + b), and four times fewer numbers are normalised.
The caller folds sign(a) into W and V.

A new pooling is one function of the convolution's map, and one entry of the table at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mixpool.ops.geometry import ConvGeometry, Pair, PoolGeometry, centers_are_inside, unreached
from mixpool.ops.modes import in_functorch, needs_gradient, widened, without_autocast
from mixpool.ops.modulus import energy, modulus, root
from mixpool.ops.moments import Moments, energy_moments, modulus_moments, real_moments


class Pooled(NamedTuple):
    """Pooled channels before the affine step, (N, n, h, w), and their batch statistics if they were asked for.

    The statistics are those of the real convolution for real poolings; for complex ones mean 0 and mean(|z|^2) / 2 over
    the positions computed (paper 2's non-centred rule).
    """

    values: Tensor
    moments: Moments | None


class Pooling(NamedTuple):
    """How a channel is pooled.

    is_complex: whether it looks at z, the convolution by W + iV, or at the one by W alone.
    pool: (map, geometry, with_moments) -> Pooled; a complex map has the n real parts and then the n imaginary parts.
    finish: what follows the activation.
    convolve: (x, weight, bias, conv, pool) -> map; None for `convolve`. Channels of one `convolve` run together.
    kernel: name of its Triton kernel, None without one.
    """

    is_complex: bool
    pool: Callable[[Tensor, PoolGeometry, bool], Pooled]
    finish: Callable[[Tensor, PoolGeometry], Tensor] | None = None
    convolve: Callable[[Tensor, Tensor, Tensor | None, ConvGeometry, PoolGeometry], Tensor] | None = None
    kernel: str | None = None


class Group(NamedTuple):
    """The channels of one pooling: its name in POOLINGS, and (n,) int64."""

    pooling: str
    index: Tensor


def groups_of(poolings: Sequence[str], device: torch.device | None = None) -> tuple[Group, ...]:
    """The channels by pooling, in the order of the table; poolings that no channel has are left out."""
    places = {name: [i for i, own in enumerate(poolings) if own == name] for name in POOLINGS}
    return tuple(
        Group(name, torch.tensor(index, dtype=torch.int64, device=device)) for name, index in places.items() if index
    )


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
    images_at_a_time: int | None = None,
) -> list[Pooled]:
    """Convolve and pool channels, group after group; the affine step, the activation and the merge are the caller's.

    Args:
        x: images, (N, C_in, H, W), any float dtype, any strides.
        weight: (C_out, C_in, kH, kW), the real part, sign of the affine scale folded in.
        bias: (C_out,) or None; added to real channels only (a modulus has no use for it before the affine step).
        weight_imag: (n, C_in, kH, kW), the imaginary parts of the complex groups' channels, group after group; or None.
        groups: the channels to compute.
        conv, pool: the geometry of the stem.
        with_moments: also return batch statistics.
        images_at_a_time: how many images' maps exist at a time, without moments; None for all.
    """
    entries = [POOLINGS[group.pooling] for group in groups]
    # On CPU, PyTorch pools channels_last tensors about ten times faster. Real poolings alone convolve in the layout
    # that came in, so that an all-max stem repeats the stock convolution bit by bit.
    as_channels_last = x.device.type == "cpu" and not torch.compiler.is_compiling() and not in_functorch()
    if as_channels_last and any(entry.is_complex for entry in entries):
        x = x.contiguous(memory_format=torch.channels_last)
    filters = _joined_filters(x, weight, bias, weight_imag, groups)

    def of(images: Tensor) -> list[Pooled]:
        maps = _convolved(images, filters, conv, pool)
        if as_channels_last:
            maps = [y if entry.is_complex else _channels_last(y) for entry, y in zip(entries, maps, strict=True)]
        return [entry.pool(y, pool, with_moments) for entry, y in zip(entries, maps, strict=True)]

    if images_at_a_time is None or images_at_a_time >= len(x):
        return of(x)
    parts = [of(images) for images in x.split(images_at_a_time)]
    return [Pooled(torch.cat([own.values for own in group]), None) for group in zip(*parts, strict=True)]


# --- the convolution --------------------------------------------------------------------------------------------------


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, conv: ConvGeometry, pool: PoolGeometry) -> Tensor:
    """At every position."""
    return F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation)


def convolve_at_centers(
    x: Tensor, weight: Tensor, bias: Tensor | None, conv: ConvGeometry, pool: PoolGeometry
) -> Tensor:
    """At the windows' centres only, at the total stride, where `centers_are_inside` holds; elsewhere everywhere.

    The first centre lies `center - padding` steps into the map, so the input loses that many strides on its first
    side; on its last side it loses what no window's centre reaches. Nothing here depends on the input's size.
    """
    if not centers_are_inside(pool):
        return convolve(x, weight, bias, conv, pool)
    pads = []
    for stride, padding, size, step, pool_padding, center in zip(
        conv.stride, conv.padding, pool.size, pool.stride, pool.padding, pool.center, strict=True
    ):
        end = unreached(size, step, pool_padding, center, pool.ceil_mode)
        pads.append((padding - stride * (center - pool_padding), padding - stride * end))
    (top, bottom), (left, right) = pads
    stride = (conv.stride[0] * pool.stride[0], conv.stride[1] * pool.stride[1])
    if top == bottom and left == right and min(top, left) >= 0:
        return F.conv2d(x, weight, bias, stride, (top, left), conv.dilation)
    return F.conv2d(F.pad(x, (left, right, top, bottom)), weight, bias, stride, 0, conv.dilation)


class _Filters(NamedTuple):
    """What is convolved at once: (n, C_in, kH, kW), (n,) or None, and the groups that it is for, with their sizes."""

    convolve: Callable[[Tensor, Tensor, Tensor | None, ConvGeometry, PoolGeometry], Tensor]
    weight: Tensor
    bias: Tensor | None
    members: list[int]
    sizes: list[int]


def _joined_filters(x, weight, bias, weight_imag, groups) -> list[_Filters]:
    """The filters of each group; without gradients those of all groups that are convolved alike."""
    first_imag = 0
    filters = []
    for place, group in enumerate(groups):
        entry, count = POOLINGS[group.pooling], len(group.index)
        imag = weight_imag[first_imag : first_imag + count] if entry.is_complex else None
        first_imag += count if entry.is_complex else 0
        own, own_bias = _filters_of(group, weight, bias, imag)
        filters.append(_Filters(entry.convolve or convolve, own, own_bias, [place], [len(own)]))
    # A backward pass would have to join the groups' gradients, and torch.jit.trace checks its graph without any.
    if needs_gradient(x, weight, bias, weight_imag) or torch.jit.is_tracing():
        return filters
    alike = dict.fromkeys(own.convolve for own in filters)
    return [_joined([own for own in filters if own.convolve is convolution]) for convolution in alike]


def _joined(filters: list[_Filters]) -> _Filters:
    if len(filters) == 1:
        return filters[0]
    weights, biases = [own.weight for own in filters], [own.bias for own in filters]
    with without_autocast(weights[0]):  # it refuses to join the half types that are not its own
        bias = None
        if any(own is not None for own in biases):
            bias = torch.cat([w.new_zeros(len(w)) if b is None else b for w, b in zip(weights, biases, strict=True)])
        members = [own.members[0] for own in filters]
        return _Filters(filters[0].convolve, torch.cat(weights), bias, members, [len(w) for w in weights])


def _convolved(x: Tensor, filters: list[_Filters], conv: ConvGeometry, pool: PoolGeometry) -> list[Tensor]:
    """The map of each group."""
    maps: dict[int, Tensor] = {}
    for own in filters:
        y = own.convolve(x, own.weight, own.bias, conv, pool)
        maps |= dict(zip(own.members, [y] if len(own.sizes) == 1 else y.split(own.sizes, dim=1), strict=True))
    return [maps[i] for i in range(len(maps))]


def _filters_of(
    group: Group, weight: Tensor, bias: Tensor | None, weight_imag: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The filters of a group, real parts before imaginary ones, and its bias."""
    if len(group.index) < len(weight):
        weight = weight.index_select(0, group.index)
        bias = None if bias is None else bias.index_select(0, group.index)
    if weight_imag is None:
        return weight, bias
    with without_autocast(weight):
        return torch.cat([weight, weight_imag]), None


def _channels_last(y: Tensor) -> Tensor:
    """As a channels_last tensor, or as a part of one."""
    return y if y.stride(1) == 1 else y.contiguous(memory_format=torch.channels_last)


# --- real poolings ----------------------------------------------------------------------------------------------------


def max_pool(y: Tensor, pool: PoolGeometry) -> Tensor:
    """Maximum over each window; positions outside `y` do not count."""
    return F.max_pool2d(y, pool.size, pool.stride, pool.padding, ceil_mode=pool.ceil_mode)


def dense_max_pool(y: Tensor, pool: PoolGeometry) -> Tensor:
    """Maximum over the same windows at every position (stride 1): the first half of BlurPool's max pooling.

    With ceil_mode the map reaches as far as the last window that hangs over the border.
    """
    below = right = 0
    if pool.ceil_mode:
        height, width = y.shape[-2:]
        out_height, out_width = pool.output_size(height, width)
        below = max((out_height - 1) * pool.stride[0] + pool.size[0] - 2 * pool.padding[0] - height, 0)
        right = max((out_width - 1) * pool.stride[1] + pool.size[1] - 2 * pool.padding[1] - width, 0)
    if y.device.type == "cpu" and not torch.jit.is_tracing() and not needs_gradient(y):
        # Three times faster there, and twenty times in NCHW; but at a tie its gradient would not be max pooling's.
        (pad_y, pad_x) = pool.padding
        y = F.pad(y, (pad_x, pad_x + right, pad_y, pad_y + below), value=float("-inf"))
        return _running_max(_running_max(y, 2, pool.size[0]), 3, pool.size[1])
    if below or right:
        y = F.pad(y, (0, right, 0, below), value=float("-inf"))
    return F.max_pool2d(y, pool.size, 1, pool.padding)


def _running_max(y: Tensor, dim: int, size: int) -> Tensor:
    """Maximum over `size` neighbours along one axis."""
    length = y.shape[dim] - size + 1
    out = y.narrow(dim, 0, length)
    for i in range(1, size):
        out = torch.maximum(out, y.narrow(dim, i, length))
    return out


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


# --- complex poolings -------------------------------------------------------------------------------------------------


def lowpass_pool(values: Tensor, pool: PoolGeometry) -> Tensor:
    """Binomial mean over each window: [1 2 1] x [1 2 1] on windows of 3, [1 1] x [1 1] on windows of 2.

    Positions outside `values` do not count and the other weights are scaled up to sum to 1 (constant in, constant
    out). The output size is the max pool's. (Two average pools give the same: on a CPU as
    fast forward in channels_last, slower backward, and several times slower in NCHW: `benchmarks.cost.lowpass`.)
    """
    out_height, out_width = pool.output_size(*values.shape[-2:]) if pool.ceil_mode else (None, None)
    kernel = binomial_kernel(pool.size, values)

    def window_sums(values: Tensor) -> Tensor:
        if not pool.ceil_mode:
            padding = pool.padding
        else:  # one more stride of zeros below and right, for the windows that hang over the border
            (pad_y, pad_x), padding = pool.padding, (0, 0)
            values = F.pad(values, (pad_x, pad_x + pool.stride[1] - 1, pad_y, pad_y + pool.stride[0] - 1))
        channels = values.shape[1]
        sums = F.conv2d(values, kernel.expand(channels, 1, *pool.size), None, pool.stride, padding, groups=channels)
        return sums[..., :out_height, :out_width]

    with without_autocast(values):
        if not pool.ceil_mode and pool.padding == (0, 0):
            return window_sums(values)
        return window_sums(values) / window_sums(torch.ones_like(values[:1, :1]))


def nearest_centers(values: Tensor, pool: PoolGeometry) -> Tensor:
    """The values at the windows' centres, taken at the nearest position on the map where a centre lies outside."""
    height, width = values.shape[-2:]
    out_height, out_width = pool.output_size(height, width)
    rows = torch.arange(out_height, device=values.device) * pool.stride[0] + pool.center[0] - pool.padding[0]
    columns = torch.arange(out_width, device=values.device) * pool.stride[1] + pool.center[1] - pool.padding[1]
    return values[:, :, rows.clamp(0, height - 1)[:, None], columns.clamp(0, width - 1)]


# --- the table --------------------------------------------------------------------------------------------------------


def _max(y: Tensor, pool: PoolGeometry, with_moments: bool) -> Pooled:
    return Pooled(max_pool(y, pool), real_moments(y) if with_moments else None)


def _dense_max(y: Tensor, pool: PoolGeometry, with_moments: bool) -> Pooled:
    return Pooled(dense_max_pool(y, pool), real_moments(y) if with_moments else None)


def _central_modulus(z: Tensor, pool: PoolGeometry, with_moments: bool) -> Pooled:
    envelope = modulus(z)
    moments = modulus_moments(envelope) if with_moments else None
    if not centers_are_inside(pool):
        envelope = nearest_centers(envelope, pool)
    return Pooled(envelope.to(z.dtype), moments)


def _mean_modulus(z: Tensor, pool: PoolGeometry, with_moments: bool) -> Pooled:
    envelope = modulus(z)
    moments = modulus_moments(envelope) if with_moments else None
    return Pooled(lowpass_pool(envelope, pool).to(z.dtype), moments)


def _root_mean_energy(z: Tensor, pool: PoolGeometry, with_moments: bool) -> Pooled:
    # |z|^2 is band-limited and |z| is not: low-pass first and root last alias less.
    energies = energy(z)
    moments = energy_moments(energies) if with_moments else None
    return Pooled(root(lowpass_pool(energies, pool)).to(z.dtype), moments)


# The order is the code of a pooling in a checkpoint's `plan`: new ones come last.
POOLINGS: dict[str, Pooling] = {
    "max": Pooling(is_complex=False, pool=_max, kernel="max"),
    "cmod": Pooling(is_complex=True, pool=_central_modulus, convolve=convolve_at_centers, kernel="modulus1"),
    "blurpool": Pooling(is_complex=False, pool=_dense_max, finish=binomial_decimate),
    "modulus": Pooling(is_complex=True, pool=_mean_modulus, kernel="modulus3"),
    "energy": Pooling(is_complex=True, pool=_root_mean_energy),
}


def check_poolings(poolings: str | Sequence[str], count: int) -> tuple[str, ...]:
    """One name per channel, from a name for all of them or a sequence; ValueError for anything else."""
    names = (poolings,) * count if isinstance(poolings, str) else tuple(poolings)
    unknown = [name for name in names if not isinstance(name, str) or name not in POOLINGS]
    if unknown:
        raise ValueError(f"expected poolings of {tuple(POOLINGS)}, got {unknown[0]!r}")
    if len(names) != count:
        raise ValueError(f"expected {count} poolings, one per output channel, got {len(names)}")
    return names


def binomial_kernel(size: Pair, like: Tensor) -> Tensor:
    """(1, 1, *size) binomial weights that sum to 1, [1], [1 1] or [1 2 1] per axis; exact in every float dtype."""
    if like.device.type == "cpu":
        rows, columns = ([(n + 1) / 2 - abs(i - (n - 1) / 2) for i in range(n)] for n in size)
        total = sum(rows) * sum(columns)
        return torch.tensor([[[[a * b / total for b in columns] for a in rows]]], dtype=like.dtype, device=like.device)
    axes = []
    for n in size:
        # (n + 1) / 2 - distance from the middle: computed on the device, so that a CUDA graph can hold it.
        tap = torch.arange(n, dtype=like.dtype, device=like.device)
        axes.append(((n + 1) / 2 - (tap - (n - 1) / 2).abs()) / ((n + 1) // 2 * ((n + 2) // 2)))
    return (axes[0][:, None] * axes[1])[None, None]
