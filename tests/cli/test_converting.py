"""What `inspect` and `convert` load and how they convert it."""

from __future__ import annotations

import json

import pytest
import torch
import torchvision
from safetensors.torch import load_file

import mixpool
from mixpool.cli import main
from mixpool.cli.converting import parse_select

STOCK = "torchvision/squeezenet1_0"


def test_options_reach_convert(checkpoint, capsys):
    options = ["--select", "0,4,10-12", "--pooling", "cmod", "--rest", "blurpool", "--stem", "features.0"]
    assert main(["inspect", STOCK, "--checkpoint", str(checkpoint), "--json", *options]) == 0
    report = json.loads(capsys.readouterr().out)
    swapped = [channel["channel"] for channel in report["channels"] if channel["pooling"] == "cmod"]
    assert swapped == [0, 4, 10, 11, 12]
    assert report["poolings"] == {"blurpool": 91, "cmod": 5} and report["num_complex"] == 5


def test_random_weights_are_announced(capsys):
    assert main(["inspect", "resnet18", "--select", "none"]) == 0
    out, err = capsys.readouterr()
    assert "0 of 64 channels" in out and "random weights" in err


@pytest.fixture(scope="module")
def report(checkpoint, gabor_squeezenet):
    """What `inspect` prints of the stock checkpoint where all channels are asked for."""
    model = gabor_squeezenet()
    model.load_state_dict(load_file(checkpoint))
    return f"{mixpool.convert(model, select='all')}\n"


@pytest.mark.parametrize("entry, prefix", [("state_dict", ""), ("model", "module."), (None, "module._orig_mod.")])
def test_torch_checkpoints(entry, prefix, tmp_path, checkpoint, report, capsys):
    state = {prefix + key: value for key, value in load_file(checkpoint).items()}
    path = tmp_path / "stock.pth"
    torch.save(state if entry is None else {entry: state, "epoch": 3}, path)
    assert main(["inspect", STOCK, "--checkpoint", str(path), "--select", "all"]) == 0
    assert capsys.readouterr().out == report


def test_selections_that_make_no_sense():
    assert parse_select("auto") == "auto"
    with pytest.raises(ValueError, match="range 9-3 of --select to go upwards"):
        parse_select("0,9-3")
    with pytest.raises(ValueError, match="got '0,x'"):
        parse_select("0,x")


def test_another_number_of_classes(tmp_path, fails, gabor_squeezenet):
    path = tmp_path / "ten.pt"
    torch.save(gabor_squeezenet(num_classes=10).state_dict(), path)
    assert "--num-classes" in fails("inspect", STOCK, "--checkpoint", path)
    assert main(["inspect", STOCK, "--checkpoint", str(path), "--num-classes", "10", "--select", "none"]) == 0


def test_pretrained_weights_without_a_network(monkeypatch, fails):
    def unreachable(*args, **kwargs):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(torchvision.models, "get_model", unreachable)
    message = fails("inspect", STOCK, "--pretrained")
    assert "cannot get the pretrained weights" in message and "no route to host" in message
