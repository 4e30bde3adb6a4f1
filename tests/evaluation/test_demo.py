"""The demonstration's measurement; its claim is tested with the command, tests/cli/test_demo.py."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from mixpool.conversion.find import find_stem
from mixpool.evaluation.demo import run_demo, set_gabor_bank
from mixpool.filters.gabor import gabor_bank


def test_the_bank_and_the_statistics_are_written_into_the_stem():
    model = timm.create_model("resnet18", num_classes=2).eval()
    images = 3 + 2 * torch.randn(4, 3, 48, 48)
    set_gabor_bank(find_stem(model), images)
    assert torch.equal(model.conv1.weight, gabor_bank(64, 3, 7))
    with torch.no_grad():
        out = model.bn1(model.conv1(images))
    assert out.mean(dim=(0, 2, 3)).abs().max() < 1e-4 and (out.var(dim=(0, 2, 3)) - 1).abs().max() < 1e-2


def test_models_that_cannot_be_shown():
    antialiased = timm.create_model("resnetblur18", num_classes=2)
    with pytest.raises(ValueError, match="compares max pooling with others, and this model has a BlurPool at"):
        run_demo(antialiased, gabor=False)
    small = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.Flatten())
    with pytest.raises(ValueError, match="a Gabor bank needs a square kernel of 5 taps or more"):
        run_demo(small, gabor=True)
