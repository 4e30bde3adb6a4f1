"""The modes in which an operation runs: one by one, compiled, transformed, under autocast, in half precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor


def is_eager() -> bool:
    """Whether operators run one by one, so that a function with a backward pass of its own saves passes over memory."""
    return not (torch.compiler.is_compiling() or torch.jit.is_tracing() or in_functorch())


def is_compiled_for_one_size(x: Tensor) -> bool:
    """Whether torch.compile makes a graph for images of this size alone (an exported graph is for others too)."""
    if not torch.compiler.is_dynamo_compiling() or torch.compiler.is_exporting():
        return False
    from torch.fx.experimental.symbolic_shapes import has_static_value  # as heavy as the compiler, which has it by now

    return all(has_static_value(length) for length in x.shape)  # all are instances of int to the compiler


def in_functorch() -> bool:
    """Whether torch.func transforms the call (vmap cannot change memory formats)."""
    return torch._C._are_functorch_transforms_active()


def is_batched(tensor: Tensor) -> bool:
    """Whether it stands for many tensors, as in torch.autograd.grad(is_grads_batched=True): no `out=` for them."""
    return in_functorch() or torch._C._functorch.is_legacy_batchedtensor(tensor)


def without_autocast(tensor: Tensor) -> AbstractContextManager:
    """Context in which `tensor`'s dtype stays what it is: sums that autocast would round are done in float32."""
    if tensor.device.type == "meta":
        return nullcontext()
    return torch.autocast(tensor.device.type, enabled=False)


def widened(values: Tensor) -> Tensor:
    """Float32 for the half types, whose sums and squares are too coarse; else the same."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def compute_dtype(x: Tensor) -> torch.dtype:
    """dtype of the convolution's products and of the output: autocast's, or that of `x`."""
    device_type = x.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else x.dtype


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd records what is computed from these tensors."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


@contextmanager
def of_nobody() -> Iterator[None]:
    """Without the caller's modes: what is made here is an ordinary tensor on the CPU, whatever runs around it.

    Neither torch.inference_mode (whose tensors cannot be saved for a backward pass) nor a default device, nor autocast.
    """
    with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"), torch.autocast("cpu", enabled=False):
        yield
