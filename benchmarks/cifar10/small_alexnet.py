"""AlexNet for small images, in timm's registry: a module for `device_modules`.

The convolutions are AlexNet's. Its hidden layers, 54 of 61 million parameters, give way to a mean over the last map, of
which an image of 64 pixels leaves 1 x 1.
"""

from __future__ import annotations

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from mixpool.timm_models.alexnet import AlexNet
from mixpool.timm_models.model import MixPoolModel

default_cfgs = generate_default_cfgs(
    {
        name: {"num_classes": 10, "input_size": (3, 64, 64), "first_conv": "features.0", "classifier": "classifier.1"}
        for name in ("small_alexnet", "mixpool_small_alexnet")
    }
)


class SmallAlexNet(AlexNet):
    def _build_head(self, num_classes: int, global_pool: str, place: dict) -> None:
        self.num_classes, self.global_pool, self.head_hidden_size = num_classes, global_pool, self.num_features
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(self.drop_rate), nn.Linear(self.num_features, num_classes, **place))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.avgpool(x).flatten(1)
        return x if pre_logits else self.classifier(x)


class MixPoolSmallAlexNet(MixPoolModel, SmallAlexNet):
    pass


@register_model
def small_alexnet(pretrained: bool = False, **options) -> nn.Module:
    return build_model_with_cfg(SmallAlexNet, "small_alexnet", pretrained, **options)


@register_model
def mixpool_small_alexnet(pretrained: bool = False, **options) -> nn.Module:
    return build_model_with_cfg(MixPoolSmallAlexNet, "mixpool_small_alexnet", pretrained, **options)
