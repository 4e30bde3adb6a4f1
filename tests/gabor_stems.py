"""Stems of Gabor filters and textures to try them on, for the tests of selection."""

from __future__ import annotations

import torch
from support import gabor
from torch import Tensor, nn


def gabors(frequencies, angles=(0.3,), phases=(0.0,), sigma=1.6, taps=7, colors=(1.0, 0.8, 0.6)) -> Tensor:
    """(C, 3, taps, taps), one filter for each combination, frequencies slowest."""
    return torch.cat([gabor(f, a, taps, sigma, p, colors) for f in frequencies for a in angles for p in phases])


def textures() -> Tensor:
    """(4, 3, 31, 37) textures with waves of all frequencies: sums of plane waves with energy ~ 1 / frequency."""
    generator = torch.Generator().manual_seed(5)
    spectrum = torch.fft.rfft2(torch.randn(4, 3, 31, 37, generator=generator, dtype=torch.float64))
    fy = torch.fft.fftfreq(31, dtype=torch.float64)[:, None]
    fx = torch.fft.rfftfreq(37, dtype=torch.float64)
    spectrum = spectrum / (fy**2 + fx**2 + 0.01).sqrt()
    images = torch.fft.irfft2(spectrum, s=(31, 37))
    return (images / images.std()).float()


PARTS = {
    "norm": (False, True, True),
    "norm and bias": (True, True, True),
    "norm without affine": (False, True, False),
    "bias": (True, False, False),
    "bare": (False, False, False),
}


def parts(bias: bool, norm: bool, affine: bool, act: nn.Module | None = None) -> tuple:
    """A stem of six Gabor filters with trained-looking statistics, scales of both signs."""
    conv = nn.Conv2d(3, 6, 7, 2, 3, bias=bias)
    norm_layer = nn.BatchNorm2d(6, affine=affine).eval() if norm else None
    with torch.no_grad():
        conv.weight.copy_(gabors([0.8, 1.2, 1.6], [0.4, 2.0], [0.9]))
        if bias:
            conv.bias.copy_(torch.linspace(-1, 1, 6))
        if norm:
            norm_layer.running_mean.copy_(torch.linspace(0.5, -0.5, 6))
            norm_layer.running_var.copy_(torch.linspace(0.5, 4, 6))
        if affine:
            norm_layer.weight.copy_(torch.tensor([1.0, -0.7, 0.4, 1.6, -1.1, 0.9]))
            norm_layer.bias.copy_(torch.linspace(-0.4, 0.6, 6))
    return conv, norm_layer, nn.ReLU() if act is None else act, nn.MaxPool2d(3, 2, 1)
