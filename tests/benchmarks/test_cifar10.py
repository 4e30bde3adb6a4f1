"""The CIFAR-10 queue: its networks are what their names say, and a row is trained, evaluated and recorded once."""

from __future__ import annotations

import json

import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from support import assert_close

from benchmarks.cifar10 import run as cifar10
from benchmarks.cifar10 import straight as cifar10_straight
from benchmarks.cifar10 import tables as tables_cifar10
from benchmarks.cifar10.tables import outcome
from benchmarks.cifar10.variants import GONE, RECIPES, TABLES, Row, rows
from mixpool import analytic_partner, records
from mixpool.conversion.stock import converted_stems
from mixpool.evaluation.dataset import open_images
from mixpool.evaluation.evaluate import evaluate
from mixpool.evaluation.model_input import find_model_input
from mixpool.stem.module import MixPoolStem

cifar10.register_networks()


def built(variant: str, recipe: str = "half") -> torch.nn.Module:
    definition = Row(variant, recipe, 0).definition()
    return timm.create_model(definition["model"], num_classes=10, **definition["model_kwargs"])


def stem_of(model: torch.nn.Module) -> MixPoolStem:
    (stem,) = converted_stems(model).values()
    return stem


@pytest.mark.parametrize(
    ("variant", "num_complex", "pooling", "rest"),
    [
        ("blurpool", 0, "", "blurpool"),
        ("cmod", 24, "cmod", "max"),
        ("mixpool", 48, "modulus", "blurpool"),
        ("no_max_blur_aa", 48, "modulus", "max"),
        ("wavelet_24_no_max_blur", 24, "modulus", "max"),
        ("stock_aa", 0, "", "max"),
        ("random", 48, "modulus", "blurpool"),
        ("blur_1", 48, "cmod", "blurpool"),
        ("wavelet_blurpool", 0, "", "blurpool"),
    ],
)
def test_a_variant_is_what_its_name_says(variant, num_complex, pooling, rest):
    model = built(variant)
    stem = stem_of(model)
    assert stem.poolings == (rest,) * (64 - num_complex) + (pooling,) * num_complex
    later = model.layer2[0].aa
    assert isinstance(later, timm.layers.BlurPool2d) == variant.endswith("_aa")


def test_the_stock_network_is_timms():
    assert not converted_stems(built("stock"))
    assert not converted_stems(built("stock", "alexnet"))


def test_all_rows_have_networks_and_names_of_their_own():
    queue = [row for table in TABLES for row in rows(table, [0, 1])]
    assert len({row.name for row in queue}) == len(queue) == len({json.dumps(row.definition()) for row in queue})
    assert [row.seed for row in rows("main", [3, 5])] == [3] * 4 + [5] * 4
    queued = {row.variant for row in queue}
    assert set(GONE) <= {name for _, variants in TABLES.values() for name in variants} and not queued & set(GONE)


def test_the_queue_knows_what_version_0_1_recorded():
    """The definitions of its records have `blur` and `max_blur`; no row of theirs is trained again."""
    found = [r for r in records.read(cifar10.RECORD) if r["variant"] not in GONE]
    words = {name for r in found for name in r["definition"]["model_kwargs"]}
    assert {"blur", "max_blur"} <= words and len(found) > 40
    for record in found:
        row = Row(record["variant"], record["recipe"], record["seed"])
        assert cifar10.has_record(row), row
    assert not cifar10.has_record(Row("mixpool", "half", 99))


@pytest.mark.parametrize(("recipe", "name"), [("half", "mixpool_resnet18"), ("alexnet", "mixpool_small_alexnet")])
def test_the_default_is_spelt_out(recipe, name):
    spelt, plain = built("mixpool", recipe), timm.create_model(name, num_classes=10)
    assert stem_of(spelt).poolings == stem_of(plain).poolings


def test_the_dense_stem_hardly_aliases():
    model = built("dense_aa").eval()
    assert isinstance(model.layer2[0].aa, timm.layers.BlurPool2d)
    constant = torch.ones(1, 64, 16, 24)
    assert_close("mean", model.maxpool(constant), torch.ones(1, 64, 4, 6))
    wave = torch.cos(torch.pi / 2 * torch.arange(64.0)).expand(1, 1, 64, 64)  # folds onto frequency 0 at a step of 4
    assert model.maxpool[1](wave)[..., 2:-2, 2:-2].abs().max() < 0.02
    plain = built("stock").maxpool
    x = torch.randn(1, 64, 32, 32)
    assert plain(x).shape[-1] == 16 and model.maxpool(x).shape[-1] == 8


def test_the_wide_blur_is_a_binomial_mean_of_5():
    model = built("wide_blur").eval()
    stem = stem_of(model)
    assert stem.poolings == ("blurpool",) * 16 + ("modulus",) * 48
    x = torch.randn(1, 3, 64, 64)
    taps = torch.tensor([1.0, 4, 6, 4, 1])
    with torch.no_grad():
        out = model.maxpool(stem(x))
        imag = analytic_partner(stem.weight)
        z = torch.complex(*(F.conv2d(x, w[-48:], stride=2, padding=3) for w in (stem.weight, imag)))
    kernel = (taps.outer(taps) / 256).expand(48, 1, 5, 5)
    wanted = F.conv2d(z.abs(), kernel, stride=2, groups=48)
    assert out.shape == (1, 64, 16, 16)
    # a fresh norm layer's scale, and the border's first values, which are means of fewer
    assert_close("inner values", out[:, 16:, 1:-1, 1:-1] * (1 + stem.bn.eps) ** 0.5, wanted[..., :14, :14])


def test_the_outcome_counts_what_is_better():
    def record(top1: float, *flips: float) -> dict:
        ways = ("horizontal", "vertical", "diagonal")
        curves = {way: {"1": flip, "2": 2 * flip} for way, flip in zip(ways, flips, strict=True)}
        return {"summary": {"top1": top1, "flip_probability": curves}}

    theirs = [record(70.0, 10.0, 10.0, 10.0), record(72.0, 10.0, 10.0, 10.0)]
    found = outcome([record(71.5, 5.0, 12.0, 10.0)], theirs)
    assert found.startswith("top-1 +0.50, flips at 1 px -50 %, +20 %, +0 % (h, v, d), fewer flips in 2 of the 6 ")
    assert found.endswith("(1 to 2 px)")


@pytest.fixture
def queue_folder(tmp_path, monkeypatch):
    """A folder of ten tiny pictures, a recipe of one epoch, and records of its own."""
    for split in ("train", "test"):
        for label in range(10):
            place = tmp_path / "data" / "cifar10" / split / f"class{label}"
            place.mkdir(parents=True)
            Image.new("RGB", (32, 32), (25 * label, 200, 100)).save(place / "0.jpg")
    changed = {"epochs": 1, "warmup_epochs": 0, "batch_size": 5, "amp": False}
    recipe = RECIPES["half"]
    monkeypatch.setitem(RECIPES, "half", recipe._replace(options=recipe.options | changed))
    monkeypatch.setattr(cifar10, "RECORD", tmp_path / "records.jsonl")
    monkeypatch.setattr(cifar10, "KL_IMAGES", 4)
    return tmp_path


def test_a_row_is_recorded_once(queue_folder, monkeypatch, capsys):
    row = Row("mixpool_aa", "half", 7)
    assert not cifar10.has_record(row)
    monkeypatch.setattr("sys.argv", ["cifar10", "--output", str(queue_folder), "--one", *map(str, row)])
    cifar10.main()
    (line,) = (queue_folder / "records.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert record["kind"] == "eval" and record["dataset"] == "cifar10_jpeg"
    assert (record["variant"], record["seed"], record["epochs"]) == ("mixpool_aa", 7, 1)
    assert record["num_images"] == 10 and record["kl_images"] == 4
    low, high = record["kl_ci95"]["horizontal"]["1"]
    assert low <= record["kl"]["horizontal"]["1"] <= high
    assert set(record["flip"]) == {f"{way}{k}" for way in "hvd" for k in (1, 2, 3, 4)}
    assert record["flip"]["h1"] == record["summary"]["flip_probability"]["horizontal"]["1"]
    assert cifar10.has_record(row)
    assert not cifar10.has_record(row._replace(seed=8))
    with monkeypatch.context() as patch:  # the folder of that name holds a run of something else
        patch.setitem(RECIPES, "half", RECIPES["half"]._replace(options=RECIPES["half"].options | {"lr": 0.5}))
        with pytest.raises(ValueError, match="expected a run of"):
            cifar10.run(row, queue_folder)
    monkeypatch.setattr("sys.argv", ["cifar10", "batch_128", "--seeds", "7", "--output", str(queue_folder)])
    queued = []
    monkeypatch.setattr(cifar10, "run_each", lambda module, rows, *_: queued.extend(rows))
    monkeypatch.setitem(TABLES, "batch_128", ("half", ("mixpool_aa", "stock")))
    cifar10.main()
    assert queued == [Row("stock", "half", 7)] and "1 of 2 runs" in capsys.readouterr().out


# --- what is left where the stem goes straight -----------------------------------------------------------------------


def test_straightened_maps_go_straight_between_multiples_of_the_step():
    maps = [torch.full((2, 3, 1, 1), float(value)) for value in [0, *(k * k for k in range(1, 9))] + [0, 5] * 8]
    along = [m[0, 0].item() for m in cifar10_straight.straightened(maps, step=4)]
    assert along[:9] == [0, 4, 8, 12, 16, 28, 40, 52, 64]  # the squares at 0, 4 and 8, and straight lines between
    kept = cifar10_straight.straightened(maps, step=4, channels=torch.tensor([1]))[2]
    assert kept.shape == (2, 3, 1, 1) and kept[0, :, 0, 0].tolist() == [4, 8, 4]
    assert maps[2].eq(4).all()  # the maps that came in are as they were


def test_real_maps_have_the_flips_of_the_protocol_and_straight_ones_the_same_ends(queue_folder):
    images = open_images(queue_folder / "data" / "cifar10", split="test")
    network = built("mixpool").eval()
    wanted = find_model_input(network, {"img_size": 32})
    found = cifar10_straight.flips(network, wanted, images)
    assert set(found) == {"real", "straight", "max_straight", "modulus_straight"}
    assert found["real"].shape == (10, 3, 8)
    truth = evaluate(network, images, protocols=("flips",), model_input=wanted).values["flip_probability"]
    assert torch.equal(found["real"], truth)
    for values in found.values():  # 8 pixels apart there is one pair, both of whose maps stay
        assert torch.equal(values[..., 7], truth[..., 7])
    assert set(cifar10_straight.flips(built("stock").eval(), wanted, images)) == {"real", "straight"}


@pytest.mark.slow
def test_a_run_with_straightened_maps_is_recorded_once(queue_folder, monkeypatch, capsys):
    monkeypatch.setattr(cifar10_straight, "RECORD", queue_folder / "straight.jsonl")
    row = Row("mixpool", "half", 7)
    cifar10.run(row, queue_folder)
    capsys.readouterr()
    monkeypatch.setattr("sys.argv", ["cifar10_straight", "--output", str(queue_folder)])
    cifar10_straight.main()
    cifar10_straight.main()
    out = capsys.readouterr().out
    assert out.count("half-mixpool-7: recorded") == out.count("half-mixpool-7: has a record") == 1
    (line,) = (queue_folder / "straight.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert (record["variant"], record["num_images"]) == ("mixpool", 10)
    assert set(record["flips"]["straight"]) == {f"{way}{k}" for way in "hvd" for k in (1, 2, 4)}
    low, mean, high = (record["difference"]["straight"]["h1"][end] for end in ("low", "mean", "high"))
    assert low <= mean <= high
    assert mean == pytest.approx(record["flips"]["straight"]["h1"]["mean"] - record["flips"]["real"]["h1"]["mean"])
    for name in ("alexnet-stock-0", "another"):  # finished, but no ResNet of the queue
        (queue_folder / name).mkdir()
        (queue_folder / name / cifar10.TRAINING_RECORD).write_text("")
    for name in ("half-stock-7", "alexnet-stock-0", "another"):
        monkeypatch.setattr("sys.argv", ["cifar10_straight", name, "--output", str(queue_folder)])
        with pytest.raises(SystemExit, match="2"):
            cifar10_straight.main()
        assert f"(half-mixpool-7), got {name}" in capsys.readouterr().err


def test_the_table_of_straight_maps_shows_values_changes_and_intervals(monkeypatch, tmp_path):
    monkeypatch.setattr(tables_cifar10, "RECORDS", tmp_path)
    assert tables_cifar10.cifar10_straight() == tables_cifar10.NOT_RUN
    before, after, change = (
        {"low": low, "mean": mean, "high": high} for low, mean, high in ((1, 2, 3), (0, 1.5, 2), (-0.75, -0.5, 0.25))
    )
    names = ("h1", "v1", "d1", "h2")
    record = records.stamp("straight", variant="stock", recipe="half", seed=3, num_images=10)
    record["flips"] = {"real": dict.fromkeys(names, before), "straight": dict.fromkeys(names, after)}
    record["difference"] = {"straight": dict.fromkeys(names, change)}
    found = [record]
    monkeypatch.setattr(tables_cifar10, "read", lambda name: found)
    (tmp_path / "cifar10_straight.jsonl").touch()
    lines = tables_cifar10.cifar10_straight().splitlines()
    assert lines[2] == "| stock | half | 3 | nothing |" + " 2.00 |" * 4
    assert lines[3] == "|  |  |  | the stem |" + " 1.50 (-0.50, -0.75 to +0.25) |" * 4
    assert len(lines) == 6 and lines[5].startswith("10 test images")


def test_kl_is_shown_with_the_seeds_range_or_the_images_interval_or_neither():
    def run(value: float, **more) -> dict:
        return {"kl": {"horizontal": {"1": value}}, **more}

    ends = {"kl_ci95": {"horizontal": {"1": [0.01, 0.04]}}}
    assert tables_cifar10._kl_spread([run(0.02), run(0.03, **ends)]) == "2.50 (2.00 to 3.00)"
    assert tables_cifar10._kl_spread([run(0.02, **ends)]) == "2.00 (1.00 to 4.00)"
    assert tables_cifar10._kl_spread([run(0.02)]) == "2.00"
