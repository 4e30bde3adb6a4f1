"""Records and the tables that are made from them."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.kit import figures, markdown, tables
from mixpool import records


def test_a_record_says_what_where_and_from_which_code(tmp_path):
    record = records.stamp("speed", case="stem", ms={"p50": 1.5})
    assert record["kind"] == "speed" and record["ms"] == {"p50": 1.5}
    assert record["machine"]["torch"] and record["code"]["version"] and record["time_utc"] and record["command"]
    assert {"gpu", "driver", "triton", "cuda", "cudnn"} <= record["machine"].keys()
    assert record["machine"]["cpu_capability"] == torch.backends.cpu.get_cpu_capability()
    assert len(record["code"]["source"]) == 16
    path = tmp_path / "deep" / "r.jsonl"
    records.write(path, [record, {"kind": "eval"}])
    assert list(records.read(path)) == [json.loads(json.dumps(record)), {"kind": "eval"}]
    assert [file.name for file in path.parent.iterdir()] == ["r.jsonl"]


def test_a_broken_line_is_named(tmp_path):
    (tmp_path / "r.jsonl").write_text('{"a": 1}\n{"b": \n')
    with pytest.raises(ValueError, match="line 2"):
        list(records.read(tmp_path / "r.jsonl"))


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: str(page.relative_to(tables.ROOT)))
def test_tables_are_up_to_date(page):
    text = page.read_text()
    assert tables.filled(text) == text, "run python -m benchmarks.kit.tables"
    assert "table:" in text


def test_what_the_fused_path_knows_of_speeds_is_what_was_measured():
    if tables.MEASURED.parent.is_dir():
        assert tables.MEASURED.read_text() == tables.measured(), "run python -m benchmarks.kit.tables"
    assert tables.stale() == []


def test_a_stale_table_is_noticed():
    text = tables.PAGES[0].read_text()
    assert tables.filled(text.replace("| stock |", "| stack |")) == text


def test_the_commit_is_that_of_the_start(monkeypatch):
    """A measurement runs the code it has imported: what is committed or edited meanwhile must not be stamped on it."""
    before = records.stamp("speed")["code"]
    monkeypatch.setattr(records, "_commit", lambda folder: {"commit": "another", "dirty": True})
    assert records.stamp("speed")["code"] == before


# --- the theory's page ------------------------------------------------------------------------------------------------


def test_figures_are_up_to_date(tmp_path):
    drawn = figures.draw(tmp_path)
    assert {path.name for path in drawn} == {path.name for path in figures.DOCS.glob("*.png")} - {"demo.png"}
    for path in drawn:
        committed = figures.DOCS / path.name
        assert committed.stat().st_size < 200_000
        with Image.open(path) as new, Image.open(committed) as old:
            # Another matplotlib or FreeType may move a line by a pixel, but not change the picture.
            assert new.size == old.size
            difference = np.abs(np.asarray(new.convert("RGB"), float) - np.asarray(old.convert("RGB"), float))
            assert difference.mean() < 2, f"{path.name}: run python -m benchmarks.kit.figures"


def test_the_claims_of_the_theorys_page():
    shallow, deep = tables.read("theory")
    assert (deep["num_analytic"], deep["num_packets"], deep["num_crowded"]) == (72, 128, 8)
    assert (shallow["num_analytic"], shallow["num_packets"], shallow["num_crowded"]) == (8, 32, 0)
    found = deep["summary"]
    assert found["correlation_gamma_gap"] > 0.85 and found["correlation_gap_change"] > 0.85
    assert abs(found["correlation_gamma_gap_spread"]) < 0.3, "gamma orders nothing among the others"
    assert found["ratio_blur1_horizontal"] > 2.5 and shallow["summary"]["ratio_blur1_horizontal"] > 1.85
    assert min(found["correlation_theory_phases_gap"], found["correlation_theory_phases_gap_spread"]) > 0.95
    assert found["mean_gap_flat_envelope"] < 1.1 * found["mean_gamma"]
    assert found["correlation_turned_gap_half"] > 0.95
    for record in (shallow, deep):
        kept = np.array(record["is_analytic"])
        of_max, centre, mean = (
            np.array(record[f"change_{name}"])[:, :, kept].mean(axis=2) for name in ("max", "blur1", "blur3")
        )
        assert (mean < of_max).all() and (mean < centre).all(), "mixpool's pooling changes least"
        shifts, stride = record["params"]["shifts"], record["params"]["stride"]
        assert (centre[:2, shifts.index(stride)] > of_max[:2, shifts.index(stride)]).all(), "at a whole stride"
        assert record["summary"]["largest_share_of_bound"] < 1
        assert min(gap for gap, shown in zip(record["gap"], kept, strict=True) if shown) > 0.4


def test_records_of_several_machines_name_all_of_them():
    record = records.stamp("speed")
    other = record | {"machine": record["machine"] | {"cpu": "Abacus", "cpu_capability": "BEADS"}}
    line = markdown.origins([record, other, record], "python -m benchmarks.speed")
    assert line.count(" and ") == 1 and " and Abacus BEADS, " in line and "`python -m benchmarks.speed`" in line
    assert torch.backends.cpu.get_cpu_capability() in markdown.machine_line(record)
    older = {key: value for key, value in other["machine"].items() if key != "cpu_capability"}
    assert markdown.machine_line(record | {"machine": older}).startswith("Abacus, ")
    with pytest.raises(AssertionError, match="one version of torch"):
        markdown.origins([record, record | {"machine": record["machine"] | {"torch": "0.1"}}], "")
