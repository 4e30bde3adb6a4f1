"""The command `mixpool inspect`: its report, its JSON and its picture, of stock and of converted models."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

import mixpool
from mixpool.cli import main

STOCK = "torchvision/squeezenet1_0"


def test_inspect_prints_the_report_of_convert(checkpoint, capsys, gabor_squeezenet):
    assert main(["inspect", "squeezenet1_0", "--checkpoint", str(checkpoint)]) == 0  # not a timm name
    out, err = capsys.readouterr()
    model = gabor_squeezenet()
    model.load_state_dict(load_file(checkpoint))
    assert out == f"{mixpool.convert(model)}\n" and err == ""


def test_inspect_json_with_images_and_plot(checkpoint, noise_photos, tmp_path, capsys):
    (noise_photos / "bad.jpg").write_bytes(b"not a photo")
    plot = tmp_path / "bank.png"
    arguments = ["inspect", STOCK, "--checkpoint", checkpoint, "--images", noise_photos, "--json", "--plot", plot]
    assert main([str(argument) for argument in arguments]) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert report["num_channels"] == 96 == len(report["channels"])
    assert report["num_complex"] == sum(channel["pooling"] == "modulus" for channel in report["channels"])
    assert report["poolings"] == Counter(channel["pooling"] for channel in report["channels"])
    assert report["agreement"]["num_images"] == 3 and 0 <= report["agreement"]["top1"] <= 1
    assert report["images"]["used"] == 3 and list(report["images"]["failed"]) == ["bad.jpg"]
    assert "warning: left out bad.jpg: UnidentifiedImageError" in err and "1 image(s) left out" in err
    measured = [c for c in report["channels"] if c["fidelity"] is not None]
    assert len(measured) >= 20 and all(-1 <= c["fidelity"] <= 1 for c in measured)
    assert all(c["fidelity"] is not None for c in report["channels"] if c["pooling"] == "modulus")
    stats = mixpool.analyze(load_file(checkpoint)["features.0.weight"], 2)
    for name in ("gap", "correlation_blur3", "instability_max"):
        expected = getattr(stats.predicted, name).flatten().tolist()
        assert [c[f"predicted_{name}"] for c in report["channels"]] == pytest.approx(expected, abs=1e-6)
    with Image.open(plot) as image:
        assert image.format == "PNG"


def test_inspect_shows_the_plan_that_a_converted_model_has(checkpoint, tmp_path, capsys, fails):
    output = tmp_path / "mixed.safetensors"
    options = ["--select", "0,4,10-12", "--pooling", "energy", "--rest", "blurpool"]
    main(["convert", STOCK, "--checkpoint", str(checkpoint), "--output", str(output), *options])
    capsys.readouterr()
    plot = tmp_path / "bank.png"
    assert main(["inspect", STOCK, "--checkpoint", str(output), "--plot", str(plot)]) == 0
    out = capsys.readouterr().out
    assert "features.0 -> features.1 -> features.2" in out and "no images given" not in out
    assert "5 of 96 channels pool by a modulus: 91 blurpool, 5 energy\n" in out and plot.stat().st_size > 5000
    assert main(["inspect", STOCK, "--checkpoint", str(output), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    swapped = [channel["channel"] for channel in report["channels"] if channel["pooling"] == "energy"]
    assert swapped == [0, 4, 10, 11, 12] and report["select"] is None and report["agreement"] is None
    assert {channel["reason"] for channel in report["channels"]} == {"as the model has it"}
    stats = mixpool.analyze(load_file(checkpoint)["features.0.weight"], 2)
    assert [c["bandwidth"] for c in report["channels"]] == pytest.approx(stats.bandwidth.tolist(), abs=1e-4)
    message = fails("inspect", STOCK, "--checkpoint", output, "--select", "all", "--rest", "blurpool")
    assert "converted already: its plan is shown as it is, without --select and --rest" in message


def test_inspect_of_registered_models_and_of_their_checkpoints(tmp_path, capsys):
    assert main(["inspect", "mixpool_resnet18"]) == 0
    out, err = capsys.readouterr()
    assert "conv1 -> bn1 -> act1 -> maxpool\n48 of 64 channels pool by a modulus" in out and "random weights" in err
    model = timm.create_model("mixpool_resnet18", num_classes=3, select="all", pooling="cmod")
    average = timm.create_model("mixpool_resnet18", num_classes=3, select="none", pooling="cmod")
    entries = {"state_dict": model.state_dict(), "state_dict_ema": average.state_dict()}
    # As a training leaves it: built with 3 classes, which need not be said again.
    torch.save(entries | {"arch": "mixpool_resnet18", "args": {"num_classes": 3}}, tmp_path / "last.pth.tar")
    assert main(["inspect", "mixpool_resnet18", "--checkpoint", str(tmp_path / "last.pth.tar")]) == 0
    out, err = capsys.readouterr()
    assert (
        "0 of 64 channels pool by a modulus" in out and err == "mixpool: note: took the moving average of the weights\n"
    )


@pytest.mark.slow
def test_squeezenet_on_real_photos(shared_data, capsys):
    weights = shared_data / "squeezenet" / "squeezenet1_0_imagenet.safetensors"
    folder = shared_data / "imagenet_sample" / "val"
    arguments = ["inspect", "squeezenet1_0", "--checkpoint", weights, "--images", folder, "--limit", "24", "--json"]
    assert main([str(argument) for argument in arguments]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["num_channels"] == 96 and 15 <= report["num_complex"] <= 60
    assert report["images"] == {"used": 24, "found": 500, "failed": {}}
    assert report["agreement"]["top1"] > 0.6
