"""What the kernels leave to PyTorch in a backward pass: gradients of gradients, and the gradient by the images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mixpool.ops import reference
from mixpool.ops.fused.geometry import StemGeometry
from mixpool.ops.geometry import ConvGeometry, PoolGeometry
from mixpool.ops.reference import Group


def backward_of_reference(ctx, tensors, grad_pooled, grad_moments) -> tuple[Tensor | None, ...]:
    """The same gradients by plain PyTorch, differentiable again; it keeps what the kernels do not."""
    stride, padding, pool_padding, ceil_mode, blur = ctx.geometry
    names = ("max", "cmod" if blur == 1 else "modulus")
    groups = [Group(name, index) for name, index in zip(names, tensors[3:], strict=True) if len(index) > 0]
    with torch.enable_grad():
        # Aliases: V may be a function of W, whose gradient must not pass through V here and once more outside.
        x, weight, weight_imag = (None if tensor is None else tensor.view_as(tensor) for tensor in tensors[:3])
        parts = reference.convolve_and_pool(
            x.to(ctx.dtype),
            weight.to(ctx.dtype),
            None,
            None if weight_imag is None else weight_imag.to(ctx.dtype),
            groups,
            ConvGeometry((stride,) * 2, (padding,) * 2),
            PoolGeometry(padding=(pool_padding,) * 2, ceil_mode=ceil_mode),
            with_moments=grad_moments is not None,
        )
        order = torch.cat([group.index for group in groups]).argsort()
        outputs = [torch.cat([part.values for part in parts], dim=1).index_select(1, order)]
        upstream = [grad_pooled]
        if grad_moments is not None:
            rows = [torch.stack([part.moments.mean, part.moments.var]) for part in parts]
            outputs.append(torch.cat(rows, dim=1).index_select(1, order))
            upstream.append(grad_moments)
        inputs = (x, weight, weight_imag)
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[:3]) if needed]
        found = torch.autograd.grad(outputs, [inputs[i] for i in wanted], upstream, create_graph=True)
    grads = [None] * 13
    for i, grad in zip(wanted, found, strict=True):
        grads[i] = grad
    return tuple(grads)


def input_gradient(pool_stride: int, geometry: StemGeometry, x: Tensor, grad_conv: Tensor, filters: Tensor) -> Tensor:
    """aten's gradient of a convolution by its input, in the dtype of `grad_conv`.

    The convolution at the windows' centres (pool_stride 2) starts at another pixel than the dense one, maybe inside the
    image, and stops where the last window does; so its input is padded or cropped to fit exactly, and that is undone.
    """
    step, before = pool_stride * geometry.stride, geometry.padding
    if pool_stride == 2:
        before -= geometry.stride * (1 - geometry.pool_padding)
    pads = []
    for length, count in zip(x.shape[:1:-1], grad_conv.shape[:1:-1], strict=True):  # F.pad starts at the last axis
        pads += [before, (count - 1) * step + geometry.kernel_size - length - before]
    padded = F.pad(x[:, :1], pads).to(filters.dtype).expand(-1, x.shape[1], -1, -1)  # only its shape counts
    grad, _, _ = torch.ops.aten.convolution_backward(
        grad_conv, padded, filters, None, [step, step], [0, 0], [1, 1], False, [0, 0], 1, [True, False, False]
    )
    return F.pad(grad, [-pad for pad in pads])
