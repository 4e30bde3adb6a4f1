"""A Gabor-like filter bank as a trained first layer shows it: oriented waves, colour opponents and blobs.

Frequencies are in radians per pixel (Nyquist is pi) and orientations as in `filters`: the angle of the frequency
vector, x right and y down.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# One ring of gray waves each; the two lowest stay on max pooling at stride 2.
FREQUENCIES = (0.5, 0.85, 1.25, 1.55, 1.85, 2.2)
COLOR_SHARE = 3 / 16  # of the channels: colour-opponent waves, all of low frequency, as trained stems have them
BLOB_SHARE = 1 / 16  # of the channels: low-pass filters
CYCLES_PER_SIGMA = 0.34  # standard deviation of the envelope in wave lengths: about one and a half octaves wide
# Directions in (red, green, blue): yellow-blue, red-green, green-magenta, red-cyan.
OPPONENTS = ((1.0, 1.0, -2.0), (1.0, -1.0, 0.0), (-1.0, 2.0, -1.0), (2.0, -1.0, -1.0))


def gabor_bank(
    out_channels: int,
    in_channels: int = 3,
    kernel_size: int = 7,
    *,
    frequencies: Sequence[float] = FREQUENCIES,
    color_share: float = COLOR_SHARE,
    blob_share: float = BLOB_SHARE,
) -> Tensor:
    """Real filters g(n) (cos(<theta, n> + phase) - mean), gray first, then colour opponents, then blobs.

    g is a round Gaussian that fits the kernel. Every wave sums to zero and every filter has unit norm. Gray waves come
    in pairs of phase 0 and pi/2, spread over the rings of `frequencies` and, within a ring, over the orientations in
    [0, pi). Blobs are the Gaussian itself, gray or colour-opponent. No random numbers are drawn.

    Args:
        out_channels: number of filters.
        in_channels: 3 for colour images; any other number makes all filters gray.
        kernel_size: taps per side, at least 3.
        frequencies: moduli of the waves' frequencies, radians per pixel, in (0, pi).
        color_share: share of the channels that are colour-opponent waves, at the lower half of `frequencies`.
        blob_share: share of the channels that are low-pass blobs.
    Returns:
        (out_channels, in_channels, kernel_size, kernel_size) float32.
    Example:
        >>> from mixpool.filters.gabor import gabor_bank
        >>> tuple(gabor_bank(64).shape)
        (64, 3, 7, 7)
    """
    if out_channels < 1 or in_channels < 1 or kernel_size < 3:
        raise ValueError(
            f"expected at least 1 channel and a kernel of 3, got {out_channels=}, {in_channels=}, {kernel_size=}"
        )
    if len(frequencies) == 0 or not all(0 < frequency < math.pi for frequency in frequencies):
        raise ValueError(f"expected frequencies between 0 and pi radians per pixel, got {tuple(frequencies)}")
    if min(color_share, blob_share) < 0 or color_share + blob_share > 1:
        raise ValueError(f"expected shares from 0 to 1 that sum to at most 1, got {color_share=}, {blob_share=}")
    num_color = round(out_channels * color_share) if in_channels == 3 else 0
    num_blobs = round(out_channels * blob_share)
    num_gray = out_channels - num_color - num_blobs
    gray = torch.ones(in_channels, dtype=torch.float64)

    slow = sorted(frequencies)[: max(1, len(frequencies) // 2)]
    filters = [gray[:, None, None] * wave for wave in _waves(num_gray, frequencies, kernel_size)]
    filters += [_opponent(i)[:, None, None] * wave for i, wave in enumerate(_waves(num_color, slow, kernel_size))]
    for i in range(num_blobs):
        color = gray if in_channels != 3 or i == 0 else _opponent(i - 1)
        filters.append(color[:, None, None] * _gaussian(kernel_size / 5, kernel_size))
    bank = torch.stack(filters)
    return (bank / bank.flatten(1).norm(dim=1)[:, None, None, None]).float()


def _waves(count: int, frequencies: Sequence[float], kernel_size: int) -> list[Tensor]:
    """`count` zero-mean waves: pairs of two phases, dealt out to the rings in turn."""
    pairs = (count + 1) // 2
    rings = [len(range(ring, pairs, len(frequencies))) for ring in range(len(frequencies))]
    waves = []
    for ring, (frequency, orientations) in enumerate(zip(frequencies, rings, strict=True)):
        for i in range(orientations):
            # Every second ring is turned by half a step, so that neighbours do not repeat each other's orientations.
            angle = math.pi * (i + 0.5 * (ring % 2)) / orientations
            waves += [_wave(frequency, angle, phase, kernel_size) for phase in (0.0, math.pi / 2)]
    return waves[:count]


def _wave(frequency: float, angle: float, phase: float, kernel_size: int) -> Tensor:
    """(k, k) Gaussian-windowed cosine whose sum is zero."""
    sigma = min(max(2 * math.pi / frequency * CYCLES_PER_SIGMA, kernel_size / 6), kernel_size / 4)
    envelope = _gaussian(sigma, kernel_size)
    y, x = _coordinates(kernel_size)
    carrier = torch.cos(frequency * (math.sin(angle) * y + math.cos(angle) * x) + phase)
    return envelope * (carrier - (envelope * carrier).sum() / envelope.sum())


def _gaussian(sigma: float, kernel_size: int) -> Tensor:
    y, x = _coordinates(kernel_size)
    return torch.exp(-(x.square() + y.square()) / (2 * sigma**2))


def _coordinates(kernel_size: int) -> tuple[Tensor, Tensor]:
    """(k, 1) and (1, k) pixel coordinates around the kernel's centre."""
    axis = torch.arange(kernel_size, dtype=torch.float64) - (kernel_size - 1) / 2
    return axis[:, None], axis[None, :]


def _opponent(i: int) -> Tensor:
    return torch.tensor(OPPONENTS[i % len(OPPONENTS)], dtype=torch.float64)
