"""What can be found out about a run before hours are spent on it."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from mixpool.evaluation.runner import logits_of
from mixpool.selection.images import evaluating

MIB = 2**20
# Weights, gradients and what the optimizer keeps: none for plain SGD, two tensors for Adam and its relatives.
MOMENTS = {"sgd": 1, "momentum": 1, "nesterov": 1, "lion": 1, "lars": 1, "rmsprop": 1}


def count_outputs(model: nn.Module, images: Tensor) -> int:
    """How many logits a model gives for some images; ValueError if its output is no (N, classes) of finite numbers."""
    with evaluating(model):
        out = logits_of(model, images)
    if not torch.isfinite(out).all():
        raise ValueError("the model's outputs on the first images are not finite: are the weights damaged?")
    return out.shape[1]


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that training will take, per process.

    Attributes:
        weights: of the weights, gradients, the optimizer's moments and the moving average.
        activations: of what is kept for the backward pass of one batch; temporary buffers come on top.
        available: bytes that the device has free now, None if that is unknown.
    """

    weights: int
    activations: int
    available: int | None

    @property
    def is_enough(self) -> bool:
        return self.available is None or self.weights + self.activations <= self.available

    def __str__(self) -> str:
        free = "" if self.available is None else f"; {self.available / MIB:,.0f} MiB are free"
        return (
            f"memory, estimated: {self.weights / MIB:,.0f} MiB for weights, gradients and optimizer, "
            f"{self.activations / MIB:,.0f} MiB for the activations of a batch{free}"
        )


def estimate_memory(model: nn.Module, images: Tensor, options, device: torch.device) -> MemoryEstimate:
    """Measure what a copy of the model keeps for the backward pass of these few images, and scale to a whole batch."""
    probe = copy.deepcopy(model).train()
    own = {tensor.untyped_storage().data_ptr() for tensor in (*probe.parameters(), *probe.buffers(), images)}
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    alive = []
    generator = torch.get_rng_state()  # dropout draws from it, and a check must not change what is trained
    with saved_tensors_hooks(lambda tensor: (alive.append(tensor), count(tensor))[1], lambda tensor: tensor):
        probe(images)
    torch.set_rng_state(generator)
    moments = MOMENTS.get(options.opt.lower(), 2) if options.momentum or options.opt.lower() != "sgd" else 0
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    half = 0.5 if options.amp else 1.0
    return MemoryEstimate(
        weights=size * (2 + moments + options.model_ema),
        activations=round(sum(kept.values()) * half * options.batch_size / len(images)),
        available=_available(device),
    )


def _available(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # only Linux tells
        return None
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024 if found else None


def half_precision_slowdown(dtype: torch.dtype) -> float:
    """The time of a small convolution and its backward pass on this CPU in half precision over that in float32.

    A CPU without instructions for a dtype emulates it, for bfloat16 and AVX2 alone 20 times as slowly as float32, where
    one with AVX512-BF16 or AMX gains by it.
    """
    return min(_time_conv(dtype) for _ in range(3)) / min(_time_conv(torch.float32) for _ in range(3))


def _time_conv(dtype: torch.dtype) -> float:
    """Seconds; the tensors are made without the generator, which a check must not advance."""
    images, weight = torch.ones(4, 32, 16, 16, dtype=dtype), torch.ones(32, 32, 3, 3, dtype=dtype, requires_grad=True)
    start = time.perf_counter()
    nn.functional.conv2d(images, weight, padding=1).sum().backward()
    return time.perf_counter() - start
