"""A stabilized network in a file and back: to the bit, all or nothing, and what is refused."""

from __future__ import annotations

import json
import os

import pytest
import timm
import torch
import torchvision
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_net import Net, assert_unchanged, snapshot
from torch import nn

import mixpool
from mixpool.conversion.checkpoint import write_safetensors
from mixpool.conversion.stock import converted_stems
from mixpool.filters.gabor import gabor_bank
from mixpool.stabilization.files import description_of, is_stabilized, load_stabilized, save_stabilized
from mixpool.stabilization.treat import treated_layers

X = torch.randn(2, 3, 64, 64)


def stabilized_net(**arguments):
    torch.manual_seed(1)
    model = Net().eval()
    model.conv1.weight.data.copy_(gabor_bank(8, 3, 7))
    mixpool.stabilize(model, torch.randn(16, 3, 48, 48), depth="all", **arguments)
    for stem in converted_stems(model).values():
        stem.lay([arguments["stem"], "blurpool"] * 4)  # of noise, no channel is chosen
    return model


def same(first: nn.Module, second: nn.Module) -> bool:
    with torch.no_grad():
        return torch.equal(first.eval()(X), second.eval()(X))


@pytest.mark.parametrize("stem", ["blurpool", "energy", "modulus"])
def test_a_round_trip_is_equal_to_the_bit(stem, tmp_path):
    model = stabilized_net(stem=stem)
    save_stabilized(model, tmp_path / "steady.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["steady.safetensors"]
    other = Net().train()
    assert load_stabilized(other, tmp_path / "steady.safetensors") is other and other.training
    assert not same(Net(), model) and same(other, model)
    state = other.state_dict()
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert treated_layers(other) == treated_layers(model) and is_stabilized(other)
    assert bool(converted_stems(other)) == bool(converted_stems(model)) == (stem != "blurpool")


@pytest.mark.parametrize("order", ["before", "behind"])
def test_a_resnet_comes_back(order, tmp_path):
    model = timm.create_model("resnet14t", num_classes=3, channels=(8, 8, 16, 16)).eval()
    mixpool.stabilize(model, torch.randn(8, 3, 40, 40), order=order, repair="statistics", depth="all")
    save_stabilized(model, tmp_path / "steady.safetensors")
    other = timm.create_model("resnet14t", num_classes=3, channels=(8, 8, 16, 16))
    assert same(load_stabilized(other, str(tmp_path / "steady.safetensors")), model)


def test_what_the_file_says(tmp_path):
    model = stabilized_net()
    settings = {"num_classes": 5, "img_size": 48, "mean": (0.1, 0.2, 0.3), "lr": 0.1, "gp": None, "model_kwargs": {}}
    save_stabilized(model, tmp_path / "steady.safetensors", arch="net", settings=settings)
    with safe_open(tmp_path / "steady.safetensors", "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["mixpool"]) == {
        "version": mixpool.__version__,
        "plan": {"maxpool": "maxima, then low-pass"},
        "arch": "net",
        "args": {"num_classes": 5, "img_size": 48, "mean": [0.1, 0.2, 0.3], "model_kwargs": {}},
    }
    assert description_of(Net()) == {} and not is_stabilized(Net())


def test_the_keys_are_stock_so_that_others_load_the_weights_without_the_low_passes(tmp_path):
    model = stabilized_net()
    save_stabilized(model, tmp_path / "steady.safetensors")
    plain = Net()
    plain.load_state_dict(load_file(tmp_path / "steady.safetensors"))
    assert torch.equal(plain.conv2.weight, model.conv2.weight) and not same(plain, model)


def test_timms_own_route_needs_the_low_passes_as_well(tmp_path):
    torch.manual_seed(2)
    model = timm.create_model("resnet14t", num_classes=3).eval()
    mixpool.stabilize(model, torch.randn(8, 3, 40, 40), repair="statistics", depth="all")
    path = tmp_path / "steady.safetensors"
    save_stabilized(model, path)
    weights_alone = timm.create_model("resnet14t", num_classes=3, checkpoint_path=path)
    assert not same(weights_alone, model)
    assert same(mixpool.load_stabilized(weights_alone, path), model)
    assert same(mixpool.load_stabilized(timm.create_model("resnet14t", num_classes=3), path), model)


def test_a_loaded_model_has_no_way_back(tmp_path):
    model = stabilized_net()
    save_stabilized(model, tmp_path / "steady.safetensors")
    loaded = load_stabilized(Net(), tmp_path / "steady.safetensors")
    before = snapshot(loaded)
    with pytest.raises(ValueError, match="stock weights are gone: .* the model is from a file"):
        mixpool.revert(loaded)
    with pytest.raises(ValueError, match="stabilized already"):
        mixpool.stabilize(loaded, torch.randn(16, 3, 48, 48))
    assert_unchanged(loaded, before)
    mixpool.revert(model)  # saving takes no way back from the model itself
    save_stabilized(loaded, tmp_path / "again.safetensors")
    assert same(load_stabilized(Net(), tmp_path / "again.safetensors"), loaded)


def test_a_network_with_nothing_to_low_pass_is_stabilized_too(tmp_path):
    model = stabilized_net(stem="max", later=None)
    assert treated_layers(model) == {}
    save_stabilized(model, tmp_path / "steady.safetensors")
    loaded = load_stabilized(Net(), tmp_path / "steady.safetensors")
    assert same(loaded, model) and is_stabilized(loaded)


def test_what_is_wrapped_is_written_without_the_wrapper(tmp_path):
    model = stabilized_net()
    save_stabilized(nn.DataParallel(model), tmp_path / "steady.safetensors")
    assert same(load_stabilized(Net(), tmp_path / "steady.safetensors"), model)
    with pytest.raises(ValueError, match="found a DataParallel around it"):
        load_stabilized(nn.DataParallel(Net()), tmp_path / "steady.safetensors")


def test_another_dtype_of_the_model_stays(tmp_path):
    save_stabilized(stabilized_net(), tmp_path / "steady.safetensors")
    loaded = load_stabilized(Net().double(), tmp_path / "steady.safetensors")
    assert all(p.dtype == torch.float64 for p in loaded.parameters())


# --- all or nothing ---------------------------------------------------------------------------------------------------


def test_what_is_not_stabilized_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="expected a stabilized model, got a Net without low-passes"):
        save_stabilized(Net(), tmp_path / "stock.safetensors")
    with pytest.raises(ValueError, match=r"named \*.safetensors"):
        save_stabilized(stabilized_net(), tmp_path / "steady.pth")
    assert not list(tmp_path.iterdir())


def test_files_that_are_refused(tmp_path):
    model = Net()
    before = snapshot(model)
    save_file(model.state_dict(), tmp_path / "stock.safetensors")
    with pytest.raises(ValueError, match="stock.safetensors names no low-passes"):
        load_stabilized(model, tmp_path / "stock.safetensors")
    with pytest.raises(FileNotFoundError, match="nowhere.safetensors does not exist"):
        load_stabilized(model, tmp_path / "nowhere.safetensors")
    for plan, message in (
        ({"pool": "maxima, then low-pass"}, "expected pool to be a MaxPool2d .*no such module"),
        ({"conv1": "maxima, then low-pass"}, "expected conv1 to be a MaxPool2d of the stock model, found Conv2d"),
        ({"maxpool": "magic"}, "expected a treatment of .*got 'magic' of maxpool"),
    ):
        write_safetensors(model, tmp_path / "bad.safetensors", {"mixpool": json.dumps({"plan": plan})})
        with pytest.raises(ValueError, match=f"bad.safetensors does not fit the Net: {message}"):
            load_stabilized(model, tmp_path / "bad.safetensors")
    assert_unchanged(model, before)


@pytest.mark.parametrize("stem", ["blurpool", "energy"])
def test_a_file_that_does_not_fit_leaves_the_model_as_it_was(stem, tmp_path):
    model = stabilized_net(stem=stem, repair=None)
    save_stabilized(model, tmp_path / "steady.safetensors")
    other = Net()
    other.fc = nn.Linear(12, 6)  # the last to load: all other tensors have been overwritten by then
    before = snapshot(other)
    x = other.eval()(X)
    other.train()
    with pytest.raises(ValueError, match="steady.safetensors does not fit the Net: .*fc.weight"):
        load_stabilized(other, tmp_path / "steady.safetensors")
    assert_unchanged(other, before)
    assert torch.equal(other.eval()(X), x) and not is_stabilized(other)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "steady.safetensors"
    save_stabilized(stabilized_net(), path)
    old = path.read_bytes()

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        save_stabilized(stabilized_net(stem="energy"), path)
    assert path.read_bytes() == old and list(tmp_path.iterdir()) == [path]


def test_torchvisions_squeezenet(tmp_path):
    model = torchvision.models.squeezenet1_1(num_classes=3).eval()
    mixpool.stabilize(model, torch.randn(8, 3, 40, 40), repair=None)
    save_stabilized(model, tmp_path / "steady.safetensors")
    other = torchvision.models.squeezenet1_1(num_classes=3)
    assert same(load_stabilized(other, tmp_path / "steady.safetensors"), model) and len(treated_layers(other)) == 3
