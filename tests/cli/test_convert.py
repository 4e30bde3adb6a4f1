"""The command `mixpool convert`: what it writes, what it leaves alone."""

from __future__ import annotations

import pytest
import torch
import torchvision
from safetensors import safe_open
from safetensors.torch import load_file

import mixpool
from mixpool.cli import main

STOCK = "torchvision/squeezenet1_0"


@pytest.mark.parametrize("pooling, rest", [("energy", "blurpool"), ("cmod", "max")])
def test_convert_writes_what_a_converted_model_loads(pooling, rest, checkpoint, tmp_path, capsys, gabor_squeezenet):
    output = tmp_path / "mixed.safetensors"
    arguments = ["convert", STOCK, "--checkpoint", checkpoint, "--output", output, "--pooling", pooling, "--rest", rest]
    assert main([str(argument) for argument in arguments]) == 0
    assert str(output) in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [output]  # nothing half-written stays behind

    converted = gabor_squeezenet()
    converted.load_state_dict(load_file(checkpoint))
    report = mixpool.convert(converted, pooling=pooling, rest=rest)
    with safe_open(output, "pt") as file:
        metadata = file.metadata()
    assert metadata == {
        "model": STOCK,
        "pooling": pooling,
        "rest": rest,
        "select": "auto",
        "stem": "",
        "num_complex": str(report.num_complex),
        "mixpool_version": mixpool.__version__,
    }
    fresh = torchvision.models.squeezenet1_0().eval()  # other weights, so another plan of its own
    mixpool.convert(fresh)
    fresh.load_state_dict(load_file(output))
    images = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        assert torch.equal(fresh(images), converted(images))
    assert set(fresh.features[0].poolings) == {pooling, rest}


def test_convert_with_images_keeps_the_calibration(checkpoint, noise_photos, tmp_path, capsys):
    output = tmp_path / "mixed.safetensors"
    arguments = ["convert", STOCK, "--checkpoint", checkpoint, "--output", output, "--images", noise_photos]
    assert main([*map(str, arguments), "--select", "all"]) == 0
    state = load_file(output)
    assert "before any training, on the 3 images" in capsys.readouterr().out
    assert (state["features.0.calibration"][:, 0] != 1).any()


def test_convert_refuses_to_overwrite(checkpoint, tmp_path, capsys, fails):
    output = tmp_path / "mixed.safetensors"
    output.write_bytes(b"precious")
    arguments = ["convert", STOCK, "--select", "none", "--checkpoint", checkpoint, "--output", output]
    assert "--force" in fails(*arguments)
    assert output.read_bytes() == b"precious"
    assert main([str(argument) for argument in arguments] + ["--force"]) == 0
    assert "features.0.plan" in load_file(output)
    capsys.readouterr()

    before = checkpoint.read_bytes()
    assert "checkpoint itself" in fails(*arguments[:-1], checkpoint, "--force")
    assert checkpoint.read_bytes() == before
    again = ["convert", STOCK, "--checkpoint", output, "--output", tmp_path / "again.safetensors"]
    assert "mixed.safetensors is a converted model already" in fails(*again)
    assert not (tmp_path / "again.safetensors").exists()
    message = fails(*(part.replace(STOCK, "mixpool_resnet18") for part in map(str, [*again[:2], *again[4:]])))
    assert "mixpool_resnet18 is a converted model already" in message


def test_convert_checks_the_output_first(checkpoint, tmp_path, monkeypatch, fails):
    monkeypatch.setattr("mixpool.cli.convert.load_and_convert", lambda _: pytest.fail("loaded the model first"))
    for output, message in (("x.pth", "safetensors"), ("nowhere/x.safetensors", "existing folder")):
        assert message in fails("convert", STOCK, "--checkpoint", checkpoint, "--output", tmp_path / output)
