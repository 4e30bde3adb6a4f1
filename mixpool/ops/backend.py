"""Which path computes a stem: the reference in plain PyTorch, or the fused one on the GPU, and why not the fused one.

    obstacle        what makes the fused path impossible for a call: a question without side effects
    why_reference   that, and under "auto" also what was measured on this GPU and whether a first trial went well
    takes_fused     the choice itself: logs the reason under "auto", raises it under "fused"

torch.compile traces these functions. What it cannot trace is asked in functions that it takes as constants.
"""

from __future__ import annotations

import functools
import importlib.resources
import importlib.util
import json
import logging
import math
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from mixpool.ops.fused.geometry import StemGeometry, is_channels_last, padded_places
from mixpool.ops.geometry import ConvGeometry, Pair, PoolGeometry, centers_are_inside
from mixpool.ops.trial import Case, failure_of_trial

BACKENDS = ("auto", "reference", "fused")
ENVIRONMENT_VARIABLE = "MIXPOOL_BACKEND"

MIN_CAPABILITY = (8, 0)  # bfloat16 and TF32 products, asynchronous copies
MIN_SPEEDUP = 1.15  # over torch.compile of the reference; below, the fused path is not the default
MAX_OFFSET = 2**31  # the kernels count elements in int32
ALIGNMENT = 16  # bytes

HAS_TRITON = importlib.util.find_spec("triton") is not None

_log = logging.getLogger("mixpool")
_logged: set[str] = set()


class Call(NamedTuple):
    """What the choice depends on; of the tensors only device, dtype, shape, layout and address."""

    x: Tensor
    weight: Tensor
    num_modulus: int
    conv: ConvGeometry
    pool: PoolGeometry
    blur: int
    max_blur: int
    needs_grad: bool
    with_moments: bool = False


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
    """None where the fused path computes a call, else why the reference does; the first call under "auto" tries it."""
    wanted = wanted_backend(backend)
    if wanted == "reference":
        return f"backend='reference' was asked for{_by_whom(backend)}"
    reason = obstacle(call)
    if reason is None and wanted == "auto":
        reason = _why_not_by_default(*_case_of(call))
    return reason


def compute_dtype(x: Tensor) -> torch.dtype:
    """dtype of the convolution's products and of the output: autocast's, or that of `x`."""
    device_type = x.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else x.dtype


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd records what is computed from these tensors."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


# --- can the fused path compute it? -----------------------------------------------------------------------------------


def obstacle(call: Call) -> str | None:
    """Why the fused path cannot compute a call, or None; a question without side effects."""
    x = call.x
    return (
        _device_obstacle(x.device.type, x.device.index)
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
    num_max = call.weight.shape[0] - call.num_modulus
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
    if call.max_blur != 1 and num_max > 0 and call.num_modulus == 0:
        return "it has no max_blur=3, and no channel takes the modulus"
    if call.blur == 1 and call.num_modulus > 0 and not centers_are_inside(pool):
        return "with blur=1 it needs every window's centre on the map (no ceil_mode with padding 1)"
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
        largest = max(largest, count * padded_places(weight.shape[0] - call.num_modulus) * pooled)
    if call.needs_grad and x.requires_grad:  # then the gradients of re and im are written
        largest = max(largest, count * 2 * weight.shape[0] * math.prod(geometry.conv_size))
    if largest >= MAX_OFFSET:
        return "the batch has 2**31 elements or more"
    return None


def _is_misaligned(x: Tensor) -> bool:
    return type(x) in (Tensor, torch.nn.Parameter) and x.data_ptr() % ALIGNMENT != 0


# --- should it? -------------------------------------------------------------------------------------------------------


def _case_of(call: Call) -> Case:
    x, weight = call.x, call.weight
    return Case(
        device=str(x.device),
        x_dtype=x.dtype,
        weight_dtype=weight.dtype,
        dtype=compute_dtype(x),
        layout="channels_last" if is_channels_last(x) else "NCHW",
        size=None if torch.compiler.is_compiling() else (x.shape[2], x.shape[3]),
        in_channels=weight.shape[1],
        kernel_size=weight.shape[2],
        num_max=0 if call.max_blur == 3 else weight.shape[0] - call.num_modulus,  # blurred ones are the reference's
        num_modulus=call.num_modulus,
        conv=call.conv,
        pool=call.pool,
        blur=call.blur,
        grads=(call.needs_grad and x.requires_grad, call.needs_grad),
        with_moments=call.with_moments,
    )


def _not_measured(case: Case) -> str | None:
    """Why the measured speeds do not make the fused path the default for a case, or None."""
    gpu, dtype = _gpu_name(case.device), str(case.dtype).removeprefix("torch.")
    speedups = _measured_speedups()
    for kernel in case.kernels:
        what = f"the {kernel} kernel in {case.mode} in {dtype}, {case.layout}"
        speedup = speedups.get((gpu, kernel, case.mode, dtype, case.layout))
        if speedup is None:
            return f"{what} was not measured on {gpu}; backend='fused' forces it"
        if speedup < MIN_SPEEDUP:
            return (
                f"{what} was measured at {speedup:.3f} times the speed of torch.compile on {gpu}, and the default "
                f"asks for {MIN_SPEEDUP}; backend='fused' forces it"
            )
    return None


@functools.cache
def _measured_speedups() -> dict[tuple[str, ...], float]:
    table = importlib.resources.files("mixpool.ops.fused").joinpath("measured.json")
    return _slowest(json.loads(table.read_text("utf-8")))


def _slowest(rows: list[dict]) -> dict[tuple[str, ...], float]:
    """(gpu, kernel, mode, dtype, layout) -> speed over torch.compile; the lowest where one was measured twice."""
    speedups: dict[tuple[str, ...], float] = {}
    for row in rows:
        key = tuple(row[name] for name in ("gpu", "kernel", "mode", "dtype", "layout"))
        speedups[key] = min(row["speedup"], speedups.get(key, math.inf))
    return speedups


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
def _gpu_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


@_constant
def _why_not_by_default(*case) -> str | None:
    """Why the fused path is not the default for a case, or None; a failed trial is logged."""
    case = Case(*case)
    reason = _not_measured(case)
    if reason is None:
        reason = failure_of_trial(case)
        if reason is not None:
            _log_once(logging.WARNING, reason)
    return reason


@_constant
def _log_once(level: int, reason: str) -> None:
    if reason not in _logged:
        _logged.add(reason)
        _log.log(level, "mixpool takes the reference path, not the fused one: %s", reason)
