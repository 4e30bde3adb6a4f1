"""A small classifier whose stem `convert` knows, and what a failed conversion must leave alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHANNELS = 8
STRIPES = [channel in (1, 2, 5) for channel in range(CHANNELS)]  # a mixed plan


class Net(nn.Module):
    """A small classifier; `norm=None` and `bias` vary its stem."""

    def __init__(self, norm: bool = True, bias: bool = False, affine: bool = True) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, CHANNELS, 7, 2, 3, bias=bias)
        self.bn1 = nn.BatchNorm2d(CHANNELS, affine=affine) if norm else nn.Identity()
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.conv2 = nn.Conv2d(CHANNELS, 12, 3)
        self.fc = nn.Linear(12, 5)
        if norm:
            self.bn1.running_mean.normal_(0, 0.3)
            self.bn1.running_var.uniform_(0.5, 2)
            if affine:
                self.bn1.weight.data.normal_()
                self.bn1.bias.data.normal_(0, 0.3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.fc(F.relu(self.conv2(x)).mean(dim=(2, 3)))


STEMS = {
    "norm": {},
    "norm and bias": {"bias": True},
    "norm without affine": {"affine": False},
    "bias": {"norm": False, "bias": True},
    "bare": {"norm": False},
}


def smooth_images() -> Tensor:
    """Smooth textures: filters see waves in them, as in photos."""
    noise = torch.randn(6, 3, 48, 56, generator=torch.Generator().manual_seed(3))
    return F.interpolate(noise, scale_factor=0.5, mode="bilinear").repeat_interleave(2, dim=2)[..., :24].contiguous()


def snapshot(model: nn.Module) -> dict:
    """All that a failed conversion must leave alone."""
    names = dict(model.named_modules(remove_duplicate=False))
    return {
        "modules": {name: id(module) for name, module in names.items()},
        "training": {name: module.training for name, module in names.items()},
        "parameters": {name: id(parameter) for name, parameter in model.named_parameters()},
        "requires_grad": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "state": {name: value.clone() for name, value in model.state_dict().items()},
        "hooks": {
            (name, key): len(value)
            for name, module in names.items()
            for key, value in vars(module).items()
            if "hook" in key and hasattr(value, "__len__")
        },
        "attributes": {name: set(vars(module)) - {"_is_full_backward_hook"} for name, module in names.items()},
    }


def assert_unchanged(model: nn.Module, before: dict) -> None:
    after = snapshot(model)
    assert list(after["state"]) == list(before["state"])
    for name, value in before["state"].items():
        assert torch.equal(after["state"][name], value), name
    for key in before.keys() - {"state"}:
        assert after[key] == before[key], key
