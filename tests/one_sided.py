"""How one-sided a filter and its partner are, summed by numpy, for the tests of the partner and of the wavelets.

Legend: C channels, I input channels, (kH, kW) taps, frequencies (fy, fx) in radians per pixel.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from mixpool.filters.partner import PRIOR_SIZE


def side_of(fy: np.ndarray, fx: np.ndarray, direction: Tensor, size: int = PRIOR_SIZE) -> np.ndarray:
    """The sign of <xi, direction>; in the bins that the dividing line cuts, rising from -1 to 1 across one bin."""
    dy, dx = direction.tolist()
    return np.clip((fy * dy + fx * dx) / math.hypot(dy, dx) / (math.pi / size), -1, 1)


def energies(weight: Tensor, partner: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """(C,) energy of W + iV (C, I, kH, kW) on the wrong side, under the prior, and the total."""
    axis = 2 * np.pi * np.fft.fftfreq(PRIOR_SIZE)
    prior = (axis[:, None] ** 2 + axis**2 + 0.01**2) ** -1.5
    wrong, total = [], []
    for w, v, d in zip(weight.numpy(), partner.numpy(), direction):
        energy = (np.abs(np.fft.fft2(w + 1j * v, s=(PRIOR_SIZE, PRIOR_SIZE))) ** 2).sum(0) * prior
        side = side_of(axis[:, None], axis, d)
        wrong.append((energy * (1 - side) / 2).sum())
        total.append(energy.sum())
    return torch.tensor(wrong), torch.tensor(total)


def wrong_side_share(weight: Tensor, partner: Tensor, direction: Tensor) -> Tensor:
    """(C,) share of that energy on the wrong side: 0 is perfectly analytic, 0.5 a real filter."""
    wrong, total = energies(weight, partner, direction)
    return wrong / total
