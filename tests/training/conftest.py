"""What the tests of the training share."""

from __future__ import annotations

import pytest
import timm
import torch
from training_runs import touch_curves

import mixpool
from mixpool.training import train


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """test_curves.py draws curves, and so does the command under torchrun in test_train.py."""
    monkeypatch.setattr(train, "draw_curves", touch_curves)


@pytest.fixture
def stock_file(tmp_path, tiny_models):
    """Weights of the stock network."""
    path = tmp_path / "stock.pth"
    torch.save(timm.create_model("tiny_stem", converted=False).state_dict(), path)
    return path


@pytest.fixture
def steady_file(tmp_path, tiny_models):
    """A stabilized network, as `mixpool stabilize` writes it."""
    torch.manual_seed(5)
    model = timm.create_model("tiny_stock").eval()
    mixpool.stabilize(model, torch.randn(16, 3, 40, 40), size=32, depth="all")
    mixpool.save_stabilized(model, tmp_path / "steady.safetensors", arch="tiny_stock")
    return tmp_path / "steady.safetensors"
