"""Images moved by parts of a pixel."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mixpool.evaluation.shifts import DIRECTIONS


def translated(images: Tensor, shift: float, direction: str = "horizontal") -> Tensor:
    """Images whose content has moved left and/or up by any number of pixels: out(n) = image(n + shift).

    The one band-limited function through the pixels is moved, exactly: by a linear phase of the spectrum. The image is
    extended by its mirror first, so that what wraps around has no jump at the border, nor anything at the Nyquist
    frequency, whose translation is ambiguous. By whole pixels it is the copy that `shifted_crop` takes, inside.

    Args:
        images: (..., H, W) floating point.
        shift: pixels along each axis of the direction.
        direction: "horizontal", "vertical" or "diagonal".
    Returns:
        (..., H, W); rows and columns within the shift of a border show the mirrored image.
    Raises:
        ValueError: the direction is unknown.
    """
    if direction not in DIRECTIONS:
        raise ValueError(f"expected a direction out of {', '.join(DIRECTIONS)}, got {direction!r}")
    for dim, step in zip((-2, -1), DIRECTIONS[direction], strict=True):
        if step:
            length = images.shape[dim]
            spectrum = torch.fft.rfft(torch.cat([images, images.flip(dim)], dim), dim=dim)
            phase = torch.arange(length + 1, dtype=torch.float64) * (math.pi / length * shift * step)
            turn = torch.polar(torch.ones_like(phase), phase).to(spectrum)
            turn = turn if dim == -1 else turn[:, None]
            images = torch.fft.irfft(spectrum * turn, n=2 * length, dim=dim).narrow(dim, 0, length)
    return images
