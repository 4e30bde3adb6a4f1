"""A ResNet-18 that learns which pooling each channel takes: a module for `device_modules`, an experiment.

Every channel of the stem is computed in both ways from the same filter, and a gate g in [0, 1] mixes them:
g modulus + (1 - g) max. The gates start at 1/2 and are trained with the rest, by the loss alone.
"""

from __future__ import annotations

import timm
import torch
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from mixpool import MixPoolStem

default_cfgs = generate_default_cfgs({"gated_resnet18": {"num_classes": 10, "first_conv": "conv1", "classifier": "fc"}})


class GatedStem(nn.Module):
    """Both poolings of one convolution, each behind a norm layer of its own, and a gate per channel."""

    def __init__(self, conv: nn.Conv2d, num_channels: int) -> None:
        super().__init__()
        parts = {"act": nn.ReLU(), "pool": nn.MaxPool2d(3, 2, 1)}
        self.as_max = MixPoolStem(conv, nn.BatchNorm2d(num_channels), select="none", **parts)
        # free: the direction of a tied partner would be that of the random filter that it started from
        self.as_modulus = MixPoolStem(conv, nn.BatchNorm2d(num_channels), select="all", imag="free", **parts)
        self.gate_logits = nn.Parameter(torch.zeros(num_channels))

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate_logits.sigmoid()[:, None, None]
        return gate * self.as_modulus(x) + (1 - gate) * self.as_max(x)


@register_model
def gated_resnet18(pretrained: bool = False, **options) -> nn.Module:
    model = timm.create_model("resnet18", pretrained=pretrained, **options)
    model.conv1 = GatedStem(model.conv1, model.conv1.out_channels)
    model.bn1, model.act1, model.maxpool = nn.Identity(), nn.Identity(), nn.Identity()
    return model
