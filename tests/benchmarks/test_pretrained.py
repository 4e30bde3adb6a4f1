"""The measurement of converted classifiers on a tiny one: stems, stages, the queue, the table; a network from ONNX.

Legend: N images, (H, W) their size.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from support import assert_close, assert_same_bits
from torch import nn

import benchmarks.pretrained.run as benchmark
from benchmarks.kit import markdown, queue
from benchmarks.pretrained import open_nsfw
from benchmarks.pretrained import tables as tables_pretrained
from benchmarks.pretrained.run import CALIBRATED, DISTILLED, VARIANTS, ZERO_SHOT, Network, Row
from mixpool import analyze, convert, records
from mixpool.conversion.stock import converted_stems
from mixpool.evaluation.result import Evaluation, difference_record
from mixpool.filters.gabor import gabor_bank

STOCK, MIXED = Row("squeezenet", "stock", 0), Row("squeezenet", "mixpool", 0)


def tiny_trained(pretrained: bool = False, **_) -> nn.Module:
    """conv 7x7/2 of Gabor filters and two means, ReLU, max pool, linear: 4 classes of 32 x 32 pixels."""
    generator = torch.Generator().manual_seed(3)
    model = nn.Sequential()
    model.add_module("conv", nn.Conv2d(3, 18, 7, 2, 3))
    model.add_module("relu", nn.ReLU())
    model.add_module("pool", nn.MaxPool2d(3, 2, 1))
    model.add_module("mean", nn.AdaptiveAvgPool2d(1))
    model.add_module("flat", nn.Flatten())
    model.add_module("head", nn.Linear(18, 4))
    with torch.no_grad():
        means = torch.rand(2, 3, 7, 7, generator=generator) / 147
        model.conv.weight.copy_(torch.cat([gabor_bank(16, 3, 7), means]))
        model.conv.bias.copy_(torch.randn(18, generator=generator) / 10)
        model.head.weight.copy_(torch.randn(4, 18, generator=generator))
        model.head.bias.zero_()
    model.num_classes = 4
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    model.pretrained_cfg = {"num_classes": 4, "input_size": (3, 32, 32), "crop_pct": 1.0, "mean": mean, "std": std}
    return model


def _register() -> None:
    if not timm.is_model("tiny_trained"):
        timm.models.register_model(tiny_trained)


@pytest.fixture
def tiny(monkeypatch, photos, tmp_path):
    """The benchmark on the tiny network, 24 and 9 photos, and a training that changes nothing."""
    class_map = tmp_path / "classes.txt"
    class_map.write_text("cat\ndog\nfrog\nship")
    _register()
    network = Network("tiny_trained", "benchmarks.pretrained.open_nsfw", is_labelled=True)
    changes = {"batch_size": 8, "workers": 0, "epochs": 1, "warmup_epochs": 0, "lr": 0.0, "val_interval": 1}
    monkeypatch.setattr(benchmark, "NETWORKS", {"squeezenet": network})
    monkeypatch.setattr(benchmark, "RECIPE", benchmark.RECIPE | changes)
    monkeypatch.setattr(benchmark, "RECORD", tmp_path / "records" / "pretrained.jsonl")
    monkeypatch.setattr(benchmark, "CALIBRATION", 16)
    monkeypatch.setattr(benchmark, "KL_IMAGES", 4)
    monkeypatch.setattr(benchmark, "data_of", lambda row, output: (photos, class_map))
    (tmp_path / "records").mkdir()
    return network


# --- stems ------------------------------------------------------------------------------------------------------------


def test_the_channels_of_each_stem(tiny):
    stems = {name: converted_stems(benchmark.converted(tiny, name)).get("conv") for name in VARIANTS}
    assert stems["stock"] is None and set(stems["blurpool"].poolings) == {"blurpool"}
    poolings = {name: stem.poolings for name, stem in stems.items() if stem is not None}
    is_swapped = [name == "modulus" for name in poolings["mixpool"]]
    assert 0 < sum(is_swapped) < 16 and set(poolings["mixpool"]) == {"max", "modulus"}
    assert poolings["cmod"] == tuple("cmod" if swapped else "max" for swapped in is_swapped)
    assert poolings["mixpool_rest_blurpool"] == tuple("modulus" if swapped else "blurpool" for swapped in is_swapped)
    band_pass = (analyze(tiny.build().conv).dc_share < 0.05).tolist()
    assert poolings["cmod_band_pass"] == tuple("cmod" if chosen else "max" for chosen in band_pass)
    assert sum(band_pass) > sum(is_swapped)


def test_without_images_channels_are_calibrated_as_convert_does_it(tiny):
    ours, by_convert = benchmark.converted(tiny, "cmod"), tiny.build()
    convert(by_convert, pooling="cmod")
    x = torch.randn(2, 3, 32, 32)
    assert_same_bits("logits", ours(x), by_convert(x))
    uncalibrated = tiny.build()
    convert(uncalibrated, select=ours.conv.poolings)
    assert not torch.equal(ours(x), uncalibrated(x))


# --- stages -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_distillation_starts_from_the_calibrated_network(tiny, tmp_path, variant):
    row, x = Row("squeezenet", variant, 0), torch.randn(2, 3, 32, 32)
    start, _ = benchmark.network_at(row, CALIBRATED if CALIBRATED in row.stages else ZERO_SHOT, tmp_path)
    end, trained = benchmark.network_at(row, DISTILLED, tmp_path)
    assert trained["epochs"] == 1 and not end.training
    assert_same_bits("logits", end(x), start(x))
    first, last = (converted_stems(model).get("conv") for model in (start, end))
    if variant != "stock":
        assert first.poolings == last.poolings
    if CALIBRATED in row.stages:
        assert not torch.equal(benchmark.network_at(row, ZERO_SHOT, tmp_path)[0](x), start(x))


def test_a_run_needs_that_of_the_stock_network(tiny, tmp_path):
    with pytest.raises(FileNotFoundError, match="squeezenet-stock-0"):
        benchmark.run(MIXED, tmp_path)


@pytest.mark.slow
def test_runs_and_their_table(tiny, tmp_path, monkeypatch):
    # By the decay of the weights the stock network changes, too, which has nothing to learn from itself.
    monkeypatch.setattr(benchmark, "RECIPE", benchmark.RECIPE | {"lr": 0.05, "weight_decay": 0.5})
    stock = benchmark.run(STOCK, tmp_path)
    records.append(benchmark.RECORD, stock)
    assert benchmark.is_done(STOCK, tmp_path) and not benchmark.has_record(MIXED)
    mixed = benchmark.run(MIXED, tmp_path)
    records.append(benchmark.RECORD, mixed)
    assert list(stock["stages"]) == [ZERO_SHOT, DISTILLED]
    assert list(mixed["stages"]) == [ZERO_SHOT, CALIBRATED, DISTILLED]
    assert (mixed["num_images"], mixed["kl_images"]) == (9, 4)
    assert "difference" not in stock["stages"][ZERO_SHOT]
    for stage, found in mixed["stages"].items():
        other = stock["stages"][stage if stage != CALIBRATED else ZERO_SHOT]
        for path in (("top1",), ("flip_probability", "diagonal", "1"), ("kl", "horizontal", "1")):
            values = [markdown.at(part["summary"], path) for part in (other, found, found["difference"])]
            assert values[2] == pytest.approx(values[1] - values[0], abs=1e-9), (stage, path)
    assert mixed["stages"][CALIBRATED]["difference"]["summary"]["kl"]["horizontal"]["1"] != 0
    before, after = mixed["stages"][CALIBRATED], mixed["stages"][DISTILLED]
    for way in ("horizontal", "vertical"):
        kl = [part["summary"]["kl"][way]["8"] for part in (before, after, after["change_by_distillation"])]
        assert kl[2] == pytest.approx(kl[1] - kl[0], abs=1e-9) and kl[2] != 0

    monkeypatch.setattr(tables_pretrained, "RECORDS", benchmark.RECORD.parent)
    lines = tables_pretrained.pretrained().splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| Squeeze")]
    assert [row[1:4] for row in rows] == [
        [ZERO_SHOT, "stock", "0"],
        [ZERO_SHOT, "mixpool", "0"],
        [CALIBRATED, "mixpool", "0"],
        [DISTILLED, "stock", "0"],
        [DISTILLED, "mixpool", "0"],
    ]
    expected = mixed["stages"][CALIBRATED]["difference"]
    low, high = expected["ci95"]["top1"]
    assert rows[2][6] == f"{expected['summary']['top1']:+.2f} ({low:+.2f} to {high:+.2f})" and rows[0][6] == "-"
    kl = expected["summary"]["kl"]["horizontal"]["1"]
    assert f": {kl:+.3g} (" in rows[2][12] and len(rows[2]) == len(lines[0].split("|")) - 2
    assert lines[-1].startswith("9 photos, of which KL saw 4.")

    # What is there is not done again, nor taken for another measurement.
    monkeypatch.setattr(benchmark, "network_at", lambda *_: pytest.fail("measured again"))
    assert benchmark.run(MIXED, tmp_path)["stages"] == mixed["stages"] and benchmark.is_done(MIXED, tmp_path)
    (tmp_path / STOCK.name / f"{DISTILLED}.pt").unlink()
    assert benchmark.has_record(STOCK) and not benchmark.is_done(STOCK, tmp_path)
    monkeypatch.setattr(benchmark, "KL_IMAGES", 5)
    assert not benchmark.has_record(MIXED)
    with pytest.raises(pytest.fail.Exception, match="measured again"):
        benchmark.run(MIXED, tmp_path)


def test_the_queue_knows_what_version_0_1_recorded():
    found = list(records.read(benchmark.RECORD))
    assert any("blur" in (r["definition"]["convert"] or {}) for r in found)
    for record in found:
        assert benchmark.has_record(Row(record["network"], record["variant"], record["split"]))
    assert not benchmark.has_record(Row("squeezenet", "mixpool", 99))


def test_the_table_without_records(monkeypatch, tmp_path):
    monkeypatch.setattr(tables_pretrained, "RECORDS", tmp_path)
    assert tables_pretrained.pretrained() == tables_pretrained.NOT_RUN
    assert set(tables_pretrained.VARIANTS) == set(VARIANTS)
    assert set(tables_pretrained.NETWORKS) == set(benchmark.NETWORKS)
    assert tables_pretrained.STAGES == (ZERO_SHOT, CALIBRATED, DISTILLED)


def test_an_evaluation_read_back_pairs_with_another(tiny, tmp_path):
    first, second = (benchmark.measured(row, ZERO_SHOT, tmp_path)["evaluations"]["all"] for row in (STOCK, MIXED))
    read = benchmark._read(benchmark._file_of(STOCK, ZERO_SHOT, tmp_path))["evaluations"]["all"]
    assert isinstance(read, Evaluation) and read.speed == first.speed and read.settings == first.settings
    for name, values in first.values.items():
        assert_same_bits(name, read.values[name], values)
    assert difference_record(read, second) == difference_record(first, second)


# --- the queue --------------------------------------------------------------------------------------------------------


@pytest.fixture
def sample(monkeypatch, tmp_path) -> Path:
    """A shared folder of six photos in three classes."""
    folder = tmp_path / "shared" / "data" / "imagenet_sample"
    for number in range(6):
        place = folder / "val" / f"n{number % 3}"
        place.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), (number, 0, 0)).save(place / f"{number}.jpg")
    (folder / "synsets.txt").write_text("n0 one\nn1 two\nn2 three\n")
    monkeypatch.setattr(benchmark, "shared_folder", lambda: tmp_path / "shared")
    monkeypatch.setattr(benchmark, "NUM_TRAIN", 4)
    return folder


@pytest.mark.parametrize("network, classes", [("squeezenet", ["n0", "n1", "n2"]), ("open_nsfw", ["photo", "none"])])
def test_the_photos_of_a_split(sample, tmp_path, network, classes):
    row = Row(network, "stock", 1)
    for _ in range(2):  # a queue that goes on finds them
        benchmark.link_photos(row, tmp_path)
    folder, class_map = benchmark.data_of(row, tmp_path)
    found = {name: sorted((folder / name).glob("*/*.jpg")) for name in ("train", "validation")}
    names = {name: {photo.name for photo in photos} for name, photos in found.items()}
    assert len(names["train"]) == 4 and len(names["validation"]) == 2
    assert names["train"] | names["validation"] == {f"{number}.jpg" for number in range(6)}
    assert class_map.read_text().split() == classes
    for photo in found["train"] + found["validation"]:
        assert photo.resolve().is_file() and photo.parent.name in classes
        assert network == "open_nsfw" or photo.parent.name == photo.resolve().parent.name


@pytest.mark.parametrize("status", [0, 1])
def test_the_stock_networks_come_first(sample, tmp_path, monkeypatch, capsys, status):
    called = []
    monkeypatch.setattr(queue, "_run", lambda module, row, output: called.append(row) or status)
    monkeypatch.delenv(open_nsfw.VARIABLE, raising=False)
    options = [
        "--variants",
        "mixpool",
        "cmod",
        "--splits",
        "0",
        "1",
        "--processes",
        "1",
        "--output",
        str(tmp_path / "o"),
    ]
    monkeypatch.setattr(sys, "argv", ["pretrained", *options])
    stock = [Row("squeezenet", "stock", split) for split in (0, 1)]
    if status:
        with pytest.raises(SystemExit, match="2 of 2 runs failed"):
            benchmark.main()
        assert called == stock  # the others could be compared with nothing
    else:
        benchmark.main()
        assert called[:2] == stock and [row.variant for row in called[2:]] == ["mixpool", "cmod"] * 2
    assert "open_nsfw left out" in capsys.readouterr().out


# --- a network from ONNX ----------------------------------------------------------------------------------------------


def _graph(padding: list[int]) -> tuple[list, dict[str, torch.Tensor]]:
    from onnx import helper

    generator = torch.Generator().manual_seed(5)
    shapes = {"w1": (4, 3, 7, 7), "b1": (4,), "w2": (4, 4, 3, 3), "b2": (4,), "w3": (4, 2), "b3": (2,)}
    weights = {name: torch.randn(shape, generator=generator) / 4 for name, shape in shapes.items()}
    weights["shape"] = torch.tensor([-1, 4])
    node = helper.make_node
    nodes = [
        node("Transpose", ["images"], ["x"], perm=[0, 3, 1, 2]),
        node("Conv", ["x", "w1", "b1"], ["c1"], kernel_shape=[7, 7], strides=[2, 2], pads=[3] * 4),
        node("Relu", ["c1"], ["r1"]),
        node("MaxPool", ["r1"], ["p"], kernel_shape=[3, 3], strides=[2, 2], pads=padding),
        node("Conv", ["p", "w2", "b2"], ["c2"], kernel_shape=[3, 3], strides=[1, 1], pads=[1] * 4),
        node("Add", ["c2", "p"], ["s"]),
        node("AveragePool", ["s"], ["m"], kernel_shape=[8, 8], strides=[1, 1]),
        node("Reshape", ["m", "shape"], ["f"]),
        node("MatMul", ["f", "w3"], ["l"]),
        node("Add", ["l", "b3"], ["a"]),
        node("Softmax", ["a"], ["y"]),
    ]
    return nodes, weights


def _write(path: Path, padding: list[int]) -> Path:
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    nodes, weights = _graph(padding)
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["n", 32, 32, 3])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 2])
    constants = [numpy_helper.from_array(value.numpy(), name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "net", [images], [out], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)
    return path


def _by_onnx(path: str | Path, x: torch.Tensor) -> torch.Tensor:
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {session.get_inputs()[0].name: x.permute(0, 2, 3, 1).contiguous().numpy()})
    return torch.tensor(y)


def test_a_network_from_onnx(tmp_path):
    pytest.importorskip("onnx")
    path = _write(tmp_path / "net.onnx", [0, 0, 1, 1])
    x = torch.randn(2, 3, 32, 32)
    assert_close("probabilities", open_nsfw.OnnxClassifier(path)(x).softmax(1), _by_onnx(path, x))
    with pytest.raises(ValueError, match="expected the nodes of open_nsfw, got MaxPool"):
        open_nsfw.OnnxClassifier(_write(tmp_path / "other.onnx", [1, 1, 0, 0]))


def test_open_nsfw_takes_normalised_rgb():
    pytest.importorskip("onnx")
    path = os.environ.get(open_nsfw.VARIABLE)
    if path is None or not Path(path).is_file():
        pytest.skip(f"needs open-nsfw.onnx, named by ${open_nsfw.VARIABLE}")
    model = benchmark.NETWORKS["open_nsfw"].build()
    mean, std = (torch.tensor(model.pretrained_cfg[name])[:, None, None] for name in ("mean", "std"))
    rgb = torch.rand(1, 3, 224, 224)
    original = 255 * rgb.flip(1) - torch.tensor([104.0, 117.0, 123.0])[:, None, None]
    found = model((rgb - mean) / std).softmax(1)
    # The padding's gray differs by up to 0.7 of 255 levels.
    assert_close("probabilities", found, _by_onnx(path, original), tolerance=(1e-4, 1e-2))
