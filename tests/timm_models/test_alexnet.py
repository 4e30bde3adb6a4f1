"""AlexNet as timm's tools expect a model: torchvision's outputs, other classifiers, what it refuses."""

from __future__ import annotations

import pytest
import timm
import timm.models._builder
import timm.models._hub
import timm.optim
import timm.utils
import torch
import torchvision
from cheap_weights import make_cheap
from torch import Tensor, nn

from mixpool.timm_models import alexnet
from mixpool.timm_models.alexnet import AlexNet


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 72, 64)


def outputs(model: nn.Module, x: Tensor):
    with torch.no_grad():
        return model.eval()(x)


@pytest.mark.parametrize("size", [64, 224])
def test_alexnet_is_torchvisions(size: int, monkeypatch):
    make_cheap(monkeypatch)
    stock = torchvision.models.alexnet(num_classes=9).eval()
    model = timm.create_model("mixpool_alexnet", num_classes=9, select="none")
    plain = AlexNet(num_classes=9)
    x = torch.randn(1, 3, size, size)
    for other in (model, plain):
        keys = other.load_state_dict(stock.state_dict())
        assert not keys.missing_keys and not keys.unexpected_keys
        assert torch.equal(outputs(other, x), outputs(stock, x))
    stock.train()
    plain.train()
    torch.manual_seed(5)
    expected = stock(x)
    torch.manual_seed(5)
    assert torch.equal(plain(x), expected)  # dropout at the same places, of the same rate


def test_alexnet_keeps_its_hidden_layers_for_another_classifier(x, monkeypatch):
    monkeypatch.setattr(alexnet, "HIDDEN", 128)
    model = AlexNet(num_classes=9).eval()
    hidden = model.forward_head(model.forward_features(x), pre_logits=True)
    model.reset_classifier(4)
    assert torch.equal(model.forward_head(model.forward_features(x), pre_logits=True), hidden)
    assert model.get_classifier() is model.get_submodule(model.get_classifier(name_only=True))
    assert model.get_classifier().out_features == 4
    model.reset_classifier(0)
    assert torch.equal(model(x), hidden)
    with pytest.raises(ValueError, match="NCHW"):
        model.forward_intermediates(x, output_fmt="NLC")
    with pytest.raises(ValueError, match="global_pool"):
        model.reset_classifier(3, "max")
