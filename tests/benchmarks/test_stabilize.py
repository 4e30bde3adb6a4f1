"""The measures of stabilized networks against those of the evaluation, and the tables from records."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks.stabilize import tables, variants
from benchmarks.stabilize.measure import SHIFTS, Measured, frames, of_classifier, of_features
from mixpool.evaluation.metrics import kl_divergence
from mixpool.evaluation.model_input import ModelInput
from mixpool.evaluation.protocols import Flips, Place
from mixpool.stabilization.stabilize import stabilize

SIZE = 16


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 6, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 5)).eval()


def test_flips_are_those_of_the_evaluation():
    model, squares = network(), torch.randn(7, 3, SIZE + 8, SIZE + 8)
    logits = frames(model, squares, SIZE)
    labels = torch.zeros(7, dtype=torch.long)
    found = of_classifier(logits, labels).values
    protocol = Flips(ModelInput(size=SIZE).size)
    places = [Place(i, i) for i in range(7)]
    with torch.no_grad():
        outputs = iter([model(frame) for frame in protocol.frames(squares, places, 0)])
    expected = 100 * protocol.measure(outputs, labels)["flip_probability"]
    for k in SHIFTS:
        for i, way in enumerate("hvd"):
            assert torch.equal(found[f"{way}{k}"], expected[:, i, k - 1])
        assert torch.allclose(found[f"flips{k}"], expected[:, :, k - 1].mean(dim=1))
    classes = torch.stack([own.argmax(dim=1) for own in logits])
    assert torch.allclose(found["top1"], 100 * (classes == 0).double().mean(dim=0))


def test_kl_is_the_mean_over_neighbours():
    logits = [torch.randn(3, 4) for _ in range(25)]
    found = of_classifier(logits, torch.zeros(3, dtype=torch.long)).values["kl4"]
    tracks = [[0, *range(1 + 8 * i, 9 + 8 * i)] for i in range(3)]
    pairs = [(t[j], t[j + 4]) for t in tracks for j in range(5)]
    assert torch.allclose(found, torch.stack([kl_divergence(logits[a], logits[b]) for a, b in pairs]).mean(dim=0))


def test_ratios_and_differences():
    stock = Measured({"top1": torch.tensor([100.0, 0.0]), "flips1": torch.tensor([10.0, 30.0])})
    other = Measured({"top1": torch.tensor([100.0, 100.0]), "flips1": torch.tensor([5.0, 15.0])})
    found = other.ratios(stock)
    assert found["top1"][0] == 50 and found["flips1"] == [0.5, 0.5, 0.5]
    assert stock.ratios(stock)["flips1"] == [1, 1, 1]


def test_features_that_do_not_move():
    outputs = [torch.randn(4, 6)] * 25
    assert all(column.eq(0).all() for column in of_features(outputs).values.values())
    moved = [outputs[0] + number for number in range(25)]
    assert of_features(moved).values["moved1"].min() > 0


@pytest.mark.parametrize("name", [*variants.COMMON, *variants.WITH_NORMS])
def test_every_variant_is_one_that_stabilize_takes(name):
    variant = (variants.COMMON | variants.WITH_NORMS)[name]
    if isinstance(variant, dict):
        model = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3, 2, 1), nn.Flatten())
        options = {key: value for key, value in variant.items() if key != "images"}
        assert stabilize(model, torch.randn(8, 3, 24, 24), size=16, **options).seconds > 0


def test_tables_say_what_was_measured(monkeypatch):
    interval = {key: [0.5, 0.4, 0.6] for key in (*tables.CLASSIFIER, *tables.FEATURES)}
    common = {"machine": {"cpu": "X", "threads": 1, "torch": "2", "python": "3"}, "time_utc": "2026-11-28T00:00:00"}
    common |= {"code": {"commit": "abc", "dirty": False}, "command": "c", "num_images": 250, "seconds": 12.0}
    found = [
        {"bed": bed, "variant": name, "means": dict.fromkeys(interval, 3.0), "to_stock": interval, **common}
        for bed in ("squeezenet/0", "squeezenet/1", "resnet18")
        for name in ("stock", "default")
    ]
    monkeypatch.setattr(tables, "_records", lambda: found)
    assert "| default | +0.5 (+0.4 to +0.6) / +0.5" in tables.stabilize_squeezenet()
    assert "| stock | 3 | 3 |" in tables.stabilize_resnet18()
    assert tables.stabilize_small_vgg() == tables.NOT_RUN
    assert "| SqueezeNet, ImageNet photos | +0.5 (+0.4 to +0.6) | 0.50 (0.40 to 0.60) |" in tables.stabilize()
