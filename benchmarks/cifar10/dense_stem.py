"""ResNet-18 with stems that alias less than mixpool's, whatever they cost: a module for `device_modules`, controls.

dense       The convolution and the max pooling run at every pixel, and a Gaussian as wide as decimation by 4 asks for
            comes before it. How many flips are left behind this stem is what no stem can take away.
wide_blur   mixpool's, but the pooling's step of 2 comes last, behind a second binomial mean of 3, so that modulus and
            max channels are decimated behind one of 5 in all.
"""

from __future__ import annotations

import timm
import torch
import torch.nn.functional as F
from timm.layers import BlurPool2d
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

import mixpool.timm_models  # noqa: F401  registers it
from mixpool import revert
from mixpool.conversion.initialize import initialize

SIGMA, RADIUS = 2.0, 5  # pixels; at the new Nyquist frequency of pi / 4 the Gaussian has fallen to 0.3
TOTAL_STRIDE = 4

CONFIGURATION = {"num_classes": 10, "first_conv": "conv1", "classifier": "fc"}
default_cfgs = generate_default_cfgs({"dense_resnet18": CONFIGURATION, "wide_blur_resnet18": CONFIGURATION})


class GaussianDecimation(nn.Module):
    """A Gaussian mean on a reflected border, then every fourth pixel in both directions."""

    def forward(self, x: Tensor) -> Tensor:
        channels = x.shape[1]
        taps = torch.exp(-torch.arange(-RADIUS, RADIUS + 1, device=x.device).square() / (2 * SIGMA**2))
        taps = (taps / taps.sum()).to(x.dtype)
        x = F.pad(x, (RADIUS,) * 4, mode="reflect")
        x = F.conv2d(x, taps[:, None].expand(channels, 1, -1, 1), stride=(TOTAL_STRIDE, 1), groups=channels)
        return F.conv2d(x, taps[None].expand(channels, 1, 1, -1), stride=(1, TOTAL_STRIDE), groups=channels)


@register_model
def dense_resnet18(pretrained: bool = False, **options) -> nn.Module:
    model = _stock(pretrained, **options)
    model.conv1.stride = (1, 1)
    # 5 pixels are what 3 steps of the strided convolution span
    model.maxpool = nn.Sequential(nn.MaxPool2d(5, 1, 2), GaussianDecimation())
    return model


@register_model
def wide_blur_resnet18(pretrained: bool = False, **options) -> nn.Module:
    model = _stock(pretrained, **options)
    model.maxpool = nn.MaxPool2d(3, 1, 1)
    initialize(model)
    model.maxpool = nn.Sequential(model.maxpool, BlurPool2d(model.conv1.out_channels))  # behind the placeholder
    return model


def _stock(pretrained: bool, **options) -> nn.Module:
    # by way of mixpool's, which knows the names of anti-aliasing layers and leaves the stem's pooling alone
    model = timm.create_model("mixpool_resnet18", pretrained=pretrained, select="none", init="none", **options)
    revert(model)
    return model
