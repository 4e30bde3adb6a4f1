"""The command `mixpool evaluate` from its arguments to its files, the table and the figures."""

import argparse
import csv
import json
import math

import pytest
import timm
import tiny_models  # noqa: F401  the small network of these tests, in timm's registry
import torch
from PIL import Image
from safetensors.torch import save_file
from training_runs import options as options_of_run

from mixpool import convert, records
from mixpool.cli.evaluate import DESCRIPTION, EXAMPLES, add_options, run
from mixpool.conversion.checkpoint import read_checkpoint
from mixpool.evaluation.evaluate import evaluate
from mixpool.evaluation.model_input import ModelInput, find_model_input
from mixpool.filters.gabor import gabor_bank
from mixpool.stabilization.files import save_stabilized
from mixpool.stabilization.stabilize import stabilize
from mixpool.timm_models.loading import load_model
from mixpool.training.options import OPTIONS
from mixpool.training.train import train

NAME, ARCH = "tiny_stock", "resnet18"  # of those tests that need no more, and of those that need a mixpool_* model


def model_of():
    model = timm.create_model(NAME, num_classes=2).eval()
    model.conv.weight.data.copy_(gabor_bank(8, 3, 5))
    return model


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "stock.safetensors"
    save_file(model_of().state_dict(), path)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    generator = torch.Generator().manual_seed(0)
    for name in ("ant", "bee"):
        (folder / "val" / name).mkdir(parents=True)
        for number in range(3):
            noise = torch.randint(256, (12, 10, 3), dtype=torch.uint8, generator=generator).numpy()
            Image.fromarray(noise).resize((50, 60)).save(folder / "val" / name / f"{number}.png")
    return folder


def parse(*arguments):
    parser = argparse.ArgumentParser()
    add_options(parser)
    return parser.parse_args([str(argument) for argument in arguments])


COMMON = ("--num-classes", 2, "--size", 32, "--workers", 0, "--device", "cpu")


# --- the whole command ------------------------------------------------------------------------------------------------


def test_a_model_and_its_conversion_side_by_side(stock, data, tmp_path, capsys):
    protocols = ("accuracy", "flips", "kl", "stem")
    run(parse(f"{NAME}={stock}", "--data", data, "--output", tmp_path, "--convert", *COMMON, "--protocols", *protocols))
    out, err = capsys.readouterr()
    first, second = records.read(tmp_path / "evaluation.jsonl")
    assert [first["model"], second["model"]] == [f"{NAME}=stock.safetensors", f"{NAME}=stock.safetensors + mixpool"]
    assert (first["num_images"], first["settings"]["size"], first["converted"]) == (6, 32, False)
    assert second["converted"] and second["num_complex"] > 0 and second["difference_to"] == first["model"]
    assert first["checkpoint_sha256"] == second["checkpoint_sha256"] and len(first["checkpoint_sha256"]) == 64
    assert list(first["summary"]) == ["top1", "flip_probability", "kl", "stem_change"]
    moved = [record["summary"]["kl"]["diagonal"]["8"] for record in (first, second)]
    assert second["difference"]["ci95"]["stem_change"]["horizontal"]["1"][1] < 0
    assert second["difference"]["summary"]["kl"]["diagonal"]["8"] == pytest.approx(moved[1] - moved[0])
    for name in ("flip-probability", "kl", "stem-change"):
        assert (tmp_path / f"evaluation-{name}.png").stat().st_size > 5000
    assert "top-1 (%)" in out and "B - A" in out and f"A  {first['model']}\n" in out and "evaluation.jsonl" in out
    assert "channels pool by a modulus" in err and "6 images" in err
    direct = evaluate(load_model(NAME, stock, num_classes=2), _images(data), protocols=protocols[:2], workers=0,
                      model_input=ModelInput(32, 0.95, "bicubic"))  # fmt: skip
    assert direct.summary()["top1"] == first["summary"]["top1"]


def _images(data):
    from mixpool.evaluation.dataset import open_images

    return open_images(data)


def test_json_limit_and_images_left_out(stock, data, tmp_path, capsys):
    (data / "val/ant/broken.png").write_bytes(b"no picture")
    try:
        arguments = (
            NAME,
            "--checkpoint",
            stock,
            "--data",
            data,
            "--output",
            tmp_path,
            *COMMON,
            "--protocols",
            "circular",
        )
        with pytest.raises(ValueError, match=r"cannot use ant.broken.png .*--on-error skip"):
            run(parse(*arguments))
        run(parse(*arguments, "--on-error", "skip", "--json"))
    finally:
        (data / "val/ant/broken.png").unlink()
    out, err = capsys.readouterr()
    (record,) = json.loads(out)
    assert record["num_images"] == 6 and [entry["image"] for entry in record["failed"]] == ["ant/broken.png"]
    assert "warning: left out ant/broken.png: UnidentifiedImageError" in err and "1 image(s) left out" in err
    run(parse(*arguments, "--limit", 2))
    earlier, record = records.read(tmp_path / "evaluation.jsonl")
    assert (record["num_images"], record["num_found"], earlier["num_images"]) == (2, 6, 6)


def test_mistakes_are_found_before_the_work(stock, data, tmp_path):
    common = ("--output", tmp_path / "out", *COMMON)
    for arguments, message in (
        ((NAME,), "--data is missing: a folder of labelled images"),
        ((NAME, "--data", tmp_path / "nowhere"), "nowhere does not exist"),
        ((f"{NAME}={tmp_path}/no.pth", "--data", data), "no.pth does not exist"),
        ((NAME, NAME, "--data", data), "one of them twice"),
        ((NAME, "resnet34", "--checkpoint", stock, "--data", data), "write MODEL=FILE"),
        ((NAME, "--calibrate", data, "--data", data), "--calibrate needs --convert"),
        (("resnet81", "--data", data), "did you mean"),
        (("mixpool_nothing", "--data", data), "mixpool_nothing"),
        ((f"resnet34={stock}", "--data", data), "does not fit"),
        ((NAME, "--data", data, "--device", "gpu"), "cannot use the device 'gpu'"),
        ((NAME, "--data", data, "--device", "cuda:99"), "cannot use the device 'cuda:99'"),
        ((NAME, "--data", data, "--crop-ratio", 0), "expected a crop ratio above 0 and up to 2, got 0.0"),
        ((NAME, "--data", data, "--std", 1, 1, 0), "positive stds"),
        ((NAME, "--data", data, "--dataset", "nonsense"), "got 'nonsense'"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            run(parse(*common, *arguments))
    assert not (tmp_path / "out/evaluation.jsonl").exists()


def test_classes_that_do_not_fit(data, tmp_path):
    with pytest.raises(ValueError, match="0 to 1 and the model has 5 outputs.*--class-map"):
        run(parse(NAME, "--num-classes", 5, "--data", data, "--size", 32, "--workers", 0, "--output", tmp_path))


def test_options_speak_for_themselves():
    with pytest.raises(SystemExit):
        parse(NAME, "--protocols", "flipz")
    with pytest.raises(SystemExit):
        parse(NAME, "--limit", "-1")
    assert parse(NAME, "--no-channels-last").channels_last is False and parse(NAME).channels_last is None
    assert "mixpool evaluate" in EXAMPLES and "intervals" in DESCRIPTION


def test_earlier_results_stay(stock, data, tmp_path, capsys):
    arguments = (f"{NAME}={stock}", "--data", data, "--output", tmp_path, *COMMON, "--limit", 2, "--protocols")
    run(parse(*arguments, "flips"))
    (first,) = records.read(tmp_path / "evaluation.jsonl")
    figure = (tmp_path / "evaluation-flip-probability.png").read_bytes()
    before = (tmp_path / "evaluation.jsonl").read_bytes()
    # As a call leaves it that was killed while it wrote.
    (tmp_path / "evaluation.jsonl").write_bytes(before + b'{"kind": "evalu')
    run(parse(*arguments, "flips", "--convert", "--seed", 3))
    lines = (tmp_path / "evaluation.jsonl").read_text().splitlines()
    assert json.loads(lines[0]) == first and lines[1] == '{"kind": "evalu'
    second, third = map(json.loads, lines[2:])
    assert second["settings"]["seed"] == 3 and second["call"] == third["call"] != first["call"]
    assert (tmp_path / "evaluation-flip-probability.png").read_bytes() == figure
    assert (tmp_path / "evaluation-2-flip-probability.png").exists() and len(list(tmp_path.glob("*.png"))) == 2
    assert "evaluation.jsonl, the last 2" in capsys.readouterr().out
    with pytest.raises(ValueError, match="label|outputs"):
        run(parse(NAME, "--num-classes", 5, *arguments[1:5], "--size", 32, "--workers", 0, "--protocols", "accuracy"))
    assert (tmp_path / "evaluation.jsonl").read_text().splitlines() == lines


def test_the_records_of_converted_models_say_so(stock, data, tmp_path):
    model = model_of()
    convert(model, select="all")
    save_file(model.state_dict(), tmp_path / "mixed.safetensors")
    models = (f"{NAME}={stock}", f"{NAME}={tmp_path / 'mixed.safetensors'}", f"mixpool_{ARCH}")
    run(parse(*models, "--data", data, "--output", tmp_path, *COMMON, "--limit", 1, "--protocols", "circular"))
    found = [(record["converted"], record["num_complex"]) for record in records.read(tmp_path / "evaluation.jsonl")]
    assert found == [(False, 0), (True, 8), (True, 48)]


def test_a_stabilized_network_is_measured_as_such(stock, data, tmp_path, capsys):
    model = load_model(NAME, stock, num_classes=2)
    stabilize(model, torch.randn(16, 3, 40, 40), size=32, depth="all")
    path = tmp_path / "steady.safetensors"
    save_stabilized(model, path, arch="resnet99")
    models = (f"{NAME}={stock}", f"{NAME}={path}")
    run(parse(*models, "--data", data, "--output", tmp_path, *COMMON, "--protocols", "kl"))
    err = capsys.readouterr().err
    assert f"{NAME}=steady.safetensors: stabilized, 1 layers with a low-pass" in err
    assert "the checkpoint is of resnet99" in err
    first, second = records.read(tmp_path / "evaluation.jsonl")
    assert (first["num_low_passed"], second["num_low_passed"], second["converted"]) == (0, 1, False)
    direct = evaluate(model, _images(data), protocols=("kl",), workers=0, model_input=find_model_input(model))
    moved = direct.summary()["kl"]["diagonal"]["1"]
    assert second["summary"]["kl"]["diagonal"]["1"] == moved != first["summary"]["kl"]["diagonal"]["1"]
    with pytest.raises(ValueError, match="--convert is for stock models, and .*steady.safetensors is a stabilized one"):
        run(parse(models[1], "--data", data, "--output", tmp_path, *COMMON, "--convert"))


# --- checkpoints of a training ----------------------------------------------------------------------------------------


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


def test_the_moving_average_is_taken_and_told(data, tmp_path, capsys):
    model, average = model_of(), model_of()
    path = training_checkpoint(tmp_path / "last.pth.tar", model, average, num_classes=2)
    assert same_outputs(load_model(NAME, path), average) and not same_outputs(load_model(NAME, path), model)
    assert same_outputs(load_model(NAME, read_checkpoint(path, use_ema=False)), model)
    # As timm takes it.
    assert same_outputs(timm.create_model(NAME, num_classes=2, checkpoint_path=path), load_model(NAME, path))
    assert torch.equal(read_checkpoint(path).state["head.weight"], average.head.weight)

    arguments = (f"{NAME}={path}", "--data", data, "--output", tmp_path, *COMMON, "--protocols", "circular")
    run(parse(*arguments))
    assert "took the moving average of the weights (--no-ema" in capsys.readouterr().err
    run(parse(*arguments, "--no-ema"))
    assert "took the weights, not their moving average" in capsys.readouterr().err
    assert [record["moving_average"] for record in records.read(tmp_path / "evaluation.jsonl")] == [True, False]


@pytest.mark.parametrize("kind", [dict, argparse.Namespace])
def test_images_are_as_in_the_training(kind, data, tmp_path, capsys):
    settings = {"img_size": 32, "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7], "crop_pct": 1.0}
    path = training_checkpoint(
        tmp_path / "last.pth.tar", model_of(), num_classes=2, interpolation="bilinear", **settings
    )
    if kind is argparse.Namespace:  # as timm's script writes them
        state = torch.load(path)
        torch.save({**state, "args": argparse.Namespace(**state["args"])}, path)
    arguments = (f"{NAME}={path}", "--data", data, "--output", tmp_path, "--workers", 0, "--protocols", "accuracy")
    run(parse(*arguments))
    assert "images as in its training: 32 px, crop ratio 1, bilinear, mean 0.1 0.2 0.3" in capsys.readouterr().err
    run(parse(*arguments, "--size", 40, "--mean", 0, 0, 0, "--std", 1, 1, 1, "--interpolation", "bicubic"))
    first, second = (record["settings"] for record in records.read(tmp_path / "evaluation.jsonl"))
    assert (first["size"], first["crop_ratio"], first["interpolation"]) == (32, 1.0, "bilinear")
    assert (first["mean"], first["std"]) == ([0.1, 0.2, 0.3], [0.5, 0.6, 0.7])
    assert (second["size"], second["interpolation"], second["mean"], second["std"]) == (40, "bicubic", [0] * 3, [1] * 3)
    assert second["crop_ratio"] == 1.0


def test_a_run_is_evaluated_as_it_validated(photos, tmp_path):
    """The accuracy that `mixpool train` had of its own validation, of the weights and of their moving average."""
    settings = {"mean": (0.1, 0.2, 0.3), "std": (0.9, 0.5, 0.2), "crop_pct": 0.7, "img_size": 48, "lr": 0.3}
    settings |= {"model_ema": True, "model_ema_decay": 0.9, "epochs": 5, "model": "tiny_norm", "bn_eps": 0.01}
    train(options_of_run(photos, tmp_path, **settings))
    (last,) = list(csv.DictReader((tmp_path / "run/summary.csv").open()))[-1:]
    path = tmp_path / "run/last.pth.tar"
    common = (f"tiny_norm={path}", "--data", photos, "--output", tmp_path, "--workers", 0, "--protocols", "accuracy")
    run(parse(*common))
    run(parse(*common, "--no-ema"))
    run(parse(*common, "--mean", 0, 0, 0, "--std", 1, 1, 1))
    found = [record["summary"]["top1"] for record in records.read(tmp_path / "evaluation.jsonl")]
    assert found[:2] == pytest.approx([float(last["ema_top1"]), float(last["val_top1"])])
    assert found[0] != found[1] and found[2] != found[0], "the test can fail"


def test_a_network_is_built_as_it_was_trained(data, tmp_path, capsys):
    """The layers of aa_layer have no parameters: the state alone fits the plain network too."""
    torch.manual_seed(2)
    options = {"num_classes": 2, "aa_layer": "blur", "pooling": "cmod", "zero_init_last": False}
    source = timm.create_model(f"mixpool_{ARCH}", **options).eval()
    kwargs = {name: value for name, value in options.items() if name != "num_classes"}
    arch = f"mixpool_{ARCH}"
    path = training_checkpoint(tmp_path / "last.pth.tar", source, arch=arch, num_classes=2, model_kwargs=kwargs)
    for name in (arch, ARCH):
        assert same_outputs(load_model(name, path), source)
    plain = timm.create_model(arch, num_classes=2, checkpoint_path=path)
    assert not same_outputs(plain, source), "the test can fail"

    other = training_checkpoint(tmp_path / "other.pth.tar", model_of(), arch="resnet99", num_classes=3, gp="max")
    models = (f"{ARCH}={path}", f"{NAME}={other}")
    run(parse(*models, "--data", data, "--output", tmp_path, *COMMON, "--protocols", "circular", "--limit", 1))
    err = capsys.readouterr().err
    assert f"built as in its training: {arch} with aa_layer=blur, pooling=cmod" in err
    assert f"warning: {NAME}=other.pth.tar: the checkpoint is of resnet99" in err
    first, second = records.read(tmp_path / "evaluation.jsonl")
    assert (first["trained_as"], second["trained_as"]) == (arch, "resnet99")


# --- torchvision's weights --------------------------------------------------------------------------------------------


def test_torchvisions_weights_say_their_images(data, tmp_path, monkeypatch, capsys):
    from torchvision import models

    def build(name, weights, **options):
        assert weights is models.ResNet50_Weights.IMAGENET1K_V2
        return models.resnet50(num_classes=2)

    monkeypatch.setattr(models, "get_model", build)
    wanted = find_model_input(load_model("torchvision/resnet50", pretrained=True))
    assert wanted.size == 224 and math.floor(224 / wanted.crop_ratio) == 232 and wanted.interpolation == "bilinear"
    monkeypatch.undo()
    arguments = ("torchvision/resnet18", "--num-classes", 2, "--data", data, "--output", tmp_path, "--limit", 1)
    run(parse(*arguments, "--workers", 0, "--protocols", "accuracy"))
    assert "does not say how its images have to be; taken: 224 px, crop ratio 0.875" in capsys.readouterr().err
