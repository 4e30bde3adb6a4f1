"""Placeholders and hooks: a converted model answers other tools as the stock model does."""

from __future__ import annotations

import re

import pytest
import torch
from small_net import CHANNELS, STRIPES, Net, assert_unchanged, smooth_images, snapshot
from torch import Tensor, nn

from mixpool import convert, revert


@pytest.fixture
def images() -> Tensor:
    return smooth_images()


# --- hooks ------------------------------------------------------------------------------------------------------------


def test_hooks_move_and_their_handles_work():
    model = Net().eval()
    seen = []

    def forward_hook(name):
        return lambda module, args, out: seen.append((name, tuple(out.shape)))

    def forward_pre_hook(module, args, kwargs):
        seen.append(("conv pre", tuple(args[0].shape)))

    def backward_hook(module, grad_in, grad_out):
        seen.append(("conv backward", tuple(grad_out[0].shape)))

    x = torch.randn(2, 3, 48, 48, requires_grad=True)
    handles = [
        model.conv1.register_forward_pre_hook(forward_pre_hook, with_kwargs=True),
        model.conv1.register_forward_hook(forward_hook("conv"), always_call=True),
        model.conv1.register_full_backward_hook(backward_hook),
        model.relu.register_forward_hook(forward_hook("relu")),
        model.maxpool.register_forward_hook(forward_hook("pool")),
        model.fc.register_forward_hook(forward_hook("fc")),
    ]
    model.relu.inplace = False  # which full backward hooks do not allow
    model(x).sum().backward()
    stock = list(seen)
    assert [name for name, _ in stock] == ["conv pre", "conv", "relu", "pool", "fc", "conv backward"]

    report = convert(model, select=STRIPES)
    notes = " / ".join(report.notes)
    for name, count in (("conv1", 3), ("relu", 1), ("maxpool", 1)):
        assert re.search(rf"{count} hook\(s\) of {name} ", notes), notes
    assert "fc" not in notes
    seen.clear()
    model(x).sum().backward()
    assert [name for name, _ in seen] == [name for name, _ in stock]
    assert dict(seen)["conv"] == dict(seen)["relu"] == dict(seen)["pool"] == dict(stock)["pool"]

    handles[1].remove()  # while converted
    seen.clear()
    model(x)
    assert [name for name, _ in seen] == ["conv pre", "relu", "pool", "fc"]
    late = model.conv1.register_forward_hook(forward_hook("late"))

    revert(model)
    seen.clear()
    model(x).sum().backward()
    assert [name for name, _ in seen] == ["conv pre", "late", "relu", "pool", "fc", "conv backward"]
    assert dict(seen)["conv backward"] == dict(stock)["conv backward"]
    for handle in [*handles, late]:
        handle.remove()
    seen.clear()
    model(x).sum().backward()
    assert seen == []


def test_hooks_of_the_norm_layer():
    model = Net().eval()
    seen = []
    handle = model.bn1.register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape)))
    report = convert(model, select=STRIPES)
    assert any("bn1" in note for note in report.notes)
    model(torch.randn(2, 3, 48, 48))
    assert len(seen) == 1
    revert(model)
    model(torch.randn(2, 3, 48, 48))
    assert seen[1:] == [(2, CHANNELS, 24, 24)]
    handle.remove()
    model(torch.randn(2, 3, 48, 48))
    assert len(seen) == 2


def test_no_hooks_of_ours_stay_behind(images):
    model = Net()
    before = snapshot(model)
    convert(model, select="all", images=images)
    stem = model.conv1
    assert not stem._forward_pre_hooks and not stem._forward_hooks
    revert(model)
    assert snapshot(model)["hooks"] == before["hooks"]
    revert(convert_and_return(model))
    assert_unchanged(model, before)


def convert_and_return(model: nn.Module) -> nn.Module:
    convert(model, select="all")
    return model
