"""The views of an evaluation: from a photo to one square of bytes, in the workers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mixpool.evaluation.model_input import ModelInput

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class SquareView:
    """Resize(side), bilinear, then CenterCrop(side): (side, side, 3) uint8."""

    side: int

    def __call__(self, image: Image.Image) -> np.ndarray:
        from torchvision.transforms import functional

        _check_area(image, self.side)
        return np.array(functional.center_crop(functional.resize(image, self.side), [self.side, self.side]))


@dataclass(frozen=True)
class OwnView:
    """The evaluation transform of timm for a model's own configuration, up to the bytes: (size, size, 3) uint8."""

    input: ModelInput

    def __call__(self, image: Image.Image) -> np.ndarray:
        _check_area(image, self.input.size / self.input.crop_ratio)
        return np.asarray(_timm_transform(self.input)(image)).transpose(1, 2, 0)  # an array in older versions of timm


def _check_area(image: Image.Image, short_side: float) -> None:
    """Refuse what has no pixels, and a thin strip that would fill the memory before it is cropped."""
    from PIL import Image

    width, height = image.size
    if min(width, height) < 1:
        raise ValueError(f"a picture of {width} x {height} pixels")
    area = short_side * short_side * max(width, height) / min(width, height)
    if Image.MAX_IMAGE_PIXELS is not None and area > Image.MAX_IMAGE_PIXELS:
        raise ValueError(
            f"{width} x {height} pixels: resized to a shorter side of {short_side:.0f} it would have {area / 1e6:.0f} "
            f"million pixels, more than Pillow's limit of {Image.MAX_IMAGE_PIXELS / 1e6:.0f} (Image.MAX_IMAGE_PIXELS)"
        )


@functools.lru_cache(maxsize=16)
def _timm_transform(model: ModelInput) -> Callable[[Image.Image], np.ndarray]:
    from timm.data.transforms_factory import transforms_imagenet_eval

    return transforms_imagenet_eval(
        img_size=model.size,
        crop_pct=model.crop_ratio,
        crop_mode=model.crop_mode,
        interpolation=model.interpolation,
        mean=model.mean,
        use_prefetcher=True,  # stops at (3, size, size) bytes
    )
