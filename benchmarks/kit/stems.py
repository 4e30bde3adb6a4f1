"""The stems that are timed: their shapes, the plans of their channels, and the modules that compute them.

Filters are a Gabor bank; the norm layer has scales, means and variances as a trained one. Every builder draws the same
numbers, so that all providers of a case compute with the same weights.
"""

from __future__ import annotations

import inspect
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mixpool import MixPoolStem, convert
from mixpool.filters.gabor import gabor_bank
from mixpool.ops.reference import POOLINGS
from mixpool.selection.calibrate import calibrate
from mixpool.selection.rules import Select, choose


class Unavailable(Exception):
    """A provider that this machine or this version does not have; the message says why."""


class StemShape(NamedTuple):
    """A stem on square images of `size` pixels: conv, batch norm or bias, ReLU, max pool of 3 at stride 2."""

    name: str
    size: int
    kernel_size: int
    conv_stride: int
    conv_padding: int
    pool_padding: int
    norm: bool
    out_channels: int = 64
    in_channels: int = 3

    @property
    def conv_size(self) -> tuple[int, int]:
        """(height, width) after the convolution."""
        return ((self.size + 2 * self.conv_padding - self.kernel_size) // self.conv_stride + 1,) * 2

    @property
    def pooled_size(self) -> tuple[int, int]:
        """(height, width) of the output."""
        return ((self.conv_size[0] + 2 * self.pool_padding - 3) // 2 + 1,) * 2

    def params(self, batch: int) -> dict[str, int]:
        """The fields of a record."""
        return {
            "N": batch,
            "C_in": self.in_channels,
            "C_out": self.out_channels,
            "H": self.size,
            "W": self.size,
            "kernel_size": self.kernel_size,
            "conv_stride": self.conv_stride,
            "conv_padding": self.conv_padding,
            "pool_size": 3,
            "pool_stride": 2,
            "pool_padding": self.pool_padding,
        }


class Plan(NamedTuple):
    """The poolings of a stem's channels: its name, and the poolings that the channels have in turn.

    In a mix they lie together no more than in a trained stem.
    """

    name: str
    turns: tuple[str, ...]

    def poolings(self, channels: int) -> list[str]:
        return [self.turns[channel % len(self.turns)] for channel in range(channels)]

    def num_complex(self, channels: int) -> int:
        return sum(POOLINGS[name].is_complex for name in self.poolings(channels))


RESNET = StemShape("resnet_stem", 224, 7, 2, 3, 1, norm=True)
ALEXNET = StemShape("alexnet_stem", 224, 11, 4, 2, 0, norm=False)
MAX, CMOD, MODULUS = (Plan(name, (name,)) for name in ("max", "cmod", "modulus"))
MIX = Plan("mix", ("max", "modulus"))
PLANS = (MIX, MAX, CMOD, MODULUS)

# As `torch.float32` is named where the matrix units may round it to tf32, and float32 under bfloat16 autocast.
TORCH_DTYPE = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "tf32": torch.float32,
    "autocast": torch.float32,
}
MEMORY_FORMAT = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


def stem_parts(
    shape: StemShape, dtype: str = "float32", device: str = "cpu", layout: str = "NCHW", seed: int = 0
) -> tuple[nn.Conv2d, nn.BatchNorm2d | None, nn.ReLU, nn.MaxPool2d]:
    """conv, norm (or None), relu and pool; the norm is float32 around a half-precision convolution, as in autocast."""
    generator = torch.Generator().manual_seed(seed)
    conv = nn.Conv2d(
        shape.in_channels, shape.out_channels, shape.kernel_size, shape.conv_stride, shape.conv_padding,
        bias=not shape.norm,
    )  # fmt: skip
    norm = nn.BatchNorm2d(shape.out_channels) if shape.norm else None
    with torch.no_grad():
        conv.weight.copy_(gabor_bank(shape.out_channels, shape.in_channels, shape.kernel_size))
        if conv.bias is not None:
            conv.bias.normal_(0, 0.1, generator=generator)
        if norm is not None:
            norm.weight.normal_(1, 0.2, generator=generator)
            norm.bias.normal_(0, 0.2, generator=generator)
            norm.running_mean.normal_(0, 0.1, generator=generator)
            norm.running_var.uniform_(0.5, 2, generator=generator)
            norm.weight[1::8] *= -1
    conv = conv.to(device, TORCH_DTYPE[dtype], memory_format=MEMORY_FORMAT[layout])
    pool = nn.MaxPool2d(3, 2, shape.pool_padding)
    return conv, None if norm is None else norm.to(device), nn.ReLU(inplace=True), pool


def stock_stem(shape: StemShape, **where) -> nn.Module:
    """What the model has today."""
    return nn.Sequential(*(part for part in stem_parts(shape, **where) if part is not None))


def mixpool_stem(shape: StemShape, plan: Plan, backend: str, **where) -> MixPoolStem:
    """The stem with a plan and a backend by name; Unavailable where this version has no such backend."""
    poolings = plan.poolings(shape.out_channels)
    return MixPoolStem(*stem_parts(shape, **where), pooling=poolings, **backend_option(MixPoolStem, backend))


def chosen_stem(parts: tuple, select: Select = "auto", **options: str) -> MixPoolStem:
    """The stem of these parts with the plan, and calibrated, as `convert` does it without images; its options, too."""
    stem = MixPoolStem(*parts, backend=options.pop("backend", "auto"))
    plan, fits = choose(stem, select, **options)
    stem.lay(plan.poolings)
    if fits is not None:
        calibrate(stem, fits)
    return stem


def convert_by(plan: Plan, model: nn.Module, backend: str) -> nn.Module:
    """A timm ResNet with a Gabor bank and a plan for its stem's channels; in place."""
    with torch.no_grad():
        model.conv1.weight.copy_(gabor_bank(*model.conv1.weight.shape[:2], model.conv1.kernel_size[0]))
    convert(model, select=plan.poolings(model.conv1.out_channels), **backend_option(convert, backend))
    return model


def backend_option(function, backend: str) -> dict[str, str]:
    """backend= for a function that has it. Without it there is only the reference, which then needs no naming."""
    if "backend" in inspect.signature(function).parameters:
        return {"backend": backend}
    if backend == "reference":
        return {}
    raise Unavailable(f"this version of mixpool has no backend={backend!r}")


def images(
    shape: StemShape, batch: int, dtype: str, device: str = "cpu", layout: str = "NCHW", seed: int = 0
) -> Tensor:
    """Random images, (N, C_in, H, W), about as large as normalised photographs."""
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(batch, shape.in_channels, shape.size, shape.size, generator=generator, device=device)
    return x.to(TORCH_DTYPE[dtype], memory_format=MEMORY_FORMAT[layout])
