"""Networks small enough to train in tests, in timm's registry: the module that `device_modules` names there."""

from __future__ import annotations

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

import mixpool

SETTINGS = {
    "num_classes": 4,
    "input_size": (3, 32, 32),
    "mean": (0.5, 0.5, 0.5),
    "std": (0.25, 0.25, 0.25),
    "crop_pct": 1.0,
    "first_conv": "conv",
    "classifier": "head",
}
default_cfgs = generate_default_cfgs({name: dict(SETTINGS) for name in ("tiny_stem", "tiny_norm", "tiny_stock")})


class TinyNet(nn.Module):
    """conv 5x5/2, (batch norm,) ReLU, max pool, dropout, linear."""

    def __init__(self, num_classes=4, in_chans=3, norm=False, drop_rate=0.0, converted=True, **_):
        super().__init__()
        self.num_classes = num_classes
        self.conv = nn.Conv2d(in_chans, 8, 5, 2, 2, bias=not norm)
        self.bn = nn.BatchNorm2d(8) if norm else nn.Identity()
        self.relu = nn.ReLU()
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(8, num_classes)
        if converted:
            mixpool.convert(self, select=[True, False] * 4)

    def forward(self, x):
        out = self.pool(self.relu(self.bn(self.conv(x))))
        return self.head(self.drop(out.mean((2, 3))))


@register_model
def tiny_stem(pretrained=False, **options):
    return build_model_with_cfg(TinyNet, "tiny_stem", pretrained, **options)


@register_model
def tiny_norm(pretrained=False, **options):
    return build_model_with_cfg(TinyNet, "tiny_norm", pretrained, norm=True, **options)


@register_model
def tiny_stock(pretrained=False, **options):
    return build_model_with_cfg(TinyNet, "tiny_stock", pretrained, norm=True, converted=False, **options)
