"""How filters pool photographs: the statistics of `selection.compare`, of explicit filters and of wavelet packets."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kit.dtcwpt import DTCWPT
from benchmarks.kit.sample import IMAGENET_STD
from mixpool.filters.packets import dtcwpt_filters
from mixpool.selection.compare import Comparison, Poolings, pool_both

GRAY = torch.tensor([0.299, 0.587, 0.114])[:, None, None]

Maps = Callable[[Tensor], tuple[Tensor, Tensor]]  # images (N, 3, H, W) -> real and imaginary maps


def filter_maps(weight: Tensor, weight_imag: Tensor, stride: int) -> Maps:
    """Complex maps of explicit filters."""
    kernels = torch.cat([weight, weight_imag]).contiguous(memory_format=torch.channels_last)

    def maps(images: Tensor) -> tuple[Tensor, Tensor]:
        return F.conv2d(images.contiguous(memory_format=torch.channels_last), kernels, stride=stride).chunk(2, dim=1)

    return maps


def packet_maps(depth: int) -> Maps:
    """Complex maps of all packets on the luminance, without the border, at the stride 2^(depth - 1)."""
    transform = DTCWPT(depth, stride=2 ** (depth - 1))
    border = -(-(dtcwpt_filters(depth).kernel_size // 2) // transform.stride)
    gray = GRAY * torch.tensor(IMAGENET_STD)[:, None, None]  # of images that are normalised

    def maps(images: Tensor) -> tuple[Tensor, Tensor]:
        z = transform((images * gray).sum(dim=1, keepdim=True))[:, 0, :, border:-border, border:-border]
        return z.real.contiguous(), z.imag.contiguous()

    return maps


def compare(maps: Maps, images: Tensor, shift: tuple[int, int] = (0, 1), batch: int = 8) -> dict[str, Tensor]:
    """Statistics of the poolings over images, by name; adds gain, offset and level of the blurred modulus."""
    comparison, affine = Comparison(), 0
    height, width = images.shape[-2] - shift[0], images.shape[-1] - shift[1]
    for images_here in images.split(batch):
        here = pool_both(*maps(images_here[..., :height, :width]))
        there = pool_both(*maps(images_here[..., shift[0] :, shift[1] :]))
        comparison.add(here, [there])
        affine = affine + affine_sums(here)
    r, b, rb, bb = affine / affine.new_tensor(len(images))
    gain = (rb - r * b) / (bb - b * b)
    stats = {name: values.flatten() for name, values in comparison.result()._asdict().items()}
    return stats | {"gain": gain, "offset": (r - gain * b) / bb.sqrt(), "level": bb.sqrt().log()}


def affine_sums(maps: Poolings) -> Tensor:
    """(4, C) sums over images of the mean R, B, R B and B^2."""
    r, b = maps.max.double(), maps.blurred.double()
    return torch.stack([term.mean(dim=(2, 3)).sum(dim=0) for term in (r, b, r * b, b * b)])
