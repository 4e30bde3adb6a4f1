"""Models by name and checkpoints from files: which weights are taken, and what is refused."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from mixpool import convert
from mixpool.conversion.checkpoint import read_checkpoint
from mixpool.conversion.convert import revert
from mixpool.evaluation.model_input import find_model_input
from mixpool.evaluation.views import OwnView
from mixpool.filters.gabor import gabor_bank
from mixpool.stabilization.files import description_of, save_stabilized
from mixpool.stabilization.stabilize import stabilize
from mixpool.stabilization.treat import treated_layers
from mixpool.stem.module import MixPoolStem
from mixpool.timm_models.loading import _torchvision_config, load_model
from mixpool.training.options import OPTIONS

NAME = "resnet18"


def model_of(num_classes=2):
    model = timm.create_model(NAME, num_classes=num_classes).eval()
    model.conv1.weight.data.copy_(gabor_bank(64))
    return model


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "stock.safetensors"
    save_file(model_of().state_dict(), path)
    return path


@pytest.mark.parametrize(("pooling", "suffix"), [("cmod", "safetensors"), ("energy", "pth")])
def test_a_converted_checkpoint_gives_the_converted_model(tmp_path, pooling, suffix):
    model = model_of()
    convert(model, pooling=pooling)
    path = tmp_path / f"mixed.{suffix}"
    save_file(model.state_dict(), path) if suffix == "safetensors" else torch.save(model.state_dict(), path)
    loaded = load_model(NAME, path, num_classes=2)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))
    assert isinstance(loaded.conv1, MixPoolStem) and pooling in loaded.conv1.poolings and not loaded.training
    revert(loaded)
    assert isinstance(loaded.conv1, nn.Conv2d)


@pytest.mark.parametrize("kind", ["stock", "converted"])
def test_a_registered_mixpool_model_takes_both_kinds_of_checkpoint(tmp_path, kind):
    model = model_of()
    if kind == "stock":
        save_file(model.state_dict(), tmp_path / "weights.safetensors")
        convert(model)
    else:
        convert(model, select="all")
        save_file(model.state_dict(), tmp_path / "weights.safetensors")
    loaded = load_model(f"mixpool_{NAME}", tmp_path / "weights.safetensors", num_classes=2)
    assert loaded.conv1.poolings == model.conv1.poolings and model.conv1.num_complex > 0
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), model(x))


def test_a_converted_checkpoint_of_another_model(tmp_path):
    model = model_of()
    convert(model)
    save_file(model.state_dict(), tmp_path / "mixed.safetensors")
    with pytest.raises(ValueError, match="mixed.safetensors does not fit resnet34"):
        load_model("resnet34", tmp_path / "mixed.safetensors", num_classes=2)


def test_free_imaginary_filters_are_refused(tmp_path):
    """Such a file of version 0.1 is not loaded without them: the network would be another one."""
    model = model_of()
    convert(model, pooling="cmod")
    torch.save({**model.state_dict(), "conv1.weight_imag": model.conv1.weight}, tmp_path / "free.pth")
    for name in (NAME, f"mixpool_{NAME}"):
        with pytest.raises(ValueError, match="free.pth does not fit .*weight_imag .*no free imaginary filters"):
            load_model(name, tmp_path / "free.pth", num_classes=2)


@pytest.fixture(scope="module")
def steady():
    """A stabilized network."""
    torch.manual_seed(3)
    model = model_of()
    stabilize(model, torch.randn(8, 3, 40, 40), repair="statistics", depth="all")
    return model


def test_a_file_of_a_stabilized_network_gives_that_network(steady, tmp_path):
    save_stabilized(steady, tmp_path / "steady.safetensors")
    torch.save({"state_dict": steady.state_dict(), **description_of(steady)}, tmp_path / "steady.pth.tar")
    for name in ("steady.safetensors", "steady.pth.tar"):
        loaded = load_model(NAME, tmp_path / name, num_classes=2)
        assert same_outputs(loaded, steady) and treated_layers(loaded) == treated_layers(steady)
        assert len(treated_layers(steady)) == 7 and not loaded.training
    assert not same_outputs(timm.create_model(NAME, num_classes=2, checkpoint_path=tmp_path / name), steady)
    with pytest.raises(ValueError, match="steady.safetensors does not fit the ResNet: .*fc.weight"):
        load_model(NAME, tmp_path / "steady.safetensors", num_classes=5)
    with pytest.raises(ValueError, match="does not fit the MixPoolResNet: expected maxpool to be a MaxPool2d"):
        load_model(f"mixpool_{NAME}", tmp_path / "steady.safetensors", num_classes=2)


def test_a_stabilized_network_is_built_as_it_was_trained(tmp_path):
    arguments = {"num_classes": 2, "global_pool": "max"}
    for arch in (NAME, f"mixpool_{NAME}"):
        model = timm.create_model(arch, **arguments).eval()
        stabilize(model, torch.randn(8, 3, 40, 40), stem="max", repair="statistics", depth="all")
        path = tmp_path / f"{arch}.safetensors"
        save_stabilized(model, path, arch=arch, settings={"num_classes": 2, "gp": "max", "lr": 0.1})
        assert same_outputs(load_model(NAME, path), model)
        assert read_checkpoint(path).is_of(NAME) and len(treated_layers(model)) == 6


def training_checkpoint(path, model, average=None, arch=NAME, **settings):
    """As `mixpool train` writes it, or timm's script where `settings` come as a namespace."""
    state = {"arch": arch, "epoch": 3, "state_dict": model.state_dict()}
    if average is not None:
        state["state_dict_ema"] = average.state_dict()
    state["args"] = {name: option.default for name, option in OPTIONS.items()} | settings
    torch.save(state, path)
    return path


def same_outputs(first, second, size=64):
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        return torch.equal(first.eval()(x), second.eval()(x))


@pytest.mark.parametrize("entry", ["model_ema", "state_dict_ema"])
def test_an_entry_without_an_average(entry, tmp_path):
    model = model_of()
    torch.save({entry: None, "model": model.state_dict()}, tmp_path / "w.pth")
    checkpoint = read_checkpoint(tmp_path / "w.pth")
    assert not checkpoint.has_average and checkpoint.state.keys() == model.state_dict().keys()
    torch.save({entry: model.state_dict()}, tmp_path / "w.pth")
    assert read_checkpoint(tmp_path / "w.pth").is_average
    with pytest.raises(ValueError, match="expected a state dict in .* its entry state_dict, model"):
        read_checkpoint(tmp_path / "w.pth", use_ema=False)


def test_other_arguments_of_the_training(tmp_path):
    arch = f"mixpool_{NAME}"
    model = timm.create_model(arch, num_classes=2, global_pool="max", bn_eps=0.3)
    path = training_checkpoint(tmp_path / "w.pth", model, arch=arch, num_classes=2, gp="max", bn_eps=0.3, drop=0.5)
    assert same_outputs(load_model(f"{arch}.a1_in1k", path), model)
    with pytest.raises(ValueError, match="does not fit"):
        load_model(arch, path, num_classes=5)


@pytest.mark.parametrize(
    "old, poolings",
    [
        ({"max_blur": 3, "blur": 1, "imag": "tied"}, ["cmod", "blurpool"] * 32),
        ({"blur": 3, "num_bank": 24, "aa_layer": "blur"}, ["modulus", "max"] * 32),
    ],
)
def test_a_checkpoint_of_a_training_with_version_0_1(old, poolings, tmp_path):
    """Its model_kwargs name what now are poolings; the plan says them, and the other arguments still count."""
    arch = f"mixpool_{NAME}"
    model = timm.create_model(arch, num_classes=2, select=poolings, aa_layer=old.get("aa_layer")).eval()
    path = training_checkpoint(tmp_path / "old.pth.tar", model, arch=arch, num_classes=2, model_kwargs=old)
    for name in (arch, NAME):
        loaded = load_model(name, path)
        assert loaded.conv1.poolings == tuple(poolings) and same_outputs(loaded, model)


def test_every_weight_of_torchvision_is_resized_as_it_says():
    """Its own transform and ours give the same bytes; among them 299 of 342, 224 of 232, 300 of 320 bicubic."""
    from torchvision import models
    from torchvision.transforms import functional

    seen = {}
    for name in models.list_models(module=models):
        for weights in models.get_model_weights(name):
            transform = weights.transforms()
            config = _torchvision_config(transform)
            assert math.floor(config["input_size"][1] / config["crop_pct"]) == transform.resize_size[0]
            seen[tuple(config.items())] = transform
    assert len(seen) > 10
    image = Image.effect_noise((330, 290), 60).convert("RGB")
    for settings, transform in sorted(seen.items(), key=str)[::4]:
        wanted = find_model_input(nn.Identity(), dict(settings))
        expected = transform(image)
        found = functional.to_tensor(OwnView(wanted)(image).copy())
        torch.testing.assert_close(functional.normalize(found, wanted.mean, wanted.std), expected)
