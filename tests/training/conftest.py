"""What the tests of the training share."""

from __future__ import annotations

import pytest
import timm
import torch
from training_runs import touch_curves

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
