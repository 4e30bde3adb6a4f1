"""The modes in which an operation runs: one by one, compiled, transformed, under autocast, in half precision."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def is_eager() -> bool:
    """Whether operators run one by one, so that a function with a backward pass of its own saves passes over memory."""
    return not (torch.compiler.is_compiling() or torch.jit.is_tracing() or in_functorch())


def in_functorch() -> bool:
    """Whether torch.func transforms the call (vmap cannot change memory formats)."""
    return torch._C._are_functorch_transforms_active()


def without_autocast(tensor: Tensor) -> AbstractContextManager:
    """Context in which `tensor`'s dtype stays what it is: sums that autocast would round are done in float32."""
    if tensor.device.type == "meta":
        return nullcontext()
    return torch.autocast(tensor.device.type, enabled=False)


def widened(values: Tensor) -> Tensor:
    """Float32 for the half types, whose sums and squares are too coarse; else the same."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
