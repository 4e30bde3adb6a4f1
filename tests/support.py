"""What the tests share: tolerances, comparison, stems, filters, and the definition of the operation as plain loops.

Legend: N images, C channels, (H, W) of the tensor at hand, K kernel side, a and b the affine step.
"""

from __future__ import annotations

import math
import os
import pickle
import socket
import warnings
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.multiprocessing
from torch import Tensor, nn

# (absolute, relative), for values of order 1. A looser local value needs a "because".
TOLERANCE = {
    torch.float64: (1e-10, 1e-10),
    torch.float32: (2e-5, 2e-5),
    torch.float16: (5e-3, 5e-3),
    torch.bfloat16: (4e-2, 2e-2),  # the convolution is rounded to 8 bits before it is pooled
}


def assert_close(
    name: str, actual: Tensor, expected: Tensor | np.ndarray, tolerance: tuple[float, float] | None = None
) -> None:
    """Compare within the tolerance of `actual`'s dtype; a failure prints the worst index and both values there."""
    assert isinstance(actual, Tensor), f"{name}: expected a tensor, got {type(actual).__name__}"
    expected = torch.as_tensor(expected).detach().cpu()
    assert actual.shape == expected.shape, f"{name}: {tuple(actual.shape)=} but {tuple(expected.shape)=}"
    atol, rtol = TOLERANCE[actual.dtype] if tolerance is None else tolerance
    actual, expected = actual.detach().cpu().double(), expected.double()
    if actual.numel() == 0:
        return
    assert torch.isfinite(expected).all(), f"{name}: the expected values are not finite"
    error = (actual - expected).abs()
    excess = torch.nan_to_num(error - (atol + rtol * expected.abs()), nan=math.inf)
    if excess.max() > 0:
        worst = tuple(int(i) for i in np.unravel_index(int(excess.argmax()), actual.shape))
        raise AssertionError(
            f"{name}: worst at {worst}: got {actual[worst]:.9g}, expected {expected[worst]:.9g}; {atol=:g} {rtol=:g}; "
            f"{int((excess > 0).sum())} of {excess.numel()} values differ, rms error {error.square().mean().sqrt():.3g}"
        )


def assert_same_bits(name: str, actual: Tensor, expected: Tensor) -> None:
    """Equal shape, dtype and values, bit by bit but for the sign of zero."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype, f"{name}: another shape or dtype"
    different = actual != expected
    if different.any():
        worst = tuple(different.nonzero()[0].tolist())
        raise AssertionError(
            f"{name}: {int(different.sum())} of {different.numel()} values differ, first at {worst}: "
            f"got {actual[worst].item():.9g}, expected {expected[worst].item():.9g}"
        )


COMPLEX = ("cmod", "modulus", "energy")

# --- the definition ---------------------------------------------------------------------------------------------------


def pooled_length(length: int, size: int, stride: int, padding: int, ceil_mode: bool) -> int:
    """PyTorch's rule: with ceil_mode, windows may hang over, but must start inside the map or its left padding."""
    steps = (length + 2 * padding - size) / stride
    count = (math.ceil(steps) if ceil_mode else math.floor(steps)) + 1
    if ceil_mode and (count - 1) * stride >= length + padding:
        count -= 1
    return count


def definition(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    pooling: Sequence[str],
    weight_imag: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    act: Callable[[np.ndarray], np.ndarray] = lambda v: np.maximum(v, 0.0),
    conv_stride: tuple[int, int] = (1, 1),
    conv_padding: tuple[int, int] = (0, 0),
    conv_dilation: tuple[int, int] = (1, 1),
    pool_size: tuple[int, int] = (3, 3),
    pool_stride: tuple[int, int] = (2, 2),
    pool_padding: tuple[int, int] = (0, 0),
    ceil_mode: bool = False,
) -> np.ndarray:
    """The operation of the specification, written as loops over output positions in float64; nothing of mixpool.

    With b = a * bias + shift, z = conv(x; W + iV), and all over the window:

    max       max of act(a conv(x; W) + b);  blurpool  the same at every position, then a binomial decimation
    cmod      act(|a| |z| at the centre + b)
    modulus   act(|a| lowpass of |z| + b);   energy    act(|a| root of the lowpass of |z|^2 + b)
    """
    x, weight = _array(x), _array(weight)
    channels = len(weight)
    bias = np.zeros(channels) if bias is None else _array(bias)
    scale = np.ones(channels) if scale is None else _array(scale)
    shift = np.zeros(channels) if shift is None else _array(shift)
    offset = scale * bias + shift
    real = _convolve(x, weight, conv_stride, conv_padding, conv_dilation)
    if set(pooling) & set(COMPLEX):
        imaginary = _convolve(x, _array(weight_imag), conv_stride, conv_padding, conv_dilation)
    height, width = real.shape[-2:]
    out_size = [
        pooled_length(length, *axis, ceil_mode)
        for length, axis in zip((height, width), zip(pool_size, pool_stride, pool_padding))
    ]
    out = np.full((len(x), channels, *out_size), np.nan)
    for channel in range(channels):
        for n in range(len(x)):
            if pooling[channel] in COMPLEX:
                envelope = np.hypot(real[n, channel], imaginary[n, channel])
                windows = (out_size, pool_size, pool_stride, pool_padding)
                if pooling[channel] == "cmod":
                    pooled = _centers(envelope, *windows)
                elif pooling[channel] == "modulus":
                    pooled = _lowpass(envelope, *windows)
                else:
                    pooled = np.sqrt(_lowpass(envelope**2, *windows))
                out[n, channel] = act(abs(scale[channel]) * pooled + offset[channel])
                continue
            activated = act(scale[channel] * real[n, channel] + offset[channel])
            if pooling[channel] == "max":
                out[n, channel] = _window_maxima(activated, out_size, pool_size, pool_stride, pool_padding)
                continue
            dense_size = [  # every position of the window, as far as the last one that the output needs
                max(length + 2 * padding - size + 1, (count - 1) * stride + 1)
                for length, size, stride, padding, count in zip(
                    (height, width), pool_size, pool_stride, pool_padding, out_size
                )
            ]
            dense = _window_maxima(activated, dense_size, pool_size, (1, 1), pool_padding)
            out[n, channel] = _binomial_decimation(dense, out_size, pool_stride)
    return out


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().cpu().contiguous().numpy()


def _convolve(x, weight, stride, padding, dilation) -> np.ndarray:
    padded = np.pad(x, ((0, 0), (0, 0), (padding[0],) * 2, (padding[1],) * 2))
    span = [dilation[axis] * (weight.shape[2 + axis] - 1) + 1 for axis in (0, 1)]
    size = [(padded.shape[2 + axis] - span[axis]) // stride[axis] + 1 for axis in (0, 1)]
    out = np.zeros((len(x), len(weight), *size))
    for i in range(size[0]):
        for j in range(size[1]):
            top, left = i * stride[0], j * stride[1]
            patch = padded[:, :, top : top + span[0] : dilation[0], left : left + span[1] : dilation[1]]
            out[:, :, i, j] = np.tensordot(patch, weight, axes=((1, 2, 3), (1, 2, 3)))
    return out


def _window(start: int, size: int, length: int) -> list[tuple[int, int]]:
    """(tap, position) of each position of a window that lies on the map."""
    return [(tap, start + tap) for tap in range(size) if 0 <= start + tap < length]


def _window_maxima(values, out_size, size, stride, padding) -> np.ndarray:
    out = np.full(out_size, -np.inf)
    for i in range(out_size[0]):
        for j in range(out_size[1]):
            for _, row in _window(i * stride[0] - padding[0], size[0], values.shape[0]):
                for _, column in _window(j * stride[1] - padding[1], size[1], values.shape[1]):
                    out[i, j] = max(out[i, j], values[row, column])
    return out


def _centers(envelope, out_size, size, stride, padding) -> np.ndarray:
    """At the centre, upper left in an even window, moved onto the map where it lies outside."""
    out = np.full(out_size, np.nan)
    for i in range(out_size[0]):
        for j in range(out_size[1]):
            row = i * stride[0] - padding[0] + (size[0] - 1) // 2
            column = j * stride[1] - padding[1] + (size[1] - 1) // 2
            row, column = min(max(row, 0), envelope.shape[0] - 1), min(max(column, 0), envelope.shape[1] - 1)
            out[i, j] = envelope[row, column]
    return out


def _lowpass(envelope, out_size, size, stride, padding) -> np.ndarray:
    binomial = {1: [1.0], 2: [1.0, 1.0], 3: [1.0, 2.0, 1.0]}
    out = np.full(out_size, np.nan)
    for i in range(out_size[0]):
        for j in range(out_size[1]):
            top, left = i * stride[0] - padding[0], j * stride[1] - padding[1]
            total = weights = 0.0
            for tap_y, row in _window(top, size[0], envelope.shape[0]):
                for tap_x, column in _window(left, size[1], envelope.shape[1]):
                    tap = binomial[size[0]][tap_y] * binomial[size[1]][tap_x]
                    total, weights = total + tap * envelope[row, column], weights + tap
            out[i, j] = total / weights
    return out


def _binomial_decimation(values, out_size, stride) -> np.ndarray:
    def mirrored(position: int, length: int) -> int:
        if length == 1:
            return 0
        return length - 1 - abs(length - 1 - abs(position))

    out = np.zeros(out_size)
    for i in range(out_size[0]):
        for j in range(out_size[1]):
            for dy, tap_y in ((-1, 1), (0, 2), (1, 1)):
                for dx, tap_x in ((-1, 1), (0, 2), (1, 1)):
                    row = mirrored(i * stride[0] + dy, values.shape[0])
                    column = mirrored(j * stride[1] + dx, values.shape[1])
                    out[i, j] += tap_y * tap_x / 16 * values[row, column]
    return out


# --- stems ------------------------------------------------------------------------------------------------------------

SWAPPED = (True, False, False, True, True, False, True)  # one off a power of two, both kinds, not in order


def plan_of(pooling: str = "modulus", rest: str = "max") -> tuple[str, ...]:
    """A pooling for each of seven channels."""
    return tuple(pooling if flag else rest for flag in SWAPPED)


ALL_MAX = ("max",) * 7
ALL_MODULUS = ("modulus",) * 7
MIXED = plan_of()
EVERY = ("energy", "max", "blurpool", "modulus", "cmod", "max", "energy")
PLANS = {
    "all-max": ALL_MAX,
    "all-modulus": ALL_MODULUS,
    "mixed": MIXED,
    "cmod": plan_of("cmod"),
    "energy": ("energy",) * 7,
    "modulus and blurpool": plan_of("modulus", "blurpool"),
    "every": EVERY,
}


def stem_parts(
    channels: int = 7,
    *,
    in_channels: int = 3,
    kernel_size: int | tuple[int, int] = 5,
    stride: int | tuple[int, int] = 2,
    padding: int | tuple[int, int] = 2,
    bias: bool = False,
    norm: bool = True,
    pool: nn.MaxPool2d | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 1,
    **norm_options,
) -> tuple[nn.Conv2d, nn.BatchNorm2d | None, nn.ReLU, nn.MaxPool2d]:
    """conv, norm (or None), relu and max pool as a trained model has them: gammas of both signs and one of 0."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    conv = nn.Conv2d(in_channels, channels, kernel_size, stride, padding, bias=bias, dtype=dtype)
    norm_layer = nn.BatchNorm2d(channels, dtype=dtype, **norm_options) if norm else None
    with torch.no_grad():
        fan_in = conv.weight[0].numel()
        conv.weight.copy_(random(*conv.weight.shape) / math.sqrt(fan_in))
        if bias:
            conv.bias.copy_(random(channels) / 2)
        if norm and norm_layer.affine:
            norm_layer.weight.copy_(random(channels) + 0.3)
            norm_layer.weight[channels // 2] = 0.0
            norm_layer.weight[-1] = -0.8
            norm_layer.bias.copy_(random(channels) / 2 + 0.2)
        if norm and norm_layer.track_running_stats:
            norm_layer.running_mean.copy_(random(channels) / 3)
            norm_layer.running_var.copy_(random(channels).square() + 0.3)
    return conv, norm_layer, nn.ReLU(), nn.MaxPool2d(3, 2, 1) if pool is None else pool


# --- two processes ---------------------------------------------------------------------------------------------------
# Here and not in the test files, so that the processes need not import those and their libraries.


def run_on_two_processes(worker: Callable, *arguments) -> list[dict[str, Tensor]]:
    """What `worker(rank, *arguments)` returns on each of two gloo processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    results = torch.multiprocessing.get_context("spawn").SimpleQueue()
    # As bytes: tensors themselves would lie in memory that both processes share, and would be updated twice.
    task = pickle.dumps((worker, arguments))
    running = torch.multiprocessing.spawn(_process, (port, task, results), nprocs=2, join=False)
    by_rank = {}
    while len(by_rank) < 2:
        # A process answers before it ends: only if there is no answer does it matter how one has ended.
        failure = _failure(running) if results.empty() else None
        if not results.empty():
            rank, answer = pickle.loads(results.get())
            by_rank[rank] = answer
        elif failure is not None:
            raise failure
    return [by_rank[rank] for rank in (0, 1)]


def _failure(running, patience: float = 0.1) -> Exception | None:
    """What a process has raised; waits for that for `patience` seconds."""
    try:
        return RuntimeError("both processes ended without an answer") if running.join(timeout=patience) else None
    except (
        torch.multiprocessing.ProcessExitedException,
        torch.multiprocessing.ProcessRaisedException,
    ) as error:
        return error


def _process(rank: int, port: int, task: bytes, results) -> None:
    torch.set_num_threads(1)
    worker, arguments = pickle.loads(task)
    warnings.filterwarnings("error", module="mixpool")
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    answer = worker(rank, *arguments)
    results.put(pickle.dumps((rank, {name: tensor.detach() for name, tensor in answer.items()})))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    # Not through the interpreter's shutdown, in which gloo's threads were once seen to abort the process.
    os._exit(0)


def two_training_steps(stem: nn.Module, batches: list[Tensor], upstreams: list[Tensor]) -> dict[str, Tensor]:
    """Outputs and summed gradients of two steps, and the state after them."""
    answer = {}
    for step, (x, upstream) in enumerate(zip(batches, upstreams)):
        x = x.clone().requires_grad_()
        out = stem(x)
        out.backward(upstream)
        answer |= {f"out {step}": out, f"grad x {step}": x.grad}
    answer |= {f"grad {name}": p.grad for name, p in stem.named_parameters()}
    return answer | {name: buffer.clone() for name, buffer in stem.bn.named_buffers()}


def sync_batch_norm_worker(rank, stem, batches, upstreams, splits):
    rows = [slice(None, split) if rank == 0 else slice(split, None) for split in splits]
    parts = [[tensor[row] for tensor, row in zip(tensors, rows)] for tensors in (batches, upstreams)]
    return two_training_steps(stem.train(), *parts)


def data_parallel_worker(rank, stems, x, upstream):
    """Gradients of each stem under DDP, half of the batch on each process."""
    rows = slice(0, 2) if rank == 0 else slice(2, 4)
    for stem in stems.values():
        model = nn.parallel.DistributedDataParallel(stem)  # has to live as long as the backward pass
        model(x[rows]).backward(upstream[rows])
    return {f"{kind}: {name}": p.grad for kind, stem in stems.items() for name, p in stem.named_parameters()}


# --- filters ----------------------------------------------------------------------------------------------------------


def gabor(
    frequency: float,
    angle: float,
    kernel_size: int | tuple[int, int],
    sigma: float,
    phase: float = 0.0,
    colors: Sequence[float] = (1.0,),
) -> Tensor:
    """(1, C_in, kH, kW) float64: a cosine wave of `frequency` rad/px along `angle` (x right, y down) in a Gaussian."""
    height, width = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
    y = torch.arange(height, dtype=torch.float64)[:, None] - (height - 1) / 2
    x = torch.arange(width, dtype=torch.float64) - (width - 1) / 2
    wave = torch.cos(frequency * (math.sin(angle) * y + math.cos(angle) * x) + phase)
    return (wave * torch.exp(-(y**2 + x**2) / (2 * sigma**2)))[None, None] * torch.tensor(colors).double()[
        None, :, None, None
    ]
