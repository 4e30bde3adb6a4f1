"""Classifiers whose answers under shifts are known in closed form, pictures for them, and a short way to `evaluate`."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from timm.models.resnet import BasicBlock, ResNet
from torch import nn

from mixpool.evaluation.evaluate import evaluate
from mixpool.evaluation.model_input import ModelInput
from mixpool.evaluation.protocols import PROTOCOLS

SIZE = 32
PLAIN = ModelInput(size=SIZE, crop_ratio=1.0, mean=(0.0,) * 3, std=(1.0,) * 3)
ALL = tuple(PROTOCOLS)


class Parity(nn.Module):
    """Class 0 if the bright column is an even one, 1 if it is odd."""

    def forward(self, x):
        columns = x.sum(dim=(1, 2))
        return torch.stack([columns[:, ::2].sum(dim=1), columns[:, 1::2].sum(dim=1)], dim=1)


class MeanColor(nn.Module):
    """Logits from the mean of the picture alone, which no circular shift changes."""

    def forward(self, x):
        means = x.double().mean(dim=(2, 3)).float()
        return means @ torch.tensor([[3.0, 0.1, -2], [-1, 2, 0.3], [0.4, -1, 1.5]])


class Lopsided(MeanColor):
    """A model whose answers change with every shift."""

    def forward(self, x):
        ramp = torch.linspace(-4, 4, x.shape[-1])
        return super().forward(torch.sin(8 * x * ramp + 3 * ramp[:, None])) * 30


def line(column, side):
    """A black square with one bright column; none for None."""
    pixels = np.zeros((side, side, 3), dtype=np.uint8)
    if column is not None:
        pixels[:, column] = 255
    return Image.fromarray(pixels)


def noise(count, side=64):
    return [(Image.fromarray(np.uint8(torch.randint(256, (side, side, 3)))), i % 2) for i in range(count)]


def run(model, images, *protocols, **options):
    options = {"model_input": PLAIN, "workers": 0, **options}
    return evaluate(model, images, protocols=protocols, **options)


def small_model():
    """A ResNet with its whole stem, and little behind it."""
    return ResNet(BasicBlock, (1, 1, 1, 1), num_classes=4, channels=(16, 16, 16, 16))
