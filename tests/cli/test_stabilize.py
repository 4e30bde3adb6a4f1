"""The command `mixpool stabilize`: what it writes and says, and what it refuses before any work."""

from __future__ import annotations

import argparse
import json

import pytest
import timm
import tiny_models  # noqa: F401  the small network of these tests, in timm's registry
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

import mixpool
from mixpool.cli import main
from mixpool.cli.stabilize import _share
from mixpool.evaluation.model_input import find_model_input
from mixpool.evaluation.photos import load_images, normalize
from mixpool.filters.gabor import gabor_bank
from mixpool.stabilization.pictures import MARGIN
from mixpool.stem.module import MixPoolStem
from mixpool.timm_models.loading import load_model
from mixpool.training.options import OPTIONS

NAME = "tiny_stock"
PLAN = {"pool": "maxima, then low-pass"}


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "stock.safetensors"
    model = timm.create_model(NAME)
    model.conv.weight.data.copy_(gabor_bank(8, 3, 5))
    save_file(model.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """20 of 40 pixels, of which one is damaged."""
    folder = tmp_path_factory.mktemp("photos")
    generator = torch.Generator().manual_seed(0)
    for number in range(20):
        noise = torch.randint(256, (12, 10, 3), dtype=torch.uint8, generator=generator).numpy()
        Image.fromarray(noise).resize((60, 50)).save(folder / f"{number:02}.png")
    (folder / "20.png").write_bytes(b"no picture")
    return folder


def stabilize(*arguments) -> int:
    return main(["stabilize", *(str(argument) for argument in arguments), "--device", "cpu"])


def told(path):
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["mixpool"])


def same(first, second):
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        return torch.equal(first.eval()(x), second.eval()(x))


def test_photos_in_a_steady_network_a_report_and_a_picture_out(stock, photos, tmp_path, capsys):
    output, report, plot = (tmp_path / name for name in ("steady.safetensors", "report.json", "plot.png"))
    arguments = (
        NAME,
        "--checkpoint",
        stock,
        "--images",
        photos,
        "--repair",
        "all",
        "--depth",
        "all",
        "--fidelity",
        0.25,
        "--seed",
        3,
    )
    assert stabilize(*arguments, "--output", output, "--report", report, "--plot", plot) == 0
    out, err = capsys.readouterr()
    assert "1 of 2 decimating layers low-passed" in out and "flips at 1 px" in out and f"wrote {output}" in out
    assert f'mixpool.load_stabilized(timm.create_model("{NAME}"), "{output}")' in out
    assert f"mixpool evaluate {NAME}={output}" in out and f"--initial-checkpoint {output}" in out
    assert "20 of 21 images in" in err and "left out 20.png" in err and "random weights" not in err
    found = json.loads(report.read_text())
    assert found["plan"] == PLAN and found["model"] == NAME and found["images"] == str(photos)
    assert found["settings"]["repair"] == "all" and found["settings"]["fidelity"] == 0.25
    assert found["settings"]["size"] == 32 and sum(found["num_images"]) == 20
    assert plot.read_bytes().startswith(b"\x89PNG") and {path.name for path in tmp_path.iterdir()} == {
        output.name,
        report.name,
        plot.name,
    }

    # The same in Python, with the images as the command makes them.
    direct = timm.create_model(NAME, checkpoint_path=stock)
    wanted = find_model_input(direct)
    side = wanted.size + MARGIN
    images = load_images(photos, side, crop_ratio=min(1, wanted.crop_ratio * side / wanted.size)).images
    mixpool.stabilize(
        direct, normalize(images, wanted.mean, wanted.std), size=32, repair="all", depth="all", fidelity=0.25, seed=3
    )
    loaded = load_model(NAME, output)
    assert same(loaded, direct) and same(mixpool.load_stabilized(timm.create_model(NAME), output), direct)
    assert not same(loaded, load_model(NAME, stock)) and not loaded.training
    assert told(output) == {"version": mixpool.__version__, "plan": PLAN, "arch": NAME}


def test_without_photos_it_says_what_it_takes_and_nothing_is_repaired_if_so_asked(tmp_path, capsys):
    output = tmp_path / "steady.safetensors"
    assert stabilize(NAME, "--output", output, "--repair", "none", "--stem", "max") == 0
    out, err = capsys.readouterr()
    assert "note: no --images: synthetic pictures are used" in err and "note: random weights" in err
    assert "nothing to treat" in out or "0 of 2 decimating layers" in out
    assert told(output)["plan"] == {}


@pytest.mark.parametrize("stem", ["modulus", "energy"])
def test_a_converted_stem_is_in_the_file_too(stem, stock, photos, tmp_path, capsys):
    output = tmp_path / "steady.safetensors"
    assert stabilize(NAME, "--checkpoint", stock, "--images", photos, "--stem", stem, "--output", output) == 0
    loaded = load_model(NAME, output)
    again = tmp_path / "again.safetensors"
    assert isinstance(loaded.conv, MixPoolStem) and f"stem: {stem}" in capsys.readouterr().out
    mixpool.save_stabilized(loaded, again)
    assert same(load_model(NAME, again), loaded)


def test_a_run_of_mixpool_train_passes_on_how_it_was_built(photos, tmp_path, capsys):
    torch.manual_seed(1)
    model = timm.create_model(NAME, num_classes=3, global_pool="avg")
    settings = {name: option.default for name, option in OPTIONS.items()}
    settings |= {"num_classes": 3, "img_size": 40, "mean": [0.1, 0.2, 0.3]}
    average = {name: value.clone() for name, value in model.state_dict().items()}
    average["head.bias"] = torch.tensor([9.0, 0, 0])
    content = {"arch": NAME, "args": settings, "state_dict": model.state_dict(), "state_dict_ema": average}
    torch.save(content, tmp_path / "run.pth.tar")
    output = tmp_path / "steady.safetensors"
    assert stabilize(NAME, "--checkpoint", tmp_path / "run.pth.tar", "--images", photos, "--output", output) == 0
    assert "took the moving average" in capsys.readouterr().err
    about = told(output)
    assert about["arch"] == NAME and about["args"]["num_classes"] == 3 and about["args"]["img_size"] == 40
    assert "lr" not in about["args"]
    assert load_model(NAME, output).head.bias.shape == (3,)
    (tmp_path / "again.safetensors").write_bytes(output.read_bytes())
    assert stabilize(NAME, "--checkpoint", tmp_path / "again.safetensors", "--output", output, "--force") == 2
    assert "again.safetensors is a stabilized network already" in capsys.readouterr().err


def test_a_model_of_torchvision(tmp_path, capsys):
    output = tmp_path / "steady.safetensors"
    model = "torchvision/squeezenet1_1"
    arguments = (model, "--num-classes", 2, "--size", 48, "--repair", "none", "--output", output)
    assert stabilize(*arguments) == 0
    assert 'load_stabilized(torchvision.models.get_model("squeezenet1_1")' in capsys.readouterr().out
    assert told(output)["arch"] == model and len(told(output)["plan"]) == 3


def test_mistakes_are_found_before_the_work(stock, photos, tmp_path, monkeypatch, fails):
    monkeypatch.setattr(
        "mixpool.timm_models.loading.load_model", lambda *_, **__: pytest.fail("loaded the model first")
    )
    (tmp_path / "old.safetensors").write_bytes(b"precious")
    (tmp_path / "old.json").write_text("precious")
    output = ("--output", tmp_path / "new.safetensors")
    for arguments, message in (
        ((), "--output"),
        (("--output", tmp_path / "x.pth"), "expected --output to be named *.safetensors"),
        (("--output", tmp_path / "nowhere/x.safetensors"), "existing folder"),
        (("--output", tmp_path / "old.safetensors"), "give --force"),
        (("--output", stock, "--checkpoint", stock, "--force"), "--output is the checkpoint itself"),
        ((*output, "--report", tmp_path / "report.txt"), "expected --report to be named *.json"),
        ((*output, "--report", tmp_path / "old.json"), "old.json exists; give --force"),
        ((*output, "--plot", tmp_path / "plot.gif"), "expected --plot to be named *.png or *.pdf or *.svg"),
        ((*output, "--checkpoint", tmp_path / "no.pth"), "no.pth does not exist"),
        ((*output, "--images", tmp_path / "none"), "none does not exist"),
        ((*output, "--pretrained", "--checkpoint", stock), "got both"),
        ((*output, "--fidelity", 1.5), "a number from 0 to 1, got '1.5'"),
        ((*output, "--stem", "cmod"), "invalid choice: 'cmod'"),
        ((*output, "--device", "gpu"), "cannot use the device 'gpu'"),
    ):
        assert message in fails("stabilize", NAME, *arguments)
    assert (tmp_path / "old.safetensors").read_bytes() == b"precious" and len(list(tmp_path.iterdir())) == 2


def test_a_failure_writes_nothing(stock, photos, tmp_path, fails):
    output = ("--output", tmp_path / "new.safetensors", "--report", tmp_path / "new.json")
    torch.save({**timm.create_model(NAME).state_dict(), "head.bias": torch.full((4,), torch.nan)}, tmp_path / "nan.pth")
    message = fails("stabilize", NAME, "--checkpoint", tmp_path / "nan.pth", "--device", "cpu", *output)
    assert "expected finite weights, head.bias has NaN" in message
    assert "does not fit" in fails("stabilize", NAME, "--checkpoint", stock, "--num-classes", 7, *output)
    assert [path.name for path in tmp_path.iterdir()] == ["nan.pth"]


def test_other_commands_refuse_what_is_stabilized_already(stock, tmp_path, capsys, fails):
    output = tmp_path / "steady.safetensors"
    assert stabilize(NAME, "--checkpoint", stock, "--repair", "none", "--output", output) == 0
    capsys.readouterr()
    refused = "steady.safetensors is a stabilized network; give the stock one"
    assert refused in fails("convert", NAME, "--checkpoint", output, "--output", tmp_path / "mixed.safetensors")
    assert refused in fails("inspect", NAME, "--checkpoint", output)


def test_a_share():
    assert (_share("0"), _share("0.5"), _share("1")) == (0, 0.5, 1)
    for text in ("-0.1", "1.01", "nan", "half", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="from 0 to 1"):
            _share(text)
