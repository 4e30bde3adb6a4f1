"""timm's registry with the models here: their names, their weights' configurations, their architectures."""

from __future__ import annotations

import pytest
import timm
import timm.models._builder
import timm.models._hub
import timm.optim
import timm.utils
import torch
import torchvision
from timm.models import DenseNet, ResNet

import mixpool
import mixpool.timm_models
from mixpool.timm_models.alexnet import AlexNet
from mixpool.timm_models.registry import ARCHITECTURES

NAMES = [f"mixpool_{name}" for name in ARCHITECTURES]


def test_the_models_are_registered():
    wanted = """alexnet densenet121 resnet18 resnet26 resnet34 resnet50 resnet101 resnet152 resnext50_32x4d
        resnext101_32x4d resnext101_32x8d resnext101_64x4d seresnet50 wide_resnet50_2 wide_resnet101_2""".split()
    assert sorted(timm.list_models(module="timm_models")) == sorted(f"mixpool_{name}" for name in wanted)
    for name in NAMES:
        entry_point = getattr(mixpool.timm_models, name)
        assert entry_point is timm.models.model_entrypoint(name) and entry_point.__name__ == name
        assert name in mixpool.timm_models.__all__


@pytest.mark.parametrize("name", sorted(set(ARCHITECTURES) - {"alexnet"}))
def test_the_weights_are_the_stock_ones(name: str):
    """Every tag of timm's, the same one by default, with the same hub id and the same preprocessing."""
    ours, stock = (timm.models.get_arch_pretrained_cfgs(arch) for arch in (f"mixpool_{name}", name))
    assert list(ours) == [f"mixpool_{tagged}" for tagged in stock] and len(stock) > 0
    for tagged, cfg in stock.items():
        mine = ours[f"mixpool_{tagged}"].to_dict()
        assert mine.pop("architecture") == f"mixpool_{name}"
        theirs = cfg.to_dict()
        theirs.pop("architecture")
        assert mine == theirs
        assert cfg.hf_hub_id == f"timm/{tagged}" or not cfg.has_weights
    assert timm.get_pretrained_cfg(f"mixpool_{name}").tag == timm.get_pretrained_cfg(name).tag


def test_alexnets_weights_are_torchvisions():
    weights = torchvision.models.AlexNet_Weights.DEFAULT
    cfg, transform = timm.get_pretrained_cfg("mixpool_alexnet"), weights.transforms()
    assert cfg.url == weights.url
    assert [cfg.input_size[-1]] == transform.crop_size
    assert round(cfg.input_size[-1] / cfg.crop_pct) == transform.resize_size[0]
    assert cfg.interpolation == transform.interpolation.value
    assert list(cfg.mean) == transform.mean and list(cfg.std) == transform.std


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_architecture_is_the_stock_one(name: str):
    """The same keys and shapes as timm's or torchvision's model of that name."""
    model_cls, sizes = ARCHITECTURES[name]
    base = next(cls for cls in model_cls.__mro__ if cls in (ResNet, DenseNet, AlexNet))
    with torch.device("meta"):
        stock = torchvision.models.alexnet() if name == "alexnet" else timm.create_model(name)
        ours = base(**sizes)
    expected = {key: value.shape for key, value in stock.state_dict().items()}
    assert {key: value.shape for key, value in ours.state_dict().items()} == expected
    modules = [
        type(m) for m in ours.modules() if name != "alexnet" or type(m) not in (AlexNet, torchvision.models.AlexNet)
    ]
    theirs = [type(m) for m in stock.modules() if name != "alexnet" or type(m) is not torchvision.models.AlexNet]
    assert modules == theirs
