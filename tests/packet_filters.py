"""Wavelet packets as the tests of their filters and of their transform need them.

Legend: n packets, s stride, N C H W images.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mixpool.filters.packets import PacketFilters, dtcwpt_filters

FAMILIES = ("qshift_06", "qshift_a", "qshift_b", "qshift_c", "qshift_d", "qshift_32")
cached_filters = functools.lru_cache(dtcwpt_filters)


def explicit(x: Tensor, filters: PacketFilters, stride: int, padding_mode: str) -> Tensor:
    """(N, C, n, H', W'): the definition, one convolution with all kernels of the padded image."""
    half = filters.kernel_size // 2
    mode = {"symmetric": "symmetric", "circular": "wrap"}[padding_mode]
    padded = torch.from_numpy(np.pad(x.numpy(), [(0, 0)] * 2 + [(half, half)] * 2, mode=mode))
    kernels, planes = filters.kernels[:, None], padded.flatten(0, 1)[:, None]
    parts = [F.conv2d(planes, part.contiguous(), stride=stride) for part in (kernels.real, kernels.imag)]
    return torch.complex(*parts).unflatten(0, x.shape[:2])
