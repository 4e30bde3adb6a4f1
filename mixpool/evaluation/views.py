"""What input a model wants, and the views of an evaluation: from a photo to one square of bytes, in the workers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from mixpool.data import IMAGENET_MEAN, IMAGENET_STD

if TYPE_CHECKING:
    from PIL import Image

MAX_CROP_RATIO = 2  # the largest of timm's is 1.15; 87.5, meant as percent, is refused
SETTINGS = ("input_size", "img_size", "mean", "std", "crop_pct", "crop_mode", "interpolation")


@dataclass(frozen=True)
class ModelInput:
    """What a model wants for its input, and how its own evaluation crops it (timm's names).

    Attributes:
        size: side of the square, pixels.
        crop_ratio: side of the crop over the resized shorter side, before the crop; above 1 the picture gets a border.
        interpolation, crop_mode: as timm's evaluation transform takes them.
        mean, std: of each channel, of images in [0, 1].
    """

    size: int = 224
    crop_ratio: float = 0.875
    interpolation: str = "bilinear"
    crop_mode: str = "center"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"expected an input of at least 1 pixel, got a size of {self.size}")
        if not 0 < self.crop_ratio <= MAX_CROP_RATIO:
            raise ValueError(f"expected a crop ratio above 0 and up to {MAX_CROP_RATIO}, got {self.crop_ratio}")
        if len(self.mean) != 3 or len(self.std) != 3 or not min(self.std) > 0:
            raise ValueError(f"expected three means and positive stds of RGB images, got {self.mean} and {self.std}")


def find_model_input(
    model: nn.Module, settings: Mapping[str, Any] | None = None, *, use_test_size: bool = False
) -> ModelInput:
    """What timm's configuration of the model says; ImageNet's usual settings (256/224) for a model without one.

    timm says two sizes of some models: that of their training, the default here as in timm, and a larger one at which
    timm's tables have their accuracy.

    Args:
        settings: what a training run said of its images, by timm's names (`input_size`, `img_size`, `mean`, `std`,
            `crop_pct`, `crop_mode`, `interpolation`); it counts more than the model's configuration.
        use_test_size: the size of timm's tables.
    Raises:
        ValueError: the model's input is no RGB square, or the settings do not fit together.
    """
    given = {name: value for name in SETTINGS if (value := (settings or {}).get(name)) not in (None, "")}
    if settings is None and not hasattr(model, "pretrained_cfg") and not hasattr(model, "default_cfg"):
        return ModelInput()
    from timm.data import resolve_model_data_config

    try:
        config = resolve_model_data_config(model, given, use_test_size=use_test_size)
    except AssertionError as error:
        raise ValueError(f"the settings of the images do not fit together: {given} {error}") from error
    channels, height, width = config["input_size"]
    if channels != 3 or height != width:
        raise ValueError(f"expected a model of square RGB images, got one of {channels} x {height} x {width}")
    names = ("crop_pct", "interpolation", "crop_mode", "mean", "std")
    ratio, interpolation, crop_mode, mean, std = (config[name] for name in names)
    return ModelInput(height, ratio, interpolation, crop_mode, tuple(mean), tuple(std))


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
