"""What input a model wants: size, crop, interpolation and normalisation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from mixpool.evaluation.photos import IMAGENET_MEAN, IMAGENET_STD

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
