"""The shared folder's SqueezeNet in timm's registry, for `mixpool train`: a module for `device_modules`."""

from __future__ import annotations

import torchvision
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from benchmarks.kit.sample import CROP, IMAGENET_MEAN, IMAGENET_STD, shared_folder

default_cfgs = generate_default_cfgs(
    {
        "squeezenet_sample.in1k": {
            "file": str(shared_folder() / "data/squeezenet/squeezenet1_0_imagenet.safetensors"),
            "num_classes": 1000,
            "input_size": (3, CROP, CROP),
            "crop_pct": CROP / 256,
            "interpolation": "bilinear",
            "mean": IMAGENET_MEAN,
            "std": IMAGENET_STD,
            "first_conv": "features.0",
            "classifier": "classifier.1",
        }
    }
)


class SampleSqueezeNet(torchvision.models.SqueezeNet):
    def __init__(self, num_classes: int = 1000, in_chans: int = 3, drop_rate: float = 0.5) -> None:
        super().__init__("1_0", num_classes, drop_rate)
        if in_chans != 3:
            raise ValueError(f"expected RGB images, got in_chans={in_chans}")
        self.num_classes = num_classes
        self.classifier[1].padding = (1, 1)  # as the original pads its last convolution


@register_model
def squeezenet_sample(pretrained: bool = False, **options) -> nn.Module:
    return build_model_with_cfg(SampleSqueezeNet, "squeezenet_sample", pretrained, **options)
