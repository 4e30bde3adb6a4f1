"""Every timm and torchvision model with a stem of one convolution and a max pool: convert and revert change no bit.

The table below was found by tracing all models of both libraries; `shared/data/stems.csv` is the whole census.
"""

from __future__ import annotations

import copy
import csv
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from cheap_weights import make_cheap
from torch import nn

import mixpool
from mixpool.ops.reference import POOLINGS

RESNET = "conv1 -> bn1 -> act1 -> maxpool"
# Stem, by the names of its modules -> source/model. An activation inside the norm layer or in forward has no name.
STEMS = {
    RESNET: """
        timm/ecaresnetlight timm/res2net50_14w_8s timm/res2net50_26w_4s timm/res2net50_26w_6s timm/res2net50_26w_8s
        timm/res2net50_48w_2s timm/res2net101_26w_4s timm/res2next50 timm/resnet18 timm/resnet26 timm/resnet34
        timm/resnet50 timm/resnet101 timm/resnet152 timm/resnet200 timm/resnext50_32x4d timm/resnext101_32x4d
        timm/resnext101_32x8d timm/resnext101_32x16d timm/resnext101_32x32d timm/resnext101_64x4d timm/seresnet18
        timm/seresnet34 timm/seresnet50 timm/seresnet101 timm/seresnet152 timm/seresnext50_32x4d
        timm/seresnext101_32x4d timm/seresnext101_32x8d timm/seresnext101_64x4d timm/skresnet18 timm/skresnet34
        timm/skresnet50 timm/skresnext50_32x4d timm/wide_resnet50_2 timm/wide_resnet101_2""",
    "conv1 -> bn1 -> relu -> maxpool": """
        torchvision/resnet18 torchvision/resnet34 torchvision/resnet50 torchvision/resnet101 torchvision/resnet152
        torchvision/resnext50_32x4d torchvision/resnext101_32x8d torchvision/resnext101_64x4d
        torchvision/wide_resnet50_2 torchvision/wide_resnet101_2""",
    "layer0.conv1 -> layer0.bn1 -> layer0.relu1 -> pool0": """
        timm/legacy_seresnet18 timm/legacy_seresnet34 timm/legacy_seresnet50 timm/legacy_seresnet101
        timm/legacy_seresnet152 timm/legacy_seresnext26_32x4d timm/legacy_seresnext50_32x4d
        timm/legacy_seresnext101_32x4d""",
    "features.conv0 -> features.norm0 -> features.pool0": """
        timm/densenet121 timm/densenet161 timm/densenet169 timm/densenet201""",
    "features.conv0 -> features.norm0 -> features.relu0 -> features.pool0": """
        torchvision/densenet121 torchvision/densenet161 torchvision/densenet169 torchvision/densenet201""",
    "features.conv1_1.conv -> features.conv1_1.bn -> features.conv1_pool": """
        timm/dpn68 timm/dpn68b timm/dpn92 timm/dpn98 timm/dpn107 timm/dpn131""",
    "stem.conv1.conv -> stem.conv1.bn -> stem.pool": "timm/halonet_h1",
    "conv1.conv -> conv1.bn -> maxpool1": "torchvision/googlenet",
    "features.0 -> features.1 -> features.2": """
        torchvision/alexnet torchvision/squeezenet1_0 torchvision/squeezenet1_1""",
    "conv1.0 -> conv1.1 -> conv1.2 -> maxpool": """
        torchvision/shufflenet_v2_x0_5 torchvision/shufflenet_v2_x1_0 torchvision/shufflenet_v2_x1_5
        torchvision/shufflenet_v2_x2_0""",
    # Built with BlurPool: the blur is part of the stem.
    "conv1 -> bn1 -> act1 -> maxpool.0 -> maxpool.1": "timm/resnetblur18 timm/resnetblur50",
    "conv1.6 -> bn1 -> act1 -> maxpool.0 -> maxpool.1": "timm/resnetblur50d timm/resnetblur101d",
    "features.conv2 -> features.norm2 -> features.pool0.0 -> features.pool0.1": "timm/densenetblur121d",
}
MODELS = {model: stem for stem, models in STEMS.items() for model in models.split()}
# 194 and 469 million parameters, with the code of resnext101_32x8d: built with one block per stage.
HUGE = ("timm/resnext101_32x16d", "timm/resnext101_32x32d")
# One or two of each family: the backward pass of a mixed plan runs through the whole model.
TRAINED = """timm/resnet18 timm/legacy_seresnet18 timm/dpn68 timm/resnetblur18 timm/res2next50
    timm/skresnet18 timm/densenet121 torchvision/resnet18 torchvision/densenet121 torchvision/googlenet
    torchvision/squeezenet1_0 torchvision/squeezenet1_1 torchvision/shufflenet_v2_x0_5""".split()


# Those that take no image of 45 x 39 pixels.
PARTICULAR = ("torchvision/alexnet",)
STEMS_TRAINED: set[str] = set()  # as they print


@pytest.fixture(autouse=True)
def cheap_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    make_cheap(monkeypatch)


def build(name: str) -> nn.Module:
    source, model = name.split("/")
    if source == "timm":
        return timm.create_model(model, **({"layers": (1, 1, 1, 1)} if name in HUGE else {}))
    extra = {"init_weights": False} if model == "googlenet" else {}
    return torchvision.models.get_model(model, weights=None, **extra)


def stock_stem(model: nn.Module, names: str) -> nn.Sequential:
    """The stem's modules as they follow each other, copied out of a stock model."""
    parts = [copy.deepcopy(model.get_submodule(name)) for name in names.split(" -> ")]
    if names.startswith("conv1.conv "):  # googlenet's relu is a function
        parts.insert(2, nn.ReLU())
    return nn.Sequential(*parts)


def test_the_table_is_the_census(shared_data: Path):
    """All models of the tiers A and A3 (one convolution, then a max pool) and D (BlurPool) are in the table."""
    with open(shared_data / "stems.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["tier"].split(":")[0] in ("A", "A3", "D")]
    assert sorted(MODELS) == sorted(f"{row['source']}/{row['model']}" for row in rows)
    assert sum(not row["tier"].startswith("D") for row in rows) == 77


def input_of(name: str, images: int) -> torch.Tensor:
    """Small images of odd sides, if the model is not particular about them."""
    height, width = (256, 256) if "halonet" in name else (64, 64) if name in PARTICULAR else (45, 39)
    return torch.randn(images, 3, height, width)


@pytest.mark.parametrize("name", MODELS)
def test_convert_and_revert(name: str):
    """In eval a stem that swaps nothing gives the stock model's bits under its keys, and so does the reverted model.

    One stem of each kind (parts that print alike) also trains as the stock stem does.
    """
    model, names = build(name), MODELS[name]
    conv_name = names.split(" -> ")[0]
    conv = model.get_submodule(conv_name)
    norms = [m for m in map(model.get_submodule, names.split(" -> ")) if hasattr(m, "running_var")]
    for norm in norms:
        norm.weight.data.normal_()
        norm.bias.data.normal_()
        norm.running_mean.normal_(0, 0.3)
        norm.running_var.uniform_(0.5, 2)
        assert (norm.weight < 0).any() and (norm.weight > 0).any()
    model.eval()
    x = input_of(name, 1)
    state = {key: value.clone() for key, value in model.state_dict().items()} if _is_small(model) else None
    keys, modules = list(model.state_dict()), dict(model.named_modules())
    stock = stock_stem(model, names)
    with torch.no_grad():
        expected = model(x)
        assert expected.isfinite().all() and expected.std() > 0

        # All channels on the stock pooling: the same bits, under the same keys.
        report = mixpool.convert(model, select="none")
        assert report.stem == names
        assert report.poolings == (("blurpool" if "blur" in name else "max"),) * conv.out_channels
        assert torch.equal(model(x), expected)
        mixed = model.get_submodule(conv_name)
        assert isinstance(mixed, mixpool.MixPoolStem) and mixed.weight is conv.weight
        restored = mixpool.stock_state_dict(model)
        assert list(restored) == keys
        if state is not None:
            assert all(torch.equal(restored[key], value) for key, value in state.items())
    if conv.in_channels == 3 and repr(stock) not in STEMS_TRAINED:
        assert_trains_as(mixed, stock)
        STEMS_TRAINED.add(repr(stock))

    # The way back: the same modules, keys and bits.
    mixpool.revert(model)
    assert list(model.state_dict()) == keys
    assert all(after is before for after, before in zip(model.modules(), modules.values(), strict=True))
    with torch.no_grad():
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize("name", TRAINED)
def test_mixed_plan(name: str):
    """All five poolings side by side: sizes stay, every parameter learns, revert returns to the stock model."""
    model, names = build(name), MODELS[name]
    conv_name = names.split(" -> ")[0]
    state = copy.deepcopy(model.state_dict())
    x = torch.randn(2, 3, 64, 72)
    model.eval()
    with torch.no_grad():
        expected = model(x)
        channels = model.get_submodule(conv_name).out_channels
        poolings = tuple(tuple(POOLINGS)[channel % len(POOLINGS)] for channel in range(channels))
        report = mixpool.convert(model, select=poolings)
        assert report.poolings == poolings and 0 < report.num_complex < channels
        out = model(x)
    assert out.shape == expected.shape and out.isfinite().all()
    assert not torch.equal(out, expected)

    model.train()
    out = model(x)
    out = out if isinstance(out, torch.Tensor) else out.logits + out.aux_logits1 + out.aux_logits2  # googlenet
    (out * torch.randn_like(out)).sum().backward()
    assert [key for key, parameter in model.named_parameters() if parameter.grad is None] == []
    learns = model.get_submodule(conv_name).weight.grad.abs().amax(dim=(1, 2, 3)) > 0
    for i, name in enumerate(POOLINGS):
        assert learns[i :: len(POOLINGS)].float().mean() > 0.6, name  # a few random ReLUs are dead

    with pytest.warns(UserWarning, match="no channel plan"):
        model.load_state_dict(state)
    mixpool.revert(model.eval())
    with torch.no_grad():
        assert torch.equal(model(x), expected)


def assert_trains_as(mixed: mixpool.MixPoolStem, stock: nn.Sequential) -> None:
    """In float64 and training mode: output, statistics and gradients of an all-max stem are the stock stem's."""
    mixed, stock = copy.deepcopy(mixed).double().train(), stock.double().train()
    results = []
    for stem, conv, norm in ((mixed, mixed, mixed.bn), (stock, stock[0], stock[1])):
        torch.manual_seed(1)
        x = torch.randn(3, 3, 57, 66, dtype=torch.float64, requires_grad=True)
        out = stem(x)
        out.backward(torch.randn_like(out))
        result = {"out": out, "grad x": x.grad, "grad weight": conv.weight.grad}
        if mixed.bn is not None:
            result |= {"grad gamma": norm.weight.grad, "grad beta": norm.bias.grad}
            result |= {"mean": norm.running_mean, "var": norm.running_var, "count": norm.num_batches_tracked}
        else:
            result |= {"grad bias": conv.bias.grad}
        results.append(result)
    for key, value in results[0].items():
        torch.testing.assert_close(value, results[1][key], rtol=1e-9, atol=1e-9, msg=lambda m, key=key: f"{key}: {m}")


def _is_small(model: nn.Module) -> bool:
    return sum(p.numel() for p in model.parameters()) < 60e6
