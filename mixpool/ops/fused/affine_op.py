"""The operator mixpool::affine_relu: act(scale x + shift) at pooled size, with its gradients."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mixpool.ops import reference
from mixpool.ops.fused.gradients import aliases
from mixpool.ops.geometry import memory_format_of


def affine_relu(x: Tensor, scale: Tensor, shift: Tensor, relu: bool = True) -> Tensor:
    """max(scale x + shift, 0), or without the maximum, per channel of (N, C, P, Q); computed in float32.

    `scale` and `shift` are (C,) float32; the output has the dtype and the memory format of `x`.
    """
    return torch.ops.mixpool.affine_relu(x, scale, shift, relu)


def both_vectors(scale: Tensor | None, shift: Tensor | None) -> tuple[Tensor, Tensor]:
    """The epilogue's vectors as a kernel reads them, 1 or 0 for the one that is not there."""
    scale = torch.ones_like(shift, memory_format=torch.contiguous_format) if scale is None else scale.contiguous()
    return scale, torch.zeros_like(scale) if shift is None else shift.contiguous()


@torch.library.custom_op(
    "mixpool::affine_relu",
    mutates_args=(),
    schema="(Tensor x, Tensor scale, Tensor shift, bool relu) -> Tensor",
)
def _affine_relu(x: Tensor, scale: Tensor, shift: Tensor, relu: bool) -> Tensor:
    from mixpool.ops.fused import launch

    out = torch.empty_like(x, memory_format=memory_format_of(x))
    with torch.cuda.device_of(x):
        launch.affine_forward(x, scale.contiguous(), shift.contiguous(), out, relu)()
    return out


@_affine_relu.register_fake
def _(x, scale, shift, relu):
    return torch.empty_like(x, memory_format=memory_format_of(x))


def _save_affine(ctx, inputs, output) -> None:
    x, scale, shift, ctx.relu = inputs
    ctx.save_for_backward(x, scale, shift)


def _affine_backward(ctx, grad):
    x, scale, shift = ctx.saved_tensors
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
        with torch.enable_grad():
            x, scale, shift = aliases(x, scale, shift)
            out = reference.affine(x, scale, shift)
            out = F.relu(out) if ctx.relu else out
            wanted = [i for i in range(3) if ctx.needs_input_grad[i]]
            found = torch.autograd.grad(out, [(x, scale, shift)[i] for i in wanted], grad, create_graph=True)
        grads = dict(zip(wanted, found, strict=True))
        return grads.get(0), grads.get(1), grads.get(2), None
    grad = grad.contiguous(memory_format=memory_format_of(x))
    grad_x, grad_scale, grad_shift = torch.ops.mixpool.affine_relu_backward(grad, x, scale, shift, ctx.relu)
    return grad_x, grad_scale, grad_shift, None


_affine_relu.register_autograd(_affine_backward, setup_context=_save_affine)


@torch.library.custom_op(
    "mixpool::affine_relu_backward",
    mutates_args=(),
    schema="(Tensor grad_out, Tensor x, Tensor scale, Tensor shift, bool relu) -> (Tensor, Tensor, Tensor)",
)
def _affine_relu_backward(
    grad_out: Tensor, x: Tensor, scale: Tensor, shift: Tensor, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    from mixpool.ops.fused import launch

    grad_x = torch.empty_like(x, memory_format=memory_format_of(x))
    with torch.cuda.device_of(x):
        call, sums = launch.affine_backward(x, scale.contiguous(), shift.contiguous(), grad_out, grad_x, relu)
        call()
        grad_scale, grad_shift = sums.sum(0)
    return grad_x, grad_scale.clone(), grad_shift.clone()


@_affine_relu_backward.register_fake
def _(grad_out, x, scale, shift, relu):
    return (
        torch.empty_like(x, memory_format=memory_format_of(x)),
        scale.new_empty(scale.shape),
        shift.new_empty(shift.shape),
    )
