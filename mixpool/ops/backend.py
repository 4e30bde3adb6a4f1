"""Which path computes a stem: the reference in plain PyTorch, or the fused one on the GPU, and why not the fused one.

    obstacle        what makes the fused path impossible for a call: a question without side effects
    why_reference   that, and under "auto" that the fused path is not the default
    takes_fused     the choice itself: logs the reason under "auto", raises it under "fused"

torch.compile traces these functions. What it cannot trace is asked in functions that it takes as constants.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from mixpool.ops.fused.geometry import StemGeometry, padded_places
from mixpool.ops.geometry import ConvGeometry, Pair, PoolGeometry, centers_are_inside
from mixpool.ops.modes import compute_dtype
from mixpool.ops.reference import POOLINGS, Group

BACKENDS = ("auto", "reference", "fused")
ENVIRONMENT_VARIABLE = "MIXPOOL_BACKEND"

MIN_CAPABILITY = (8, 0)  # bfloat16 and TF32 products, asynchronous copies
MAX_OFFSET = 2**31  # the kernels count elements in int32
ALIGNMENT = 16  # bytes
NOT_DEFAULT = "the fused path was never measured to be faster, so it is not the default; backend='fused' forces it"

HAS_TRITON = importlib.util.find_spec("triton") is not None

_log = logging.getLogger("mixpool")
_logged: set[str] = set()


class Call(NamedTuple):
    """What the choice depends on; of the tensors only device, dtype, shape, layout and address."""

    x: Tensor
    weight: Tensor
    groups: Sequence[Group]
    conv: ConvGeometry
    pool: PoolGeometry
    needs_grad: bool

    def count(self, *kernels: str | None) -> int:
        """Channels whose pooling has one of these kernels."""
        return sum(len(group.index) for group in self.groups if POOLINGS[group.pooling].kernel in kernels)


def check_backend(backend: str) -> str:
    """Return `backend`, or raise ValueError for one that does not exist."""
    if backend not in BACKENDS:
        raise ValueError(f"expected a backend of {BACKENDS}, got {backend!r}")
    return backend


def wanted_backend(backend: str) -> str:
    """The argument `backend`, or where that is "auto" the environment variable MIXPOOL_BACKEND, if it is set."""
    check_backend(backend)
    return _backend_of_environment() if backend == "auto" else backend


def takes_fused(backend: str, call: Call) -> bool:
    """Whether the fused path computes a call. A reason against it is logged once under "auto" and raised under "fused".

    Raises:
        ValueError: there is no such backend.
        RuntimeError: the fused path was asked for by name and cannot compute this call; the message says why.
    """
    reason = why_reference(backend, call)
    if reason is None:
        return True
    wanted = wanted_backend(backend)
    if wanted == "fused":
        raise RuntimeError(f"backend='fused' was asked for{_by_whom(backend)}, but {reason}")
    if wanted == "auto" and call.x.device.type == "cuda":
        _log_once(logging.INFO, reason)
    return False


def why_reference(backend: str, call: Call) -> str | None:
    """None where the fused path computes a call, else why the reference does."""
    wanted = wanted_backend(backend)
    if wanted == "reference":
        return f"backend='reference' was asked for{_by_whom(backend)}"
    reason = obstacle(call)
    if reason is None and wanted == "auto":
        reason = NOT_DEFAULT
    return reason


# --- can the fused path compute it? -----------------------------------------------------------------------------------


def obstacle(call: Call) -> str | None:
    """Why the fused path cannot compute a call, or None; a question without side effects."""
    x = call.x
    return (
        _device_obstacle(x.device.type, x.device.index)
        or _pooling_obstacle(call)
        or _mode_obstacle()
        or _tensor_obstacle(call)
        or _geometry_obstacle(call)
        or _memory_obstacle(call)
    )


def _device_obstacle(device_type: str, index: int | None) -> str | None:
    if device_type == "cpu" and _is_interpreted():
        return None if HAS_TRITON else "Triton is not installed"
    if device_type != "cuda":
        return f"the images are on {device_type!r}, and the fused path needs a CUDA device"
    if torch.version.hip is not None:
        return "it was not tried on AMD GPUs"
    capability = _capability(index)
    if capability < MIN_CAPABILITY:
        return f"it needs a GPU of compute capability 8.0 or newer, and this one has {capability[0]}.{capability[1]}"
    return None if HAS_TRITON else "Triton is not installed"


def _pooling_obstacle(call: Call) -> str | None:
    """Poolings without a kernel stay with the reference; there must be others."""
    if call.count("max", "modulus1", "modulus3") > 0:
        return None
    return f"it has no kernel for {' and '.join(group.pooling for group in call.groups)}"


def _mode_obstacle() -> str | None:
    """Transformations of the call that an operator with one derivative of its own cannot serve."""
    if torch._C._are_functorch_transforms_active():
        return "torch.func transforms the call"
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode derivatives are on, and it has none"
    if torch.jit.is_tracing():
        return "torch.jit.trace records the call"
    if _in_onnx_export():
        return "an export to ONNX is under way, which has no such operator"
    return None


def _tensor_obstacle(call: Call) -> str | None:
    x, weight = call.x, call.weight
    if is_traceable_wrapper_subclass(x) or is_traceable_wrapper_subclass(weight):
        return "it has no rule for distributed or otherwise wrapped tensors"
    dtype = compute_dtype(x)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it has no products in {dtype}"
    if x.dtype not in (torch.float32, dtype) or weight.dtype not in (torch.float32, dtype):
        return f"it does not convert {x.dtype} and {weight.dtype} to {dtype}"
    if not torch.is_autocast_enabled(x.device.type) and weight.dtype != x.dtype:
        return f"images and weights differ in dtype, {x.dtype} and {weight.dtype}"
    if dtype == torch.float32 and x.device.type == "cuda" and not _allows_tf32():
        return "TF32 is off for convolutions (torch.backends.cudnn.allow_tf32), and it has no other float32 products"
    if dtype == torch.bfloat16 and x.device.type == "cpu":
        return "Triton's interpreter multiplies the bits of bfloat16 numbers as if they were integers"
    return None


def _geometry_obstacle(call: Call) -> str | None:
    conv, pool = call.conv, call.pool
    kernel_height, kernel_width = call.weight.shape[2:]
    if call.x.shape[1] > 4:
        return "it takes up to 4 input channels"
    if kernel_height != kernel_width or conv.stride[0] != conv.stride[1] or conv.padding[0] != conv.padding[1]:
        return "it needs a convolution with a square kernel, one stride and one padding"
    if not 3 <= kernel_height <= 11:
        return "it takes kernels of 3 to 11 pixels"
    if conv.stride[0] not in (1, 2, 4) or conv.dilation != (1, 1):
        return "it needs a convolution of stride 1, 2 or 4 without dilation"
    if pool.size != (3, 3) or pool.stride != (2, 2) or pool.padding not in ((0, 0), (1, 1)):
        return "it needs a pooling window of 3, stride 2 and padding 0 or 1"
    if call.count("modulus1") > 0 and not centers_are_inside(pool):
        return 'for "cmod" it needs every window\'s centre on the map (no ceil_mode with padding 1)'
    return None


def _memory_obstacle(call: Call) -> str | None:
    x, weight = call.x, call.weight
    count = x.shape[0]
    if count == 0:
        return "the batch is empty"
    geometry = StemGeometry.of(x, weight, call.conv, call.pool)
    if min(geometry.conv_size) < 1:
        return "the images are smaller than the kernel"
    if min(geometry.pooled_size) < 1:
        return "the convolution's map is smaller than the pooling window"
    if x.stride(3) != 1 and not (x.stride(1) == 1 and x.stride(3) == x.shape[1]):
        return "the pixels of a row do not lie side by side in memory"
    # A compiled graph gets other addresses than its trace, and fake tensors have none.
    if not torch.compiler.is_compiling() and _is_misaligned(x):
        return f"the images do not start at a multiple of {ALIGNMENT} bytes"
    last = sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
    pooled = math.prod(geometry.pooled_size)
    largest = max(last, count * weight.shape[0] * pooled)
    if call.needs_grad:
        largest = max(largest, count * padded_places(call.count("max")) * pooled)
    if call.needs_grad and x.requires_grad:  # then the gradients of re and im are written
        largest = max(largest, count * 2 * weight.shape[0] * math.prod(geometry.conv_size))
    if largest >= MAX_OFFSET:
        return "the batch has 2**31 elements or more"
    return None


def _is_misaligned(x: Tensor) -> bool:
    return type(x) in (Tensor, torch.nn.Parameter) and x.data_ptr() % ALIGNMENT != 0


# --- questions to the machine, constants to torch.compile -------------------------------------------------------------


def _constant(function: Callable) -> Callable:
    """As torch.compiler.assume_constant_result, which would import the compiler. Takes and returns constants only."""
    function._dynamo_marked_constant = True
    return function


@_constant
def _backend_of_environment() -> str:
    backend = os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
    if backend not in BACKENDS:
        raise ValueError(f"expected the environment variable {ENVIRONMENT_VARIABLE} of {BACKENDS}, got {backend!r}")
    return backend


@_constant
def _by_whom(backend: str) -> str:
    return "" if backend != "auto" else f" by the environment variable {ENVIRONMENT_VARIABLE}"


@_constant
def _is_interpreted() -> bool:
    """Whether Triton runs its kernels in Python, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@_constant
def _capability(index: int | None) -> Pair:
    return torch.cuda.get_device_capability(index)


@_constant
def _allows_tf32() -> bool:
    by_operator = getattr(torch.backends.cudnn, "conv", None)  # newer than allow_tf32, which raises where both are used
    return torch.backends.cudnn.allow_tf32 if by_operator is None else by_operator.fp32_precision == "tf32"


@_constant
def _in_onnx_export() -> bool:
    return torch.onnx.is_in_onnx_export()


@_constant
def _log_once(level: int, reason: str) -> None:
    if reason not in _logged:
        _logged.add(reason)
        _log.log(level, "mixpool takes the reference path, not the fused one: %s", reason)
