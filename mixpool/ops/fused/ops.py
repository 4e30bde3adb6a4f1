"""The fused stem as PyTorch sees it: an operator with its shapes and gradients. Light to import: no triton.

    mixpool::convolve_and_pool    the pooled map of all channels, a maximum's place in its window (a byte), statistics

Not written: the convolution's map, in ResNet's stem at batch 256 in bfloat16 411 MB, its normalised and activated
copies, and max pooling's int64 indices. Kept for the backward pass: the images, the pooled map before the affine step,
and the bytes of the max channels; re and im are computed again.

Every kernel is deterministic. Differentiating twice goes through the reference; `backend` sends calls there that need
more (functorch, forward mode), and asks whether a call can run here at all. A pixel that is not finite reaches a window
further than in the reference: a patch has taps of weight 0 beside the filter, and 0 * NaN is NaN. Moduli are exact
between 1e-19 and 1e19, whose squares float32 holds.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixpool.ops.fused.geometry import Channels, StemGeometry, padded_places
from mixpool.ops.fused.gradients import backward_of_reference, input_gradient
from mixpool.ops.geometry import ConvGeometry, PoolGeometry, memory_format_of


def convolve_and_pool(
    x: Tensor,
    weight: Tensor,
    weight_imag: Tensor | None,
    channels: Channels,
    conv: ConvGeometry,
    pool: PoolGeometry,
    *,
    blur: int,
    with_moments: bool = False,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`reference.convolve_and_pool` for all channels at once, in their places, on calls that `backend` lets pass.

    Args:
        x: (N, C_in, H, W) float32, bfloat16 or float16, rows dense in memory, NCHW or channels_last.
        weight: (C_out, C_in, k, k), sign of the affine scale folded in.
        weight_imag: (n_modulus, C_in, k, k), or None if no channel takes the modulus.
        channels, conv, pool, blur: as in the reference.
        with_moments: also return batch statistics.
        dtype: of the products and of the output; default that of `x`. float32 means TF32 on a GPU.
    Returns:
        pooled: (N, C_out, P, Q), memory format of `x`, without any bias.
        moments: (2, C_out) float32, mean and biased variance of the convolution (0 and mean(|z|^2) / 2 for modulus
            channels), or None. Both outputs are differentiable in `x`, `weight` and `weight_imag`.
    """
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, weight_imag))
    pooled, _, moments = torch.ops.mixpool.convolve_and_pool(
        x,
        weight,
        weight_imag,
        channels.max,
        channels.modulus,
        conv.stride[0],
        conv.padding[0],
        pool.padding[0],
        pool.ceil_mode,
        blur,
        with_moments,
        needs_grad and len(channels.max) > 0,
        x.dtype if dtype is None else dtype,
    )
    return pooled, (moments if with_moments else None)


# --- convolve_and_pool ------------------------------------------------------------------------------------------------


# Schemas in words: what torch infers from annotations differs between its versions.
_GEOMETRY = "SymInt stride, SymInt padding, SymInt pool_padding, bool ceil_mode, SymInt blur"
_FILTERS = "Tensor x, Tensor weight, Tensor? weight_imag, Tensor max_index, Tensor modulus_index"


@torch.library.custom_op(
    "mixpool::convolve_and_pool",
    mutates_args=(),
    schema=f"({_FILTERS}, {_GEOMETRY}, bool with_moments, bool with_argmax, "
    "ScalarType dtype) -> (Tensor, Tensor, Tensor)",
)
def _convolve_and_pool(
    x: Tensor,
    weight: Tensor,
    weight_imag: Tensor | None,
    max_index: Tensor,
    modulus_index: Tensor,
    stride: int,
    padding: int,
    pool_padding: int,
    ceil_mode: bool,
    blur: int,
    with_moments: bool,
    with_argmax: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    from mixpool.ops.fused import launch

    geometry = _geometry(x, weight, stride, padding, pool_padding, ceil_mode)
    pooled, argmax, moments = _outputs(x, weight, max_index, geometry, with_moments, with_argmax, dtype)
    purpose = "training" if with_argmax or with_moments else "inference"
    with torch.cuda.device_of(x):
        for kind, channels, imag in _kinds(max_index, modulus_index, weight_imag, blur):
            matrix = launch.Matrix.of(kind, geometry, len(channels), dtype, purpose)
            packed = x.new_empty((matrix.groups, matrix.depth, matrix.columns), dtype=dtype)
            launch.pack(matrix, geometry, x, weight, imag, channels, packed)()
            pivot = _typical_values(x, weight) if with_moments and kind == "max" else None
            call, sums = launch.forward(
                matrix,
                geometry,
                x,
                packed,
                channels,
                pooled,
                argmax=argmax if kind == "max" and with_argmax else None,
                pivot=pivot,
                with_sums=with_moments,
            )
            call()
            if with_moments:
                count = x.shape[0] * geometry.positions(kind)
                launch.finish_moments(kind, sums, channels, pivot, moments, count)()
    return pooled, argmax, moments


@_convolve_and_pool.register_fake
def _(
    x,
    weight,
    weight_imag,
    max_index,
    modulus_index,
    stride,
    padding,
    pool_padding,
    ceil_mode,
    blur,
    with_moments,
    with_argmax,
    dtype,
):
    geometry = _geometry(x, weight, stride, padding, pool_padding, ceil_mode)
    return _outputs(x, weight, max_index, geometry, with_moments, with_argmax, dtype)


def _outputs(x, weight, max_index, geometry, with_moments, with_argmax, dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Fresh tensors: the pooled map, the maxima's places (none if not asked), the moments (none if not asked)."""
    size = geometry.pooled_size
    layout = {"device": x.device, "memory_format": memory_format_of(x)}
    pooled = torch.empty((x.shape[0], weight.shape[0], *size), dtype=dtype, **layout)
    n_places = padded_places(max_index.shape[0])
    places = (x.shape[0], n_places, *size) if with_argmax else (0, 0, 0, 0)
    argmax = torch.empty(places, dtype=torch.int8, **layout)
    if n_places != max_index.shape[0]:
        argmax.zero_()  # the kernel leaves what was rounded up
    moments = torch.empty((2, weight.shape[0] if with_moments else 0), dtype=torch.float32, device=x.device)
    return pooled, argmax, moments


def _geometry(x: Tensor, weight: Tensor, stride, padding, pool_padding, ceil_mode) -> StemGeometry:
    return StemGeometry(weight.shape[-1], stride, padding, pool_padding, ceil_mode, *x.shape[1:])


def _typical_values(x: Tensor, weight: Tensor) -> Tensor:
    """(C_out,) float32: the convolution of an image of one colour, the mean of the first one.

    Sums about them keep their precision on images that vary little about a large mean.
    """
    return (weight.float().sum((2, 3)) * x[0].float().mean((1, 2))).sum(1)  # autocast rounds products of matrices


def _kinds(max_index: Tensor, modulus_index: Tensor, weight_imag: Tensor | None, blur: int):
    """(kind, channels, imaginary filters) of the kinds that have channels."""
    if len(max_index) > 0:
        yield "max", max_index, None
    if len(modulus_index) > 0:
        yield f"modulus{blur}", modulus_index, weight_imag


def _save_for_backward(ctx, inputs, output) -> None:
    x, weight, weight_imag, max_index, modulus_index, *options = inputs
    _, argmax, moments = output
    ctx.save_for_backward(x, weight, weight_imag, max_index, modulus_index, argmax, moments)
    *ctx.geometry, ctx.with_moments, ctx.with_argmax, ctx.dtype = options
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_pooled, _, grad_moments):
    """Gradients of x, weight and weight_imag."""
    x, weight, weight_imag, max_index, modulus_index, argmax, moments = ctx.saved_tensors
    grads = [None] * 13
    if grad_pooled is None and grad_moments is None:
        return tuple(grads)
    if not ctx.with_moments:
        grad_moments = None
    if grad_pooled is None:
        shape = _geometry(x, weight, *ctx.geometry[:4]).pooled_size
        grad_pooled = torch.zeros((x.shape[0], weight.shape[0], *shape), dtype=ctx.dtype, device=x.device)
    tensors = (x, weight, weight_imag, max_index, modulus_index)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True: these gradients need theirs
        return backward_of_reference(ctx, tensors, grad_pooled, grad_moments)
    grad_pooled = grad_pooled.contiguous(memory_format=memory_format_of(x))
    if max_index.shape[0] > 0 and not ctx.with_argmax:  # the pass was recorded without gradients
        _, argmax, moments = torch.ops.mixpool.convolve_and_pool(
            *tensors, *ctx.geometry, ctx.with_moments, True, ctx.dtype
        )
    needs_x, needs_weight, needs_imag = ctx.needs_input_grad[:3]
    of_tensors = torch.ops.mixpool.convolve_and_pool_backward(
        grad_pooled,
        None if grad_moments is None else grad_moments.contiguous(),
        *tensors,
        argmax,
        moments,
        *ctx.geometry,
        needs_x,
        needs_weight or needs_imag,
    )
    needs = (needs_x, needs_weight, needs_imag)
    grads[:3] = (grad if needed else None for grad, needed in zip(of_tensors, needs, strict=True))
    return tuple(grads)


_convolve_and_pool.register_autograd(_backward, setup_context=_save_for_backward)


@torch.library.custom_op(
    "mixpool::convolve_and_pool_backward",
    mutates_args=(),
    schema=f"(Tensor grad_pooled, Tensor? grad_moments, {_FILTERS}, Tensor argmax, Tensor moments, {_GEOMETRY}, "
    "bool with_input, bool with_weight) -> (Tensor, Tensor, Tensor)",
)
def _convolve_and_pool_backward(
    grad_pooled: Tensor,
    grad_moments: Tensor | None,
    x: Tensor,
    weight: Tensor,
    weight_imag: Tensor | None,
    max_index: Tensor,
    modulus_index: Tensor,
    argmax: Tensor,
    moments: Tensor,
    stride: int,
    padding: int,
    pool_padding: int,
    ceil_mode: bool,
    blur: int,
    with_input: bool,
    with_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from mixpool.ops.fused import launch

    geometry = _geometry(x, weight, stride, padding, pool_padding, ceil_mode)
    grad_x, grad_weight, grad_imag = _gradients(x, weight, weight_imag, with_input, with_weight)
    dtype = grad_pooled.dtype
    of_maps: dict[int, list[tuple[Tensor, Tensor]]] = {}  # by stride: gradients of the convolutions' maps, and filters
    with torch.cuda.device_of(x):
        for kind, channels, imag in _kinds(max_index, modulus_index, weight_imag, blur):
            matrix = launch.Matrix.of(kind, geometry, len(channels), dtype, "backward")
            packed = x.new_empty((matrix.groups, matrix.depth, matrix.columns), dtype=dtype)
            launch.pack(matrix, geometry, x, weight, imag, channels, packed)()
            coefficients = grad_conv = None
            if grad_moments is not None:
                count = x.shape[0] * geometry.positions(kind)
                spread, coefficients = launch.spread_moments(matrix, moments, grad_moments, channels, count)
                spread()
            if with_input:
                filters = weight.index_select(0, channels)
                filters = filters if imag is None else torch.cat([filters, imag.to(filters.dtype)])
                size = geometry.pooled_size if kind == "modulus1" else geometry.conv_size
                layout = {"dtype": dtype, "device": x.device, "memory_format": memory_format_of(x)}
                grad_conv = torch.empty((x.shape[0], len(filters), *size), **layout)
                of_maps.setdefault(1 + (kind == "modulus1"), []).append((grad_conv, filters.to(dtype)))
            call, partial = launch.backward(
                matrix,
                geometry,
                x,
                packed,
                channels,
                grad_pooled,
                argmax=argmax if kind == "max" else None,
                coefficients=coefficients,
                grad_conv=grad_conv,
                with_weight=with_weight,
            )
            call()
            if with_weight:
                launch.unpack(matrix, geometry, x, partial.sum(0), channels, grad_weight, grad_imag)()
        if with_input:
            grads = [
                input_gradient(pool_stride, geometry, x, *(torch.cat(t, dim=d) for t, d in zip(zip(*maps), (1, 0))))
                for pool_stride, maps in of_maps.items()
            ]
            grad_x.copy_(sum(grad.float() for grad in grads) if len(grads) > 1 else grads[0])
    return grad_x, grad_weight, grad_imag


@_convolve_and_pool_backward.register_fake
def _(
    grad_pooled,
    grad_moments,
    x,
    weight,
    weight_imag,
    max_index,
    modulus_index,
    argmax,
    moments,
    stride,
    padding,
    pool_padding,
    ceil_mode,
    blur,
    with_input,
    with_weight,
):
    return _gradients(x, weight, weight_imag, with_input, with_weight)


def _gradients(x, weight, weight_imag, with_input: bool, with_weight: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Fresh contiguous tensors, (0,) where nothing is asked."""

    def like(tensor: Tensor | None, wanted: bool) -> Tensor:
        if tensor is None or not wanted:
            return x.new_empty((0,))
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)

    grad_x = x.new_empty((0,))
    if with_input:
        grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=memory_format_of(x))
    return grad_x, like(weight, with_weight), like(weight_imag, with_weight)
