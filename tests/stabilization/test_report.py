"""What a report prints, records and draws, from tables made by hand and from a stabilization."""

from __future__ import annotations

import json
import math

import pytest
import torch
from strided_net import TREATED, images, trained
from torch import Tensor

from mixpool import records, stabilize
from mixpool.stabilization.agreement import SHIFTS, Steadiness
from mixpool.stabilization.repair import Repaired
from mixpool.stabilization.report import StabilizationReport
from mixpool.stabilization.treat import Decimator


def steadiness(flips: float | None, movement: float, top1: list[bool] | None = None) -> Steadiness:
    def table(value: float) -> Tensor:
        return torch.full((4, 3, 3), value).double() * torch.arange(1, 4) / 2

    classes = None if flips is None else torch.tensor([0, 1, 2, 1 if flips < 0.1 else 2])
    return Steadiness(
        classes=classes,
        flips=None if flips is None else table(flips),
        movement=table(movement),
        top1=None if top1 is None else torch.tensor(top1),
    )


def report(before: Steadiness, after: Steadiness, **fields) -> StabilizationReport:
    given = {
        "decimators": (
            Decimator("conv1", "Conv2d 7/2", None, "it reads the image"),
            Decimator("pool", "MaxPool2d 3/2", "maxima, then low-pass"),
        ),
        "plan": {"pool": "maxima, then low-pass"},
        "stem": "blurpool",
        "repaired": (
            Repaired("", "statistics", 0.3, 0.2),
            Repaired("layer", "refitted", 0.2, 0.1),
            Repaired("head", "left", 0.1, 0.15, "further from stock on held-out images"),
        ),
        "num_images": (175, 38, 37),
        "settings": {"seed": 0},
        "notes": ("a note",),
        "seconds": 12.345,
        "kept_bytes": 1000,
    }
    return StabilizationReport(before=before, after=after, **{**given, **fields})


CLASSIFIER = report(steadiness(0.2, 0.04, [True] * 4), steadiness(0.05, 0.01, [True, True, True, False]))
OTHER = report(steadiness(None, 0.04), steadiness(None, 0.01))


def test_the_text_of_a_classifier():
    lines = str(CLASSIFIER).splitlines()
    assert lines[0] == "1 of 2 decimating layers low-passed, stem: blurpool"
    assert lines[1:3] == [
        "  conv1 (Conv2d 7/2): left: it reads the image",
        "  pool (MaxPool2d 3/2): maxima, then low-pass",
    ]
    assert lines[3] == "1 layers refitted in 12 s on 175 images"
    assert lines[4] == "  head left: further from stock on held-out images"
    assert lines[5] == "on 37 other images (95 % interval), before -> after:"
    table = {line.split("  ")[1].strip(): line for line in lines[6:-1]}
    assert table["top-1, %"].endswith("100 (100 to 100) -> 75 (25 to 100)")
    assert table["flips at 1 px, %"].endswith("10 (10 to 10) -> 2.5 (2.5 to 2.5)")
    assert table["KL at 4 px"].endswith("0.06 (0.06 to 0.06) -> 0.015 (0.015 to 0.015)")
    assert table["same class, %"].endswith("75 (25 to 100)")
    assert len(table) == 1 + 3 + 3 + 1 and lines[-1] == "note: a note"


def test_the_text_of_another_network():
    text = str(OTHER)
    assert "relative change at 2 px" in text and "flips" not in text and "class" not in text and "top-1" not in text


def test_statistics_that_were_left_are_named():
    own = report(OTHER.before, OTHER.after, repaired=(Repaired("", "left", 0.1, 0.2, "statistics: no"),))
    assert "  statistics left: statistics: no" in str(own).splitlines()


def test_ratios():
    assert CLASSIFIER.ratio("flips_1px") == pytest.approx(0.25)
    assert OTHER.ratio("movement_4px") == pytest.approx(0.25)
    still = report(steadiness(0.0, 0.0), steadiness(0.1, 0.1))
    assert math.isnan(still.ratio("flips_1px"))
    with pytest.raises(KeyError):
        OTHER.ratio("flips_1px")


def test_same_class():
    assert CLASSIFIER.same_class["mean"] == 75 and OTHER.same_class is None


@pytest.mark.parametrize("own", [CLASSIFIER, OTHER], ids=["classifier", "other"])
def test_the_record_is_json_and_comes_back(own, tmp_path):
    record = own.as_record()
    assert record["kind"] == "stabilization" and record["plan"] == {"pool": "maxima, then low-pass"}
    assert record["decimators"][0] == {
        **{"name": "conv1", "what": "Conv2d 7/2", "treatment": None},
        "why": "it reads the image",
    }
    assert record["repaired"][1]["after"] == 0.1 and record["seconds"] == 12.35 and record["kept_bytes"] == 1000
    assert record["before"] == own.before.summary() and record["same_class"] == own.same_class
    assert {"machine", "code", "time_utc", "command"} <= record.keys()
    json.dumps(record, allow_nan=False)
    records.write(tmp_path / "out.json", [record])
    (back,) = records.read(tmp_path / "out.json")
    assert back["after"] == own.after.summary() and back["num_images"] == [175, 38, 37]


@pytest.mark.parametrize("own", [CLASSIFIER, OTHER], ids=["classifier", "other"])
@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_the_picture(own, suffix, tmp_path):
    path = own.plot(tmp_path / f"out{suffix}")
    assert path.is_file() and path.stat().st_size > 5000
    if suffix == ".svg":
        assert "relative change" in path.read_text() or "flips" in path.read_text() or "<path" in path.read_text()
    with pytest.raises(ValueError, match="expected a picture named"):
        own.plot(tmp_path / "out.doc")


def test_the_report_of_a_stabilization():
    model = trained()
    given = images(40)
    own = stabilize(model, given, size=32, seed=3)
    assert own.num_images == (28, 6, 6) and own.seconds > 0 and own.plan == TREATED
    assert own.settings == {
        **{"stem": "blurpool", "later": "blurpool", "order": "before", "depth": "auto", "repair": "next"},
        "fidelity": 0.5,
        **{"seed": 3, "size": 32},
    }
    assert [(d.name, d.treatment) for d in own.decimators] == [("conv", None), *TREATED.items()]
    assert own.before.flips.shape == own.after.flips.shape == (6, 3, len(SHIFTS))
    json.dumps(own.as_record())
    assert str(own) == str(own) and len(max(str(own).splitlines(), key=len)) <= 160
    with pytest.raises(AttributeError):
        own.stem = "max"
