"""What both poolings of a filter will do on photographs, predicted from its weights alone.

The theory's gamma (`theory.expected_gap`) sees a filter's centre frequency only; the envelope of a learned filter,
whose band is as wide as the theory allows, varies inside the window and leaves a gap that gamma does not see. Here the
whole filter counts: both its poolings run on a fixed set of synthetic pictures (`dead_leaves`) and are compared as they
would be on photographs (`compare`). No photograph is read, nothing is random, and a filter's scale does not matter.

Each picture also counts as its negative, which costs no convolution: without it the maximum would see more bright
spots than dark ones, or fewer, by chance. How close this comes to photographs: `benchmarks/selecting/README.md`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from mixpool.filters.partner import analytic_partner
from mixpool.filters.spectrum import check_weight, pair
from mixpool.ops.geometry import PoolGeometry
from mixpool.ops.modes import without_autocast
from mixpool.ops.reference import max_pool
from mixpool.selection.compare import Comparison, Poolings, PoolingStats, pool_both
from mixpool.selection.pictures import dead_leaves

NUM_PICTURES = 16
LEAST_INTERIOR = 128  # pixels of a picture's side that filters may be centred on, at least
BATCH = 4  # pictures convolved at a time


@torch.no_grad()
def predict(
    weight: Tensor,
    stride: int | Sequence[int] = 1,
    *,
    weight_imag: Tensor | None = None,
    window: int = 3,
    shift: tuple[int, int] = (0, 1),
) -> PoolingStats:
    """Gap, correlation and instability of the poolings of each filter, as they are expected on photographs.

    Args:
        weight: (C, I, kH, kW) floating point, on any device. With I = 3 the input is RGB, in any affine scale; of
            any other number the gray picture is seen through the filter's main spatial pattern (the first singular
            vector over input channels), since nothing is known about what the channels have in common.
        stride: pixels per step of the convolution.
        weight_imag: the imaginary parts, like `weight`; default the analytic partners on the same taps.
        window: positions of the convolution per axis under a pooling window, 2 or 3; windows lie 2 apart.
        shift: (y, x) whole pixels, not negative, by which the picture moves for the instabilities.
    Returns:
        PoolingStats of (C,) float64 tensors, instabilities (1, C); NaN for a filter that is zero.
    Example:
        >>> from mixpool.selection.predict import predict
        >>> tuple(predict(torch.randn(8, 3, 7, 7), stride=2).gap.shape)
        (8,)
    """
    weight = check_weight(weight).detach().cpu()
    stride = pair(stride)
    if min(stride) < 1:
        raise ValueError(f"expected a positive stride, got {stride}")
    if len(shift) != 2 or any(type(pixels) is not int or not 0 <= pixels <= LEAST_INTERIOR // 2 for pixels in shift):
        raise ValueError(f"expected a shift of (y, x) whole pixels from 0 to {LEAST_INTERIOR // 2}, got {shift!r}")
    if weight_imag is None:
        weight_imag = analytic_partner(weight.double())
    elif weight_imag.shape != weight.shape:
        raise ValueError(f"expected weight_imag like weight, got {tuple(weight_imag.shape)=}, {tuple(weight.shape)=}")
    kernels = torch.cat([weight.double(), weight_imag.detach().cpu().double()])
    kernels = (kernels / _scale(kernels, len(weight))).float()

    pictures = _pictures(_picture_size(weight.shape[-2:], stride))
    if weight.shape[1] != 3:
        pictures, kernels = pictures.mean(dim=1, keepdim=True), _main_pattern(kernels, len(weight))
    kernels = kernels.contiguous(memory_format=torch.channels_last)
    comparison = Comparison()
    height, width = (side - pixels for side, pixels in zip(pictures.shape[-2:], shift, strict=True))
    with without_autocast(pictures):
        for batch in pictures.split(BATCH):
            batch = batch.contiguous(memory_format=torch.channels_last)
            here = F.conv2d(batch[..., :height, :width], kernels, stride=stride)
            there = F.conv2d(batch[..., shift[0] :, shift[1] :], kernels, stride=stride)
            for before, after in zip(_of_both_signs(here, window), _of_both_signs(there, window), strict=True):
                comparison.add(before, [after])
    return comparison.result()


def pictures_for(weight: Tensor, stride: int | Sequence[int] = 1) -> Tensor:
    """(32, I, S, S) float32: the pictures and their negatives, as input of a convolution with this weight."""
    pictures = _pictures(_picture_size(weight.shape[-2:], pair(stride)))
    pictures = torch.cat([pictures, -pictures])
    if weight.shape[1] != 3:
        pictures = pictures.mean(dim=1, keepdim=True).expand(-1, weight.shape[1], -1, -1)
    return pictures


def _of_both_signs(maps: Tensor, window: int) -> tuple[Poolings, Poolings]:
    """The poolings of the pictures and of their negatives, from real and imaginary maps one after the other."""
    real, imag = maps.chunk(2, dim=1)
    poolings = pool_both(real, imag, window)
    return poolings, poolings._replace(max=max_pool(-real, PoolGeometry((window, window))))


def _scale(kernels: Tensor, count: int) -> Tensor:
    """(2 C, 1, 1, 1) norm of each filter W + iV, 1 for a zero one: scales cancel, but float32 sums might overflow."""
    norm = kernels.flatten(1).square().sum(dim=1).reshape(2, count).sum(dim=0).sqrt()
    return torch.where(norm > 0, norm, 1.0).repeat(2)[:, None, None, None]


def _main_pattern(kernels: Tensor, count: int) -> Tensor:
    """(2 C, 1, kH, kW): real and imaginary parts mixed over input channels as suits each real part best."""
    mix, _, _ = torch.linalg.svd(kernels[:count].flatten(2), full_matrices=False)
    return torch.einsum("ci,ciyx->cyx", mix[:, :, 0].repeat(2, 1), kernels)[:, None]


def _picture_size(kernel_size: Sequence[int], stride: Sequence[int]) -> int:
    """Side of the pictures: a multiple of 64, so that few sizes are drawn."""
    interior = max(LEAST_INTERIOR, 32 * max(stride))
    return 64 * math.ceil((max(kernel_size) + interior) / 64)


@lru_cache(maxsize=3)
def _pictures(size: int) -> Tensor:
    """(16, 3, size, size); 9 MB at the size 192 of the usual stems."""
    return dead_leaves(NUM_PICTURES, size)
