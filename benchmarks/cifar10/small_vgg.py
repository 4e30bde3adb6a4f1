"""A VGG for small images, in timm's registry: a module for `device_modules`.

Convolutions of 3 x 3 with batch norm, max pools of 2 x 2, and a mean over the last map in place of the hidden layers.
"""

from __future__ import annotations

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

default_cfgs = generate_default_cfgs(
    {"small_vgg": {"num_classes": 10, "input_size": (3, 32, 32), "first_conv": "features.0", "classifier": "head"}}
)
PLAN = (16, "pool", 32, "pool", 64, 64, "pool", 128, 128, "pool")


class SmallVgg(nn.Module):
    def __init__(self, num_classes: int = 10, in_chans: int = 3, drop_rate: float = 0.0, **_) -> None:
        super().__init__()
        self.num_classes, self.num_features, self.drop_rate = num_classes, PLAN[-2], drop_rate
        layers: list[nn.Module] = []
        for width in PLAN:
            if width == "pool":
                layers.append(nn.MaxPool2d(2))
            else:
                layers += [nn.Conv2d(in_chans, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(True)]
                in_chans = width
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(in_chans, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean(dim=(2, 3)))


@register_model
def small_vgg(pretrained: bool = False, **options) -> nn.Module:
    return build_model_with_cfg(SmallVgg, "small_vgg", pretrained, **options)
