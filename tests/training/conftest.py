"""What the tests of the training share."""

from __future__ import annotations

import pytest
import timm
import torch

from mixpool.training import train


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Curves take longer to draw than these epochs to train; test_curves.py draws them, and so does every command."""
    monkeypatch.setattr(train, "draw_curves", lambda folder, history, title: (folder / "curves.png").touch())


@pytest.fixture
def stock_file(tmp_path, tiny_models):
    """Weights of the stock network."""
    path = tmp_path / "stock.pth"
    torch.save(timm.create_model("tiny_stem", converted=False).state_dict(), path)
    return path
