"""Frequencies, shifts, waves and filtered images, for the tests of the theory's closed forms.

Legend: S samples of the phase, N images, (G, G) the image and its frequency grid.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

PI = math.pi
# Phases that coincide or lie evenly.
SPECIAL = torch.tensor(
    [(0, 0), (PI, 0), (0, PI / 2), (PI, PI), (PI / 2, PI / 2), (2 * PI / 3, 0), (PI / 4, -PI / 4)], dtype=torch.float64
)


def frequencies(count: int) -> Tensor:
    """(count + 7, 2) random frequencies and the special ones."""
    return torch.cat([(torch.rand(count, 2, dtype=torch.float64) * 2 - 1) * PI, SPECIAL])


def shifts(count: int) -> Tensor:
    """(count, 2) shifts in pixels, fractions and integers in turn."""
    shift = torch.randn(count, 2, dtype=torch.float64) * 3
    shift[::2] = shift[::2].round()
    return shift


def simulate(phase: Tensor, frequency: Tensor, shift: Tensor, stride, window) -> dict[str, Tensor]:
    """The expectations of one frequency (2,) by their definition: a wave of modulus 1 at each of the phases (S,)."""
    stride_y, stride_x = (stride, stride) if isinstance(stride, int) else stride
    window_y, window_x = (window, window) if isinstance(window, int) else window
    before = after = torch.full_like(phase, -math.inf)
    advance = -(frequency * shift).sum()  # an image moved by +u is read at -u
    for y in range(window_y):
        for x in range(window_x):
            here = phase + frequency[0] * stride_y * y + frequency[1] * stride_x * x
            before = torch.maximum(before, here.cos())
            after = torch.maximum(after, (here + advance).cos())
    return {
        "expected_max": before.mean(),
        "expected_max_square": before.square().mean(),
        "expected_gap": (before - 1).square().mean().sqrt(),
        "max_shift_change": ((after - before).square().mean() / before.square().mean()).sqrt(),
    }


def filtered(
    images: Tensor, center: tuple[int, int], half_width: int, shift: tuple[float, float] = (0, 0), stride: int = 1
) -> Tensor:
    """(N, G / stride, G / stride) complex response to the images (N, G, G) moved by `shift`, by Fourier interpolation.

    The filter has a random spectrum, the same at each call, on a square of 2 half_width + 1 bins, and 0 elsewhere.
    """
    size = images.shape[-1]
    pixel = torch.arange(size, dtype=torch.float64)
    offset = torch.arange(-half_width, half_width + 1, dtype=torch.float64)
    frequency_y, frequency_x = (2 * PI / size * (c + offset) for c in center)

    def wave(frequency: Tensor, position: Tensor | float) -> Tensor:
        return torch.exp(1j * frequency[:, None] * position)

    generator = torch.Generator().manual_seed(1)
    spectrum = torch.randn(len(offset), len(offset), dtype=torch.complex128, generator=generator)
    images = wave(frequency_y, -pixel) @ images.to(spectrum.dtype) @ wave(frequency_x, -pixel).T
    images = wave(frequency_y, -shift[0]) * images * wave(frequency_x, -shift[1]).T
    return wave(frequency_y, pixel[::stride]).T @ (spectrum * images) @ wave(frequency_x, pixel[::stride]) / size**2


def norms(maps: Tensor) -> Tensor:
    return maps.flatten(1).norm(dim=1)
