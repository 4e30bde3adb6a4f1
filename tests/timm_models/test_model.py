"""What timm's own tests ask of a model, and where weights come from and what becomes of them.

No test uses a network: the functions of timm that download are replaced by ones that give files made here.
"""

from __future__ import annotations

import copy
import functools
import json
import pickle
import shutil
from types import SimpleNamespace

import pytest
import timm
import timm.models._builder
import timm.models._hub
import timm.optim
import timm.utils
import torch
from cheap_weights import make_cheap
from huggingface_hub.errors import LocalEntryNotFoundError
from timm.layers import BlurPool2d
from torch import Tensor, nn

import mixpool
import mixpool.timm_models
import mixpool.timm_models.alexnet
from mixpool import convert, revert, stock_state_dict
from mixpool.selection.stats import FilterStats
from mixpool.timm_models.alexnet import AlexNet
from mixpool.timm_models.model import MixPoolModel
from mixpool.timm_models.registry import ARCHITECTURES

NAMES = [f"mixpool_{name}" for name in ARCHITECTURES]
# More than 40 million parameters, and the same code as the others: one block per stage. (test_registry.py has all.)
LARGE = ("resnet101", "resnet152", "resnext101_32x4d", "resnext101_32x8d", "resnext101_64x4d") + (
    "wide_resnet50_2",
    "wide_resnet101_2",
)
ONE_PER_CLASS = ["mixpool_resnet18", "mixpool_densenet121", "mixpool_alexnet"]


@pytest.fixture(autouse=True)
def cheap(monkeypatch) -> None:
    """Weights that cost little, and AlexNet's two hidden layers, 54 of its 57 million parameters, much smaller."""
    make_cheap(monkeypatch)
    monkeypatch.setattr(mixpool.timm_models.alexnet, "HIDDEN", 128)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 72, 64)


def outputs(model: nn.Module, x: Tensor):
    with torch.no_grad():
        return model.eval()(x)


def stem_of(model: nn.Module) -> mixpool.MixPoolStem:
    return next(module for module in model.modules() if isinstance(module, mixpool.MixPoolStem))


def stock_model(name: str, **options) -> nn.Module:
    """A stock model as training leaves it: oriented filters, so that some suit the modulus.

    AlexNet is ours, with torchvision's keys (test_alexnet.py) and smaller hidden layers.
    """
    bare = name.removeprefix("mixpool_").split(".")[0]
    model = AlexNet(**options) if bare == "alexnet" else timm.create_model(bare, **options)
    mixpool.initialize(model, "gabor", num_channels=20, pooling="max")
    revert(model)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1, 0.5)
            nn.init.normal_(module.bias, 0, 0.2)
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.7, 1.5)
    return model.eval()


@pytest.fixture(scope="module")
def stock() -> nn.Module:
    """A resnet18 of ten classes. Do not change it."""
    torch.manual_seed(0)
    return stock_model("resnet18", num_classes=10)


@pytest.fixture(scope="module")
def mixed(stock) -> nn.Module:
    """What `convert` makes of it. Do not change it."""
    model = copy.deepcopy(stock)
    assert 0 < convert(model).num_complex < 64
    return model


@pytest.fixture(scope="module")
def stock_file(stock, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("stock") / "stock.pth"
    torch.save(stock.state_dict(), path)
    return str(path)


def overlay(file: str, num_classes: int = 10) -> dict:
    return {"file": file, "num_classes": num_classes}


def every_third(stats: FilterStats) -> list[bool]:
    return [channel % 3 == 0 for channel in range(len(stats))]


def trained(**options) -> nn.Module:
    """A mixpool_resnet18 whose plan no rule would choose and whose weights no other seed gives."""
    return copy.deepcopy(_trained(tuple(options.items())))


@functools.cache
def _trained(options: tuple) -> nn.Module:
    options = dict(options)
    model = timm.create_model("mixpool_resnet18", **{"num_classes": 10, "init": "none", "select": "none", **options})
    revert(model)
    convert(model, select=every_third, **{name: options[name] for name in ("pooling", "rest") if name in options})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * parameter.std(unbiased=False) * torch.randn_like(parameter))
    return model.eval()


# --- what timm's tests ask of every model -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_model_forward_and_backward(name: str, x):
    depth = {"layers": (1, 1, 1, 1)} if name.removeprefix("mixpool_") in LARGE else {}
    model = timm.create_model(name, num_classes=7, **depth).train()
    cfg = model.pretrained_cfg
    assert cfg["architecture"] == name and isinstance(model, MixPoolModel)
    stem = model.get_submodule(cfg["first_conv"])
    assert isinstance(stem, mixpool.MixPoolStem)
    assert stem.num_complex == (32 if "alexnet" in name else 48) and stem.weight.requires_grad
    state = model.state_dict()
    assert f"{cfg['first_conv']}.weight" in state and f"{cfg['classifier']}.weight" in state
    assert state[f"{cfg['classifier']}.weight"].shape[0] == model.num_classes == 7

    out = model(x)
    assert out.shape == (2, 7) and out.isfinite().all()
    (out * torch.randn_like(out)).sum().backward()
    assert [key for key, parameter in model.named_parameters() if parameter.grad is None] == []
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert (stem.weight.grad.abs().amax(dim=(1, 2, 3)) > 0).float().mean() > 0.7

    with torch.no_grad():
        features = model.eval().forward_features(x)
        assert features.shape[:2] == (2, model.num_features) and features.ndim == 4
        assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
        torch.testing.assert_close(model.forward_head(features), model(x))
        model.reset_classifier(0)
        assert model.forward_head(features).shape == (2, model.head_hidden_size)
        model.reset_classifier(0, "")
        assert model(x).shape == features.shape
        model.reset_classifier(3, "avg")
        assert model.forward_head(features).shape == (2, 3) and model.get_classifier().out_features == 3


@pytest.mark.parametrize("name", ONE_PER_CLASS)
def test_at_the_native_size(name: str):
    model = timm.create_model(name, num_classes=0, global_pool="")
    cfg = model.pretrained_cfg
    out = outputs(model, torch.randn(1, *cfg["input_size"]))
    assert out.shape == (1, model.num_features, *cfg["pool_size"])


@pytest.mark.parametrize("name", ["mixpool_resnet26", *ONE_PER_CLASS])
def test_features_only(name: str):
    model = timm.create_model(name, features_only=True)
    x = torch.randn(1, 3, 128, 128)
    maps = outputs(model, x)
    channels, reductions = model.feature_info.channels(), model.feature_info.reduction()
    assert reductions == ([8, 8, 16, 32] if "alexnet" in name else [4, 4, 8, 16, 32])
    assert [m.shape[1] for m in maps] == channels
    assert all(abs(m.shape[-1] - 128 // r) <= 1 for m, r in zip(maps, reductions))
    assert "num_classes" not in model.pretrained_cfg
    picked = timm.create_model(name, features_only=True, out_indices=(1, 3))
    picked.load_state_dict({key: value for key, value in model.state_dict().items() if key in picked.state_dict()})
    chosen = outputs(picked, x)
    assert picked.feature_info.reduction() == [reductions[1], reductions[3]]
    assert torch.equal(chosen[0], maps[1]) and torch.equal(chosen[1], maps[3])


@pytest.mark.parametrize(
    ("name", "feature_cls"),
    [("mixpool_resnet18", feature_cls) for feature_cls in ("list", "dict", "hook", "fx", "getter")]
    + [("mixpool_alexnet", feature_cls) for feature_cls in ("fx", "getter")],
)
def test_features_of_all_classes(name: str, feature_cls: str, x):
    whole = timm.create_model(name)
    options = {"feature_cls": feature_cls, "out_indices": (0, 2, 3)}
    model = timm.create_model(name, features_only=True, **options)
    maps = outputs(model, x)
    maps = list(maps.values()) if isinstance(maps, dict) else maps
    stem = stem_of(model)
    assert torch.equal(maps[0], outputs(stem, x))
    reductions = (8, 8, 16, 32) if "alexnet" in name else (4, 4, 8, 16, 32)
    if hasattr(model, "feature_info"):
        assert model.feature_info.reduction() == [reductions[i] for i in (0, 2, 3)]
    assert [m.shape[1] for m in maps] == [whole.feature_info[i]["num_chs"] for i in (0, 2, 3)]
    assert len(maps) == 3 and all(m.isfinite().all() for m in maps)


@pytest.mark.parametrize("name", ONE_PER_CLASS)
def test_forward_intermediates(name: str, x):
    model = timm.create_model(name).eval()
    with torch.no_grad():
        last, maps = model.forward_intermediates(x)
        assert torch.equal(last, model.forward_features(x)) and torch.equal(maps[0], stem_of(model)(x))
        some = model.forward_intermediates(x, indices=[1, 2], stop_early=True, intermediates_only=True)
        assert torch.equal(some[0], maps[1]) and torch.equal(some[1], maps[2])
        model.prune_intermediate_layers([1, 2])
        pruned = model.forward_intermediates(x, indices=[1, 2], stop_early=True, intermediates_only=True)
        assert all(torch.equal(a, b) for a, b in zip(pruned, some))


@pytest.mark.parametrize("name", ONE_PER_CLASS)
def test_what_trainers_do(name: str, x, tmp_path):
    """Groups of parameters, an average of the weights, checkpointing of activations, copies and pickles."""
    model = timm.create_model(name, num_classes=3, drop_rate=0.0, scriptable=False, bn_momentum=None, bn_eps=None)
    groups = timm.optim.param_groups_layer_decay(model, layer_decay=0.5)
    lowest = min(group["lr_scale"] for group in groups)
    stem = stem_of(model)
    assert lowest in [group["lr_scale"] for group in groups if any(p is stem.weight for p in group["params"])]
    average = timm.utils.ModelEmaV3(model, decay=0.5)
    expected = outputs(model, x)
    assert torch.equal(outputs(average.module, x), expected)
    with torch.no_grad():
        stem.weight.mul_(1.5)
    average.update(model)
    assert not torch.equal(outputs(average.module, x), expected)
    assert torch.equal(stem_of(average.module).plan, stem.plan)
    average.module.load_state_dict(model.state_dict())
    assert torch.equal(outputs(average.module, x), outputs(model, x))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(outputs(twin, x), outputs(model, x))

    gradients = []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        model.zero_grad()
        model.eval()(x).square().sum().backward()
        gradients.append(stem.weight.grad.clone())
    torch.testing.assert_close(gradients[0], gradients[1])


def test_options_of_timms_training_script(x):
    model = timm.create_model(
        "mixpool_resnet18",
        in_chans=3,
        num_classes=5,
        drop_rate=0.3,
        drop_path_rate=0.1,
        drop_block_rate=0.1,
        global_pool="max",
        bn_momentum=0.2,
        bn_eps=1e-3,
        device="cpu",
        dtype=torch.bfloat16,
    )
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert all((norm.momentum, norm.eps) == (0.2, 1e-3) for norm in norms) and len(norms) == 20
    assert model.drop_rate == 0.3 and model.conv1.weight.dtype == torch.bfloat16
    assert outputs(model, x.bfloat16()).shape == (2, 5)
    with pytest.raises(ValueError, match="meta"):
        timm.create_model("mixpool_resnet18", device="meta")


# --- from scratch -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bank", ["wavelet", "gabor"])
@pytest.mark.parametrize("in_chans", [1, 3, 4])
def test_the_stem_starts_from_a_bank(bank: str, in_chans: int):
    torch.manual_seed(3)
    model = timm.create_model("mixpool_resnet18", in_chans=in_chans, init=bank)
    torch.manual_seed(3)
    expected = timm.create_model("resnet18", in_chans=in_chans)
    wavelets_of_gray = 16 if (bank, in_chans) == ("wavelet", 1) else 48
    mixpool.initialize(expected, bank, num_channels=wavelets_of_gray)
    for (key, value), (other, wanted) in zip(model.state_dict().items(), expected.state_dict().items(), strict=True):
        assert key == other and torch.equal(value, wanted), key
    assert model.conv1.poolings == ("blurpool",) * (64 - wavelets_of_gray) + ("modulus",) * wavelets_of_gray
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_bank_can_have_any_number_of_channels():
    torch.manual_seed(3)
    model = timm.create_model("mixpool_resnet18", num_bank=24)
    assert model.report.num_complex == model.conv1.num_complex == 24
    torch.manual_seed(3)
    twin = timm.create_model("mixpool_resnet18", num_bank=24, select="none")
    assert twin.conv1.num_complex == 0 and torch.equal(twin.conv1.weight, model.conv1.weight)
    assert set(twin.conv1.poolings) == {"max"}, "the twin has the stock pooling"
    with pytest.raises(ValueError, match="no num_bank without a bank"):
        timm.create_model("mixpool_resnet18", num_bank=48, init="none")


def test_a_stock_state_that_does_not_fit_changes_nothing(x):
    model = timm.create_model("mixpool_resnet18", num_classes=10).eval()
    with torch.no_grad():
        model.conv1.weight.add_(0.1 * torch.randn_like(model.conv1.weight))
    before, state, report = outputs(model, x), copy.deepcopy(model.state_dict()), model.report
    parameters = dict(model.named_parameters())
    for wrong in ({"conv1.weight": torch.randn(64, 3, 5, 5)}, {"conv1.weight": torch.randn(64, 3, 7, 7)}):
        with pytest.raises(RuntimeError, match="size mismatch|Missing key"):
            model.load_state_dict(wrong)
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        assert torch.equal(outputs(model, x), before) and model.report is report
        assert all(parameters[name] is parameter for name, parameter in model.named_parameters())


def test_named_channels_are_pooled_as_the_banks_own():
    named = timm.create_model("mixpool_resnet18", select=[False] * 16 + [True] * 48, pooling="energy")
    assert named.conv1.poolings == ("blurpool",) * 16 + ("energy",) * 48
    none = timm.create_model("mixpool_resnet18", select=[False] * 64)
    assert none.conv1.poolings == ("max",) * 64
    names = ["energy", "max", "cmod", "blurpool"] * 16
    assert timm.create_model("mixpool_resnet18", select=names).conv1.poolings == tuple(names)


@pytest.mark.parametrize(
    ("options", "others"),
    [
        ({}, "blurpool"),
        ({"pooling": "energy"}, "blurpool"),
        ({"rest": "max"}, "max"),
        ({"select": "none"}, "max"),
        ({"select": "none", "rest": "blurpool"}, "blurpool"),
        ({"select": "none", "aa_layer": "blur"}, "blurpool"),
        ({"aa_layer": "blur", "rest": "max"}, "max"),
        ({"init": "none", "select": every_third}, "max"),
        ({"init": "none", "select": every_third, "aa_layer": "blur"}, "blurpool"),
    ],
    ids=range(9),
)
def test_the_pooling_of_the_other_channels(options: dict, others: str):
    stem = timm.create_model("mixpool_resnet18", **options).conv1
    complex_ones = {} if options.get("select") == "none" else {options.get("pooling", "modulus")}
    assert set(stem.poolings) == {others, *complex_ones}


def test_a_wide_stem_takes_all_wavelets_that_there_are():
    model = timm.create_model("dpn107", k_sec=(1, 1, 1, 1))
    assert mixpool.initialize(model).num_complex == 80  # of 128


def test_the_default_is_the_wavelet_bank():
    torch.manual_seed(3)
    model = timm.create_model("mixpool_resnet18")
    torch.manual_seed(3)
    named = timm.create_model("mixpool_resnet18", init="wavelet")
    assert torch.equal(model.conv1.weight, named.conv1.weight)
    assert model.conv1.poolings == named.conv1.poolings and set(model.conv1.poolings) == {"modulus", "blurpool"}


def test_without_a_bank():
    torch.manual_seed(3)
    model = timm.create_model("mixpool_resnet18", init="none", select="all", pooling="cmod", rest="blurpool")
    torch.manual_seed(3)
    stock = timm.create_model("resnet18")
    assert torch.equal(model.conv1.weight, stock.conv1.weight) and model.conv1.poolings == ("cmod",) * 64


@pytest.mark.parametrize("select", ["none", "all", [True] * 8 + [False] * 56], ids=str)
def test_select_decides_instead_of_the_bank(select):
    torch.manual_seed(3)
    model = timm.create_model("mixpool_resnet18", select=select)
    torch.manual_seed(3)
    bank = timm.create_model("mixpool_resnet18")
    assert torch.equal(model.conv1.weight, bank.conv1.weight)
    assert model.conv1.num_complex == {"none": 0, "all": 64}.get(str(select), 8)


def test_arguments_that_do_not_fit():
    for options, message in (
        ({"init": "dct"}, "wavelet.*gabor.*none.*'dct'"),
        ({"aa_layer": "sharp"}, "blurpc.*'sharp'"),
        ({"select": [True]}, "64"),
        ({"pooling": "max"}, "expected pooling to be one of .*energy.*got 'max'"),
        ({"rest": "energy"}, "expected rest to be one of .*blurpool.*got 'energy'"),
        ({"select": "modulus"}, 'expected select to be "auto"'),
    ):
        with pytest.raises(ValueError, match=message):
            timm.create_model("mixpool_resnet18", **options)
    with pytest.raises(ValueError, match="average pools"):
        timm.create_model("mixpool_densenet121", aa_layer="avg")
    with pytest.raises(ValueError, match="global_pool"):
        timm.create_model("mixpool_alexnet", global_pool="")


@pytest.mark.parametrize("name", ONE_PER_CLASS)
def test_keywords_of_earlier_versions_are_refused_with_the_present_spelling(name: str):
    for options, spelling in (
        ({"blur": 1}, 'instead of blur=1 write pooling="cmod"'),
        ({"blur": 3}, 'instead of blur=3 write pooling="modulus"'),
        ({"max_blur": 3}, 'instead of max_blur=3 write rest="blurpool"'),
        ({"max_blur": 1}, 'instead of max_blur=1 write rest="max"'),
        ({"imag": "tied"}, "instead of imag='tied' write nothing"),
        ({"imag": "free"}, "free imaginary filters .* are gone"),
    ):
        with pytest.raises(TypeError, match=spelling):
            timm.create_model(name, **options)


# --- stock weights ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ONE_PER_CLASS)
def test_stock_weights_are_loaded_and_then_selected_from(name: str, x, tmp_path):
    """As loading them into the stock model and converting that by hand."""
    stock = stock_model(name)
    torch.save(stock.state_dict(), tmp_path / "stock.pth")
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": str(tmp_path / "stock.pth")})
    expected = copy.deepcopy(stock)
    report = convert(expected)
    assert 0 < report.num_complex < 64 and report.poolings == stem_of(model).poolings == model.report.poolings
    torch.testing.assert_close(outputs(model, x), outputs(expected, x), rtol=1e-5, atol=1e-5)
    assert torch.equal(stem_of(model).plan, stem_of(expected).plan)
    torch.testing.assert_close(outputs(revert(model), x), outputs(stock, x), rtol=1e-5, atol=1e-5)


def test_options_hold_for_stock_weights(stock, stock_file, x):
    options = {"select": every_third, "pooling": "energy", "rest": "blurpool", "backend": "reference"}
    model = timm.create_model("mixpool_resnet18", True, pretrained_cfg_overlay=overlay(stock_file), **options)
    expected = copy.deepcopy(stock)
    convert(expected, **options)
    assert torch.equal(outputs(model, x), outputs(expected, x))
    assert set(model.conv1.poolings) == {"energy", "blurpool"} and model.conv1.backend == "reference"
    seen = []
    model = timm.create_model(
        "mixpool_resnet18",
        True,
        pretrained_cfg_overlay=overlay(stock_file),
        select=lambda stats: seen.append(stats) or every_third(stats),
    )
    assert len(seen) == 1 and model.conv1.poolings[:4] == ("modulus", "max", "max", "modulus")


@pytest.mark.parametrize("in_chans", [1, 4])
def test_stock_weights_on_other_channels_and_classes(in_chans: int, stock_file):
    options = {"pretrained": True, "pretrained_cfg_overlay": overlay(stock_file), "in_chans": in_chans}
    expected = timm.create_model("resnet18", num_classes=6, **options)
    model = timm.create_model("mixpool_resnet18", num_classes=6, **options)
    assert 0 < model.conv1.num_complex < 64
    x = torch.randn(2, in_chans, 64, 64)
    assert outputs(model, x).shape == (2, 6)
    with torch.no_grad():
        assert torch.equal(revert(model).forward_features(x), expected.eval().forward_features(x))


@pytest.mark.parametrize("feature_cls", ["list", "fx", "getter"])
def test_features_of_stock_weights(feature_cls: str, mixed, stock_file, x):
    options = {"features_only": True, "feature_cls": feature_cls, "out_indices": (0, 4)}
    model = timm.create_model("mixpool_resnet18", True, pretrained_cfg_overlay=overlay(stock_file), **options)
    maps = outputs(model, x)
    with torch.no_grad():
        assert torch.equal(maps[0], mixed.conv1(x)) and torch.equal(maps[1], mixed.forward_features(x))


@pytest.mark.parametrize(
    ("name", "hub_id"),
    [
        ("mixpool_resnet18", "timm/resnet18.a1_in1k"),
        ("mixpool_resnet18.tv_in1k", "timm/resnet18.tv_in1k"),
        ("mixpool_densenet121", "timm/densenet121.ra_in1k"),
    ],
)
def test_pretrained_asks_the_hub_for_the_stock_weights(name: str, hub_id: str, monkeypatch, tmp_path):
    stock, asked = stock_model(name), []
    torch.save(stock.state_dict(), tmp_path / "file.bin")

    def download(repo_id: str, filename: str, **_) -> str:
        asked.append(repo_id)
        if filename.endswith(".safetensors"):
            raise LocalEntryNotFoundError("no such file here")
        return str(tmp_path / "file.bin")

    monkeypatch.setattr(timm.models._hub, "hf_hub_download", download)
    model = timm.create_model(name, pretrained=True, select="all")
    assert set(asked) == {hub_id}
    assert stem_of(model).num_complex == 64
    restored = stock_state_dict(model)
    assert list(restored) == list(stock.state_dict())
    assert all(torch.equal(restored[key], value) for key, value in stock.state_dict().items())


def test_pretrained_asks_torchvisions_server_for_alexnet(monkeypatch, x):
    stock, asked = stock_model("alexnet"), []

    def download(url: str, **_) -> dict[str, Tensor]:
        asked.append(url)
        return stock.state_dict()

    monkeypatch.setattr(timm.models._builder, "load_state_dict_from_url", download)
    model = timm.create_model("mixpool_alexnet", pretrained=True, select="none")
    assert asked == ["https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"]
    assert torch.equal(outputs(model, x), outputs(stock, x))


def test_a_densenet_file_of_torchvision(tmp_path, x):
    """Their keys have a dot more, as the files of the first release."""
    stock = stock_model("densenet121")
    dotted = {
        key.replace("norm1.", "norm.1.").replace("conv2.", "conv.2.") if "denselayer" in key else key: value
        for key, value in stock.state_dict().items()
    }
    assert dotted.keys() != stock.state_dict().keys()
    torch.save(dotted, tmp_path / "old.pth")
    options = {"pretrained_cfg_overlay": {"file": str(tmp_path / "old.pth")}, "select": "none"}
    model = timm.create_model("mixpool_densenet121", pretrained=True, **options)
    assert torch.equal(outputs(model, x), outputs(stock, x))


def test_untrained_stock_weights_give_a_warning(tmp_path):
    torch.save(timm.create_model("resnet18").state_dict(), tmp_path / "untrained.pth")
    file = str(tmp_path / "untrained.pth")
    with pytest.warns(UserWarning, match="no channel takes the modulus"):
        model = timm.create_model("mixpool_resnet18", True, pretrained_cfg_overlay={"file": file})
    with pytest.warns(UserWarning, match="no channel takes the modulus"):
        model.load_state_dict(torch.load(file))
    assert model.conv1.poolings == ("max",) * 64


@pytest.mark.parametrize("way", ["checkpoint_path", "load_checkpoint", "load_state_dict", "local-dir"])
def test_stock_weights_by_other_ways(way: str, stock, mixed, stock_file, tmp_path, x):
    if way == "checkpoint_path":
        model = timm.create_model("mixpool_resnet18", num_classes=10, checkpoint_path=stock_file)
    elif way == "local-dir":
        model = timm.create_model("mixpool_resnet18", num_classes=10)
        timm.models.save_for_hf(model, str(tmp_path))
        (tmp_path / "pytorch_model.bin").unlink()
        shutil.copy(stock_file, tmp_path / "model.pth")
        model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    else:
        model = timm.create_model("mixpool_resnet18", num_classes=10)
        weight = model.conv1.weight
        if way == "load_checkpoint":
            timm.models.load_checkpoint(model, stock_file)
        else:
            keys = model.load_state_dict(stock.state_dict())
            assert not keys.missing_keys and not keys.unexpected_keys
        assert model.conv1.weight is weight  # an optimizer stays valid
    assert model.conv1.poolings == mixed.conv1.poolings == model.report.poolings
    assert torch.equal(outputs(model, x), outputs(mixed, x))


def test_a_checkpoint_that_does_not_fit_leaves_the_plan(stock):
    model, other = trained(), trained(pooling="energy", rest="blurpool")
    poolings = model.conv1.poolings
    for state in (stock.state_dict(), other.state_dict()):
        with pytest.raises(RuntimeError, match="size mismatch for fc"):
            model.load_state_dict({**state, "fc.weight": torch.zeros(3, 512)})
        if state.keys() == stock.state_dict().keys():
            assert model.conv1.poolings == poolings, "a stock state is tried first"


def test_a_reverted_model_is_a_stock_model(stock, x):
    model = revert(timm.create_model("mixpool_resnet18", num_classes=10))
    model.load_state_dict(stock.state_dict())
    assert torch.equal(outputs(model, x), outputs(stock, x))


# --- converted checkpoints --------------------------------------------------------------------------------------------


@pytest.fixture
def nothing_is_selected(monkeypatch):
    """Fails where channels are chosen from weights: a converted checkpoint brings its plan."""
    real = mixpool.timm_models.model.convert

    def convert_by_name(model, *, select, **options):
        assert isinstance(select, str) and select == "none"
        return real(model, select=select, **options)

    monkeypatch.setattr(mixpool.timm_models.model, "convert", convert_by_name)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_converted_file_brings_its_plan(suffix: str, tmp_path, x, nothing_is_selected):
    source = trained(pooling="cmod", rest="blurpool")
    file = tmp_path / f"model.{suffix}"
    if suffix == "pth":
        torch.save({"state_dict": source.state_dict(), "epoch": 3}, file)
    else:
        import safetensors.torch

        safetensors.torch.save_file(source.state_dict(), file)
    model = timm.create_model("mixpool_resnet18", True, pretrained_cfg_overlay=overlay(str(file)))
    assert model.conv1.poolings == source.conv1.poolings and model.report is None
    assert set(model.conv1.poolings) == {"cmod", "blurpool"}
    assert torch.equal(outputs(model, x), outputs(source, x))


@pytest.mark.parametrize("way", ["checkpoint_path", "load_checkpoint", "load_state_dict"])
def test_a_converted_file_by_other_ways(way: str, tmp_path, x):
    source = trained(pooling="energy")
    torch.save(source.state_dict(), tmp_path / "model.pth")
    if way == "checkpoint_path":
        model = timm.create_model("mixpool_resnet18", num_classes=10, checkpoint_path=tmp_path / "model.pth")
    else:
        model = timm.create_model("mixpool_resnet18", num_classes=10)
        if way == "load_checkpoint":
            timm.models.load_checkpoint(model, tmp_path / "model.pth")
        else:
            model.load_state_dict(source.state_dict())
    assert model.conv1.poolings == source.conv1.poolings
    assert torch.equal(outputs(model, x), outputs(source, x))


@pytest.mark.parametrize("in_chans", [1, 4])
def test_a_converted_file_on_other_channels_and_classes(in_chans: int, tmp_path, nothing_is_selected):
    """One channel sees the sum of the colours' filters: gray images give what they gave as colours."""
    source = trained()
    torch.save(source.state_dict(), tmp_path / "model.pth")
    options = {"pretrained_cfg_overlay": overlay(str(tmp_path / "model.pth")), "in_chans": in_chans}
    model = timm.create_model("mixpool_resnet18", True, num_classes=4, **options)
    assert model.conv1.poolings == source.conv1.poolings and model.fc.out_features == 4
    x = torch.randn(2, in_chans, 64, 64)
    features = model.eval().forward_features(x)
    assert features.isfinite().all()
    if in_chans == 1:
        torch.testing.assert_close(features, source.forward_features(x.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-4)


def test_features_of_a_converted_file(tmp_path, x, nothing_is_selected):
    source = trained(pooling="energy")
    torch.save(source.state_dict(), tmp_path / "model.pth")
    options = {"features_only": True, "pretrained_cfg_overlay": overlay(str(tmp_path / "model.pth"))}
    maps = outputs(timm.create_model("mixpool_resnet18", True, **options), x)
    with torch.no_grad():
        assert torch.equal(maps[0], source.conv1(x)) and torch.equal(maps[-1], source.forward_features(x))


@pytest.mark.parametrize(
    ("name", "safe"),
    [("mixpool_resnet18", False), ("mixpool_alexnet", True), ("mixpool_densenet121", "both")],
)
def test_save_for_hf(name: str, safe, tmp_path):
    options = {
        "num_classes": 5,
        "in_chans": 1,
        "rest": "max",
        "pooling": "energy",
        "aa_layer": "blur",
        "drop_rate": 0.1,
    }
    source = timm.create_model(name, **options)
    timm.models.save_for_hf(source, str(tmp_path), safe_serialization=safe)
    files = {path.name for path in tmp_path.iterdir()}
    weights = {False: {"pytorch_model.bin"}, True: {"model.safetensors"}}
    assert files == {"config.json"} | weights.get(safe, weights[False] | weights[True])
    config = json.loads((tmp_path / "config.json").read_text())
    del options["drop_rate"]  # timm does not keep it
    assert config["architecture"] == name and config["model_args"] == {"global_pool": "avg", **options}
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert model.pretrained_cfg["architecture"] == name
    x = torch.randn(2, 1, 80, 96)
    assert torch.equal(outputs(model, x), outputs(source, x))


@pytest.mark.parametrize(
    ("options", "written"),
    [
        ({"aa_layer": BlurPool2d}, {"aa_layer": "blur"}),
        ({"aa_layer": mixpool.timm_models.model.ZeroPaddedBlurPool2d}, {"aa_layer": "blurpc"}),
        ({"aa_layer": nn.AvgPool2d}, {"aa_layer": "avg"}),
        ({"select": torch.arange(64) < 10}, {"select": [True] * 10 + [False] * 54}),
        ({"select": (torch.arange(64) < 10).numpy()}, {"select": [True] * 10 + [False] * 54}),
        ({"select": every_third}, {"select": ["modulus" if i % 3 == 0 else "max" for i in range(64)]}),
        ({"select": ("energy", "blurpool") * 32}, {"select": ["energy", "blurpool"] * 32}),
    ],
    ids=["blur", "blurpc", "avg", "tensor", "array", "function", "names"],
)
def test_save_for_hf_of_what_json_does_not_know(options: dict, written: dict, tmp_path, x):
    source = timm.create_model("mixpool_resnet18", num_classes=3, init="none", **options)
    timm.models.save_for_hf(source, str(tmp_path))
    arguments = json.loads((tmp_path / "config.json").read_text())["model_args"]
    assert {name: arguments[name] for name in written} == written and arguments["init"] == "none"
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert model.conv1.poolings == source.conv1.poolings
    x = x[..., :64, :]  # with "avg" timm's ResNet takes no others
    assert torch.equal(outputs(model, x), outputs(source, x))
    assert torch.equal(outputs(copy.deepcopy(model), x), outputs(source, x))


def test_a_layer_of_ones_own_has_no_name(tmp_path):
    class Mine(BlurPool2d): ...

    model = timm.create_model("mixpool_resnet18", num_classes=3, init="none", select="none", aa_layer=Mine)
    with pytest.raises(ValueError, match="serializable"):
        timm.models.save_for_hf(model, str(tmp_path))


@pytest.mark.parametrize(
    "options", [{"pooling": "energy", "rest": "blurpool"}, {"select": "all", "pooling": "cmod"}], ids=str
)
def test_hub_round_trip(options: dict, tmp_path, monkeypatch, x):
    """push_to_hf_hub to a folder in place of the network, then hf-hub: and local-dir: from there."""
    source = trained(**options)
    hub = tmp_path / "hub"
    pushed = []

    class Api:
        """Of HfApi what push_to_hf_hub uses."""

        def __init__(self, **_) -> None: ...

        def create_repo(self, repo_id: str, **_) -> SimpleNamespace:
            return SimpleNamespace(repo_id=repo_id)

        def file_exists(self, **_) -> bool:
            return False

        def upload_folder(self, *, repo_id: str, folder_path: str, **_) -> None:
            pushed.append(repo_id)
            shutil.copytree(folder_path, hub / repo_id)

    def download(repo_id: str, filename: str, **_) -> str:
        return str(hub / repo_id / filename)

    monkeypatch.setattr(timm.models._hub, "HfApi", Api)
    monkeypatch.setattr(timm.models._hub, "hf_hub_download", download)
    timm.models.push_to_hf_hub(source, "someone/mixed")
    assert pushed == ["someone/mixed"]
    for name in ("hf-hub:someone/mixed", f"local-dir:{hub / 'someone/mixed'}"):
        model = timm.create_model(name, pretrained=True)
        assert model.num_classes == 10 and model.conv1.poolings == source.conv1.poolings
        assert torch.equal(outputs(model, x), outputs(source, x))


# --- aa_layer ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("aa_layer", [BlurPool2d, "blur", "blurpc"], ids=str)
def test_all_antialiased_is_timms_model(aa_layer, stock, x):
    """All channels on BlurPool, as timm has it: the same logits, so the later layers are antialiased alike."""
    model = timm.create_model("mixpool_resnet18", num_classes=10, aa_layer=aa_layer, select="none")
    assert set(model.conv1.poolings) == {"blurpool"}
    model.load_state_dict(stock.state_dict())
    zeros = aa_layer == "blurpc"
    layer = mixpool.timm_models.model.ZeroPaddedBlurPool2d if zeros else BlurPool2d
    expected = timm.create_model("resnet18", num_classes=10, aa_layer=layer)
    if zeros:
        expected.maxpool[1] = BlurPool2d(64)  # the stem is mixpool's
    expected.load_state_dict(stock.state_dict())
    assert torch.equal(outputs(model, x), outputs(expected, x))
    assert not torch.allclose(outputs(model, x), outputs(stock, x))


def test_aa_layer_leaves_the_stem_to_rest(stock, x):
    model = timm.create_model("mixpool_resnet18", num_classes=10, aa_layer="blur", rest="max", select="none")
    assert set(model.conv1.poolings) == {"max"} and isinstance(model.layer2[0].aa, BlurPool2d)
    model.load_state_dict(stock.state_dict())
    expected = timm.create_model("resnet18", num_classes=10, aa_layer=BlurPool2d)
    expected.maxpool = nn.MaxPool2d(3, 2, 1)
    expected.load_state_dict(stock.state_dict())
    assert torch.equal(outputs(model, x), outputs(expected, x))
    averaged = timm.create_model("mixpool_resnet18", num_classes=10, aa_layer="avg")
    assert averaged.conv1.num_complex == 48 and isinstance(averaged.layer2[0].aa, nn.AvgPool2d)


def test_aa_layer_of_the_other_models(x):
    dense = timm.create_model("mixpool_densenet121", aa_layer="blurpc", num_classes=2)
    pools = [dense.get_submodule(f"features.transition{i}.pool") for i in (1, 2, 3)]
    assert all(isinstance(pool, BlurPool2d) and pool.pad_mode == "constant" for pool in pools)
    assert set(stem_of(dense).poolings) == {"modulus", "blurpool"} and outputs(dense, x).shape == (2, 2)
    plain, blurred = (timm.create_model("mixpool_alexnet", aa_layer=aa) for aa in (None, "blur"))
    assert [m.channels for m in blurred.modules() if isinstance(m, BlurPool2d)] == [192, 256]
    assert list(blurred.state_dict()) == list(plain.state_dict())
    for size in (79, 96, 224):
        x = torch.randn(1, 3, size, size)
        with torch.no_grad():
            assert blurred.forward_features(x).shape == plain.forward_features(x).shape
