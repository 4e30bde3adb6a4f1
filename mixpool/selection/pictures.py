"""Synthetic photographs: leaves of all sizes that hide one another, each with its colour, its shading and its texture.

The dead-leaves model (Lee, Mumford & Huang, Occlusion Models for Natural Images, IJCV 41, 2001) has the edges, the
scale invariance and the heavy tails of photographs, which no Gaussian texture has; shading and textured leaves add what
lies between the edges. So a filter responds to it about as it does to photographs, and nothing has to be downloaded.

The numbers below were fitted to photographs once (`python -m benchmarks.selecting.image_model`); the random numbers are
those of numpy's RandomState, whose streams never change, so that the pictures are the same everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class ImageModel:
    """What the pictures are drawn from; lengths in pixels, amplitudes in standard deviations of the leaves' gray.

    Attributes:
        size_exponent: the density of leaves of radius r falls as r^-size_exponent ...
        smallest, largest: ... between these radii.
        rectangles: share of the leaves that are rectangles, the others are discs.
        elongation: spread of the logarithm of the rectangles' side ratio.
        upright: share of the rectangles whose sides are horizontal and vertical.
        color_tail: spread of the logarithm of a leaf's contrast.
        shading: standard deviation of the linear slope across a leaf.
        texture: rms amplitude of the texture on the leaves; texture_spread: spread of the logarithm of that amplitude.
        texture_exponent: the texture's amplitude spectrum falls as f^-texture_exponent.
        texture_color: amplitude of the texture that differs between the colours, over that which is gray.
        contrast_spread: spread of the logarithm of a picture's contrast.
        sharpest, softest: standard deviations of the Gaussian blur of the sharpest and the softest picture.
        contrast: factor on all pictures, after which they are as strong as normalised photographs.
        brightness: mean brightness of a picture, spread evenly from -brightness to brightness, whatever its contrast.
    """

    size_exponent: float = 2.62
    smallest: float = 6.0449
    largest: float = 76.322
    rectangles: float = 0.425
    elongation: float = 0.9942
    upright: float = 0.942
    color_tail: float = 0.3634
    shading: float = 0.1852
    texture: float = 0.5977
    texture_spread: float = 0.6795
    texture_exponent: float = 0.8236
    texture_color: float = 0.2758
    contrast_spread: float = 0.7733
    sharpest: float = 0.3153
    softest: float = 0.7999
    contrast: float = 0.4767
    brightness: float = 1.7


PHOTOGRAPHS = ImageModel()  # the defaults are the fit to them
# Covariance of (red, green, blue) over the pixels of photographs, normalised by ImageNet's mean and deviation.
COLOR_COVARIANCE = ((1.25, 1.13, 0.99), (1.13, 1.26, 1.19), (0.99, 1.19, 1.38))
LAYERS = 8  # leaves over a pixel on average; all but the last are hidden, and exp(-8) of the pixels have none
BORDER = 3  # pixels cut off at each side, into which the periodic blur reaches


def dead_leaves(num_images: int, size: int, seed: int = 0, model: ImageModel = PHOTOGRAPHS) -> Tensor:
    """Synthetic photographs, RGB, normalised as for an ImageNet model: mean about 0, deviation about 1.

    Args:
        num_images: how many; they run from the sharpest to the softest.
        size: side, pixels.
        seed: of the random numbers; equal arguments give equal pictures.
        model: the distribution of what is drawn.
    Returns:
        (num_images, 3, size, size) float32.
    Example:
        >>> from mixpool.selection.pictures import dead_leaves
        >>> tuple(dead_leaves(2, 64).shape)
        (2, 3, 64, 64)
    """
    if num_images < 1 or size < 1:
        raise ValueError(f"expected at least one image of at least one pixel, got {num_images=}, {size=}")
    random = np.random.RandomState(seed)
    blurs = np.linspace(model.sharpest, model.softest, num_images)
    # Contrast and brightness are spread evenly over their distributions, not drawn: few pictures stand for many.
    levels = (np.arange(num_images) + 0.5) / num_images
    normal = torch.special.ndtri(torch.from_numpy(levels)).numpy()
    contrasts = model.contrast * np.exp(model.contrast_spread * random.permutation(normal))
    pictures = np.stack([_draw(size, blur, model, random) * contrast for blur, contrast in zip(blurs, contrasts)])
    brightness = model.brightness * random.permutation(2 * levels - 1)
    return torch.from_numpy((pictures + brightness[:, None, None, None]).astype(np.float32))


def _draw(size: int, blur: float, model: ImageModel, random: np.random.RandomState) -> np.ndarray:
    """(3, size, size) one picture, of contrast 1."""
    side = size + 2 * BORDER
    leaves = _Leaves(side, model, random)
    owner = leaves.paint(side)  # the leaf that each pixel shows
    y, x = np.ogrid[:side, :side]
    picture = leaves.color[:, owner]
    slope_y, slope_x = leaves.slope / leaves.radius
    picture += (y - leaves.y[owner]) * slope_y[owner] + (x - leaves.x[owner]) * slope_x[owner]
    texture = _texture(side, model.texture_exponent, random)
    picture += (texture[:1] + model.texture_color * texture[1:]) * leaves.texture[owner]
    spectrum = np.fft.rfft2(picture) * np.exp(-0.5 * (2 * np.pi * blur * _frequency_of_bins(side)) ** 2)
    return np.fft.irfft2(spectrum, (side, side))[:, BORDER:-BORDER, BORDER:-BORDER]


class _Leaves:
    """What is drawn for each leaf, the last on top; arrays (leaves,), vectors and colours in rows."""

    def __init__(self, side: int, model: ImageModel, random: np.random.RandomState) -> None:
        # Centres reach beyond the picture, so that its border is covered like its middle.
        plane = side + 1.4 * model.largest
        typical = _radius(np.linspace(0, 1, 1001), model)
        count = int(LAYERS * plane**2 / (np.pi * np.mean(typical**2)))
        self.radius = _radius(random.rand(count), model)
        self.y, self.x = random.rand(2, count) * plane - 0.7 * model.largest
        deviation = np.linalg.cholesky(COLOR_COVARIANCE)
        self.color = deviation @ (random.randn(3, count) * _lognormal(model.color_tail, count, random))
        self.texture = model.texture * _lognormal(model.texture_spread, count, random)
        self.slope = model.shading * random.randn(2, count)  # (y, x), per radius
        self.is_rectangle = random.rand(count) < model.rectangles
        angle = random.rand(count) * np.pi
        upright = np.round(angle / (np.pi / 2)) * (np.pi / 2)
        angle = np.where(random.rand(count) < model.upright, upright, angle)
        self.cos, self.sin = np.cos(angle), np.sin(angle)
        # A rectangle has the area of the disc of its radius.
        ratio = np.exp(np.abs(model.elongation * random.randn(count)))
        self.half_length = np.sqrt(np.pi / 4 * ratio) * self.radius
        self.half_width = np.sqrt(np.pi / 4 / ratio) * self.radius

    def paint(self, side: int) -> np.ndarray:
        """(side, side) number of the leaf on top at each pixel; pixels under none show the first."""
        owner = np.zeros((side, side), np.int64)
        row = np.arange(side)
        column = row[:, None]
        reach = np.where(self.is_rectangle, np.hypot(self.half_length, self.half_width), self.radius)
        starts_y, starts_x = (np.clip(center - reach, 0, side).astype(int) for center in (self.y, self.x))
        ends_y, ends_x = (np.clip(center + reach + 1, 0, side).astype(int) for center in (self.y, self.x))
        for leaf in np.flatnonzero((starts_y < ends_y) & (starts_x < ends_x)):
            box = slice(starts_y[leaf], ends_y[leaf]), slice(starts_x[leaf], ends_x[leaf])
            y, x = column[box[0]] - self.y[leaf], row[box[1]] - self.x[leaf]
            if self.is_rectangle[leaf]:
                along = np.abs(self.cos[leaf] * x + self.sin[leaf] * y) <= self.half_length[leaf]
                is_inside = along & (np.abs(self.cos[leaf] * y - self.sin[leaf] * x) <= self.half_width[leaf])
            else:
                is_inside = y**2 + x**2 <= self.radius[leaf] ** 2
            owner[box][is_inside] = leaf
        return owner


def _radius(quantile: np.ndarray, model: ImageModel) -> np.ndarray:
    """Radius below which a share `quantile` of the leaves lies."""
    power = 1 - model.size_exponent
    ends = model.smallest**power, model.largest**power
    return (ends[0] + quantile * (ends[1] - ends[0])) ** (1 / power)


def _texture(side: int, exponent: float, random: np.random.RandomState) -> np.ndarray:
    """(4, side, side) Gaussian textures of unit deviation, one gray and three for the colours."""
    amplitude = (_frequency_of_bins(side) + 1 / side) ** -exponent
    amplitude[0, 0] = 0
    texture = np.fft.irfft2(np.fft.rfft2(random.randn(4, side, side)) * amplitude, (side, side))
    return texture / texture.std(axis=(1, 2), keepdims=True)


def _frequency_of_bins(side: int) -> np.ndarray:
    """(side, side // 2 + 1) frequency of each bin of a real FFT, cycles per pixel."""
    return np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side))


def _lognormal(spread: float, count: int, random: np.random.RandomState) -> np.ndarray:
    """(count,) factors whose mean square is 1."""
    return np.exp(spread * random.randn(count) - spread**2)
