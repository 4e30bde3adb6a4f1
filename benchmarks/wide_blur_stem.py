"""A ResNet-18 whose stem blurs more widely than mixpool's: a module for `device_modules`, an experiment.

The pooling's step of 2 comes last, behind a second binomial mean of 3, so that modulus and max channels are decimated
behind one of 5 in all.
"""

from __future__ import annotations

import timm
from timm.layers import BlurPool2d
from timm.models import generate_default_cfgs, register_model
from torch import nn

import mixpool.timm_models  # noqa: F401  registers it
from mixpool import revert
from mixpool.wavelet_stem import initialize

default_cfgs = generate_default_cfgs(
    {"wide_blur_resnet18": {"num_classes": 10, "first_conv": "conv1", "classifier": "fc"}}
)


@register_model
def wide_blur_resnet18(
    pretrained: bool = False, num_bank: int = 48, bank: str = "wavelet", imag: str = "tied", **options
) -> nn.Module:
    # by way of mixpool's, which knows the names of anti-aliasing layers and leaves the stem's pooling alone
    model = timm.create_model("mixpool_resnet18", pretrained=pretrained, select="none", init="none", **options)
    revert(model)
    model.maxpool = nn.MaxPool2d(3, 1, 1)
    initialize(model, bank, num_channels=num_bank, imag=imag, max_blur=3)
    model.maxpool = BlurPool2d(model.conv1.out_channels)
    return model
