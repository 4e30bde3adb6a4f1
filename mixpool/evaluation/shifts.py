"""How much a stem's output changes when the picture moves by some pixels.

For a stem f, images x and the same images moved by k pixels, x_k, the change of channel c is

    change_c(k) = sqrt(mean (f_c(x_k) - f_c(x_0))^2) / sqrt(mean (f_c(x_0) - mean f_c(x_0))^2)

with all three means over the images and over the output positions, those at the border left out. 0 is a map that does
not move at all, sqrt(2) = 1.41 two unrelated maps of equal mean and variance.

Both pictures are crops of one larger image, so that the content truly moves and new content enters, as under a camera
that turns; nothing is padded or rolled. The maps are compared position by position and not realigned: a map moved by a
whole output position has changed. What the number compares is poolings of the same stride on the same photos.

Legend: N images, C channels, (H, W) the large image, size the side of the crop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# (y, x) of one pixel of shift; a diagonal shift by k moves k pixels along both axes.
DIRECTIONS = {"horizontal": (0, 1), "vertical": (1, 0), "diagonal": (1, 1)}
BORDER = 2  # output positions left out on each side: their windows reach into the stem's zero padding

Stem = Callable[[Tensor], Tensor]


def shifted_crop(images: Tensor, size: int, shift: int, direction: str = "horizontal") -> Tensor:
    """The centre crop, (N, channels, size, size), of images whose content has moved left and/or up by `shift` pixels.

    Args:
        images: (N, channels, H, W) with a margin of at least |shift| around the centre crop along the direction.
        size: side of the crop, pixels.
        shift: pixels, negative to move the content right and/or down.
        direction: "horizontal", "vertical" or "diagonal".
    """
    if direction not in DIRECTIONS:
        raise ValueError(f"expected a direction out of {', '.join(DIRECTIONS)}, got {direction!r}")
    if images.ndim != 4:
        raise ValueError(f"expected images (N, channels, H, W), got {tuple(images.shape)}")
    corner = []
    for length, step in zip(images.shape[-2:], DIRECTIONS[direction], strict=True):
        start = (length - size) // 2 + shift * step
        if start < 0 or start + size > length:
            raise ValueError(
                f"expected a margin of {abs(shift)} pixels around {size} along the shift, got {tuple(images.shape)}"
            )
        corner.append(start)
    top, left = corner
    return images[..., top : top + size, left : left + size]


def relative_change(before: Tensor, after: Tensor, border: int = BORDER) -> Tensor:
    """(C,) rms of after - before over the standard deviation of before, maps (N, C, H_out, W_out); NaN where constant.

    Args:
        border: positions left out on each side.
    """
    if before.shape != after.shape or before.ndim != 4:
        raise ValueError(f"expected two maps (N, C, H, W) of one shape, got {before.shape=} and {after.shape=}")
    if min(before.shape[-2:]) <= 2 * border:
        raise ValueError(f"expected maps larger than twice the border of {border}, got {tuple(before.shape)}")
    inside = (..., slice(border, before.shape[-2] - border), slice(border, before.shape[-1] - border))
    before, after = before[inside].float(), after[inside].float()
    change = (after - before).square().mean(dim=(0, 2, 3)).sqrt()
    spread = before.var(dim=(0, 2, 3), correction=0).sqrt()
    return torch.where(spread > 0, change / spread, torch.nan)


@torch.no_grad()
def change_curve(
    stem: Stem,
    images: Tensor,
    size: int,
    shifts: Sequence[int],
    direction: str = "horizontal",
    border: int = BORDER,
) -> Tensor:
    """The change of each channel at each shift, (len(shifts), C) float32; see the top of this file.

    Args:
        stem: from images to feature maps, (N, C, H_out, W_out); put modules into evaluation mode first.
        images: (N, channels, H, W), as the stem expects them, with a margin around the centre crop.
        size: side of the crops that the stem sees, pixels.
        shifts: pixels.
        direction, border: as above.
    Example:
        >>> import torch
        >>> from mixpool.evaluation.shifts import change_curve
        >>> change_curve(torch.nn.MaxPool2d(3, 2, 1), torch.rand(2, 3, 40, 40), 32, shifts=[0, 1, 2]).shape
        torch.Size([3, 3])
    """
    before = stem(shifted_crop(images, size, 0, direction))
    curve = [relative_change(before, stem(shifted_crop(images, size, k, direction)), border) for k in shifts]
    return torch.stack(curve)
