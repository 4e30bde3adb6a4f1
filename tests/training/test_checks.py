"""What is found out about a model and a device before hours are spent on them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mixpool.training.checks import count_outputs, estimate_memory, half_precision_slowdown


def test_only_classifiers_with_finite_outputs_pass():
    images = torch.rand(2, 3, 8, 8)
    assert count_outputs(nn.Sequential(nn.Flatten(), nn.Linear(192, 6)), images) == 6
    with pytest.raises(ValueError, match="expected a classifier"):
        count_outputs(nn.Conv2d(3, 4, 3), images)
    broken = nn.Sequential(nn.Flatten(), nn.Linear(192, 6))
    nn.init.constant_(broken[1].bias, torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        count_outputs(broken, images)


def test_the_memory_estimate_counts_what_autograd_keeps():
    """By hand: the inputs of the second convolution and of the ReLU, each of 8 x 16 x 16 floats per image."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
    options = SimpleNamespace(opt="sgd", momentum=0.9, amp=False, batch_size=64, model_ema=True)
    images, state = torch.rand(2, 3, 16, 16), torch.get_rng_state()
    before = [parameter.clone() for parameter in model.parameters()]
    found = estimate_memory(model, images, options, torch.device("cpu"))
    assert found.activations == 2 * 64 * 8 * 16 * 16 * 4
    assert found.weights == 4 * sum(p.numel() * 4 for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, before, model.parameters()))


def test_slowness_is_measured_and_draws_nothing():
    state = torch.get_rng_state()
    assert 0 < half_precision_slowdown(torch.bfloat16) < float("inf")
    assert 0.1 < half_precision_slowdown(torch.float32) < 10
    assert torch.equal(torch.get_rng_state(), state)
