"""The command `mixpool evaluate` from its arguments to its files, the table and the figures."""

import argparse
import json

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from mixpool import convert, records
from mixpool.convert import revert
from mixpool.evaluate import evaluate
from mixpool.evaluate_command import DESCRIPTION, EXAMPLES, add_options, load_model, run
from mixpool.evaluation.plots import TITLES, plot_curves, write_figures
from mixpool.evaluation.protocols import PROTOCOLS, ModelInput
from mixpool.evaluation.table import table_rows, table_text
from mixpool.gabor import gabor_bank
from mixpool.layers import MixPoolStem

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
    assert [first["model"], second["model"]] == ["resnet18=stock.safetensors", "resnet18=stock.safetensors + mixpool"]
    assert (first["num_images"], first["settings"]["size"], first["converted"]) == (6, 32, False)
    assert second["converted"] and second["num_modulus"] > 0 and second["difference_to"] == first["model"]
    assert first["checkpoint_sha256"] == second["checkpoint_sha256"] and len(first["checkpoint_sha256"]) == 64
    assert list(first["summary"]) == ["top1", "flip_probability", "kl", "stem_change"]
    moved = [record["summary"]["kl"]["diagonal"]["8"] for record in (first, second)]
    assert second["difference"]["ci95"]["stem_change"]["horizontal"]["1"][1] < 0
    assert second["difference"]["summary"]["kl"]["diagonal"]["8"] == pytest.approx(moved[1] - moved[0])
    for name in ("flip-probability", "kl", "stem-change"):
        assert (tmp_path / f"evaluation-{name}.png").stat().st_size > 5000
    assert "top-1 (%)" in out and "B - A" in out and f"A  {first['model']}\n" in out and "evaluation.jsonl" in out
    assert "channels on modulus pooling" in err and "6 images" in err
    direct = evaluate(load_model(NAME, stock, num_classes=2), _images(data), protocols=protocols[:2], workers=0,
                      model_input=ModelInput(32, 0.95, "bicubic"))  # fmt: skip
    assert direct.summary()["top1"] == first["summary"]["top1"]


def _images(data):
    from mixpool.labelled_images import open_images

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
    (record,) = records.read(tmp_path / "evaluation.jsonl")
    assert (record["num_images"], record["num_found"]) == (2, 6)


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
    ):
        with pytest.raises((ValueError, OSError), match=message):
            run(parse(*arguments, *common))
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


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("imag", ["tied", "free"])
@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_a_converted_checkpoint_gives_the_converted_model(tmp_path, imag, suffix):
    model = model_of()
    convert(model, imag=imag, blur=1)
    path = tmp_path / f"mixed.{suffix}"
    save_file(model.state_dict(), path) if suffix == "safetensors" else torch.save(model.state_dict(), path)
    loaded = load_model(NAME, path, num_classes=2)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))
    assert isinstance(loaded.conv1, MixPoolStem) and loaded.conv1.num_modulus > 0 and not loaded.training
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
    assert loaded.conv1.num_modulus == model.conv1.num_modulus > 0
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), model(x))


def test_a_converted_checkpoint_of_another_model(tmp_path):
    model = model_of()
    convert(model)
    save_file(model.state_dict(), tmp_path / "mixed.safetensors")
    with pytest.raises(ValueError, match="mixed.safetensors does not fit resnet34"):
        load_model("resnet34", tmp_path / "mixed.safetensors", num_classes=2)


# --- table and figures ------------------------------------------------------------------------------------------------


def record_of(model, value, **fields):
    path = {"horizontal": {}, "vertical": {}, "diagonal": {}}
    steps = [str(k) for k in range(1, 9)]
    return {
        "model": model,
        "num_images": 10,
        "summary": {"top1": value, "flip_probability": {d: {k: value / int(k) for k in steps} for d in path}},
        "ci95": {
            "top1": [value - 1, value + 1],
            "flip_probability": {d: {k: [value - 2, value + 2] for k in steps} for d in path},
        },
        **fields,
    }


def test_the_table():
    difference = record_of("", 0.5)
    difference["ci95"]["top1"] = [0.25, 0.75]
    found = [record_of("a", 50.0), record_of("b", 50.5, difference_to="a", difference=difference)]
    rows = {row[0]: row[1:] for row in table_rows(found)}
    assert rows[""] == ["A", "B", "B - A"]
    assert rows["top-1 (%)"] == ["50.00 (49.00 to 51.00)", "50.50 (49.50 to 51.50)", "+0.50 (+0.25 to +0.75)*"]
    assert rows["flips, horizontal 2 px (%)"][2] == "+0.25 (-1.50 to +2.50)"
    assert len(rows) == 1 + 1 + 5
    lines = table_text(found).splitlines()
    assert lines[:3] == ["A  a", "B  b", ""] and len(lines) == 3 + 7
    assert len({len(line) for line in lines[3:]}) == 1


def test_the_table_of_models_that_were_measured_differently():
    other = record_of("b", 1.0)
    del other["summary"]["top1"], other["ci95"]["top1"]
    assert table_rows([record_of("a", 2.0), other])[1] == ["top-1 (%)", "2.00 (1.00 to 3.00)", "-"]


def test_figures(tmp_path):
    found = [record_of(f"model {number}", 40.0 - 3 * number) for number in range(7)]
    figure = plot_curves(found, "flip_probability")
    panels = [axes for axes in figure.axes if axes.lines]
    assert [len(axes.lines) for axes in panels] == [7, 7, 7]
    assert panels[0].lines[2].get_ydata().tolist() == pytest.approx([34 / k for k in range(1, 9)])
    styles = {(line.get_color(), line.get_linestyle()) for line in panels[0].lines}
    assert len(styles) == 7
    (path,) = write_figures(found, tmp_path)
    assert path.name == "evaluation-flip-probability.png" and Image.open(path).size[0] > 1000
    with pytest.raises(ValueError, match="found none of 'kl'"):
        plot_curves(found, "kl")


def test_every_curve_has_a_title_and_every_number_a_row(tmp_path):
    from mixpool.evaluation.result import METRICS

    assert set(TITLES) == {name for name, metric in METRICS.items() if metric.axes}
    images = [(Image.new("RGB", (40, 40), (9 * i, 99, 3)), 0) for i in range(3)]
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    result = evaluate(net, images, protocols=[*PROTOCOLS, "stem"], model_input=ModelInput(32), workers=0)
    assert result.summary().keys() == METRICS.keys()
    assert len(table_rows([result.as_record(model="net")])) > len(METRICS)
    assert len(write_figures([result.as_record(model="net")], tmp_path)) == len(TITLES)
