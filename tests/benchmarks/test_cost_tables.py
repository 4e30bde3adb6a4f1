"""The tables of the cost measurements, from records made up here."""

from __future__ import annotations

import pytest

from benchmarks.cost import count as cost_count
from benchmarks.cost import models as cost_models
from benchmarks.cost import tables as tables_cost
from benchmarks.cost import times as cost_time
from benchmarks.cost.models import (
    NETWORKS,
    STEMS,
    SUBJECTS,
)
from benchmarks.cost.times import Case, growth_cases
from benchmarks.kit.store import NOT_RUN
from mixpool import records


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tables_cost, "RECORDS", tmp_path)
    return tmp_path


def cells(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "---" not in line]


def test_tables_without_records(folder):
    for make in (tables_cost.cost_count, tables_cost.cost_time, tables_cost.cost_growth, tables_cost.cost_short):
        assert make() == tables_cost.EMPTY


def test_the_table_of_counts(folder):
    found = []
    for variant, factor in (("stock", 1), ("mixpool", 1.5)):
        sizes = {"num_parameters": 2_000_000, "flops_per_image": int(3e9 * factor), "flops_per_call": 7}
        found.append(cost_count._blank("alexnet", variant, 8, 224, saved_bytes=8 * 2**21 * factor, **sizes))
    records.write(folder / "cost.jsonl", found)
    text = tables_cost.cost_count()
    header, *rows = cells(text)
    assert header == ["network", "per image", "stock", "mixpool"], "no column of nothing"
    assert [row[1:] for row in rows] == [
        ["parameters, M", "2.000", "1.000"],
        ["GFLOP, 224 x 224", "3.000", "1.500"],
        ["saved, MiB", "2.0", "1.50"],
    ]
    one = cost_count._blank("alexnet stem", "stock", 8, 224, saved_bytes=1, num_parameters=1, flops_per_image=1)
    records.write(folder / "cost.jsonl", [*found, one])
    assert cells(tables_cost.cost_count())[1] == ["alexnet stem", "parameters, M", "0.000", "-"]
    assert text.count("torch ") == 1 and tables_cost.cost_time() == tables_cost.EMPTY


def timed_records(case: Case, **skipped: str) -> list[dict]:
    ratio = {"p50": 1.25, "p20": 1.2, "p80": 1.3, "n": 3}
    return [
        case.record(variant, skipped=skipped[variant])
        if variant in skipped
        else case.record(variant, ms={"p50": 80.0}, ms_per_image=80.0 / case.batch, ratio_to_stock=ratio)
        for variant in case.variants()
    ]


def test_the_table_of_times(folder):
    compiled = Case("cost_time", "resnet18", "training", True)
    late = Case("cost_time", "resnet50", "training", True)
    waiting = timed_records(late, **dict.fromkeys(late.variants(), NOT_RUN + "out of time"))
    broken = Case("cost_time", "alexnet", "forward", True)
    failed = timed_records(broken, **dict.fromkeys(broken.variants(), "InvalidCxxCompiler: no g++"))
    eager = timed_records(compiled._replace(is_compiled=False))
    some = timed_records(compiled, mixpool="RuntimeError: wrong")
    stem = timed_records(Case("cost_time", "resnet stem", "forward", layout="channels_last"))
    records.write(folder / "cost.jsonl", waiting + some + eager + failed + stem)
    text = tables_cost.cost_time()
    header, *rows = cells(text)
    assert [row[:6] for row in rows] == [
        ["resnet stem", "8", "forward", "eager", "channels_last", "10.00"],
        ["resnet18", "8", "training", "eager", "NCHW", "10.00"],
        ["resnet18", "8", "training", "compiled", "NCHW", "10.00"],
    ]
    assert rows[1][header.index("mixpool")] == "1.25 (1.20 to 1.30)"
    assert rows[2][header.index("mixpool")] == "failed" and rows[2][header.index("mixpool aa_layer")] == "-"
    assert "- resnet18, 8, training, compiled, NCHW: mixpool failed, RuntimeError: wrong." in text
    assert "- resnet50, 8, training, compiled, NCHW: not run." in text
    assert "- alexnet, 8, forward, compiled, NCHW: all failed, InvalidCxxCompiler: no g++." in text


def test_a_row_without_stock_shows_times(folder):
    case = Case("cost_time", "alexnet", "forward")
    found = timed_records(case, stock="RuntimeError: gone")
    for record in found:
        record.pop("ratio_to_stock", None)
    records.write(folder / "cost.jsonl", found)
    header, row = cells(tables_cost.cost_time())
    assert row[header.index("stock, ms per image")] == "failed" and row[header.index("mixpool")] == "10.00 ms"


def test_the_table_of_growth(folder):
    cases = growth_cases()
    records.write(folder / "cost.jsonl", [r for case in reversed(cases) for r in timed_records(case)])
    header, *rows = cells(tables_cost.cost_growth())
    assert "mixpool aa_layer" not in header, "no column of nothing"
    assert [row[:3] for row in rows[:8]] == [
        ["resnet stem", batch, pixels]
        for batch, pixels in [("1", "224"), ("4", "224"), ("8", "224"), ("16", "224"), ("64", "224")]
        + [("8", "128"), ("8", "320"), ("8", "448")]
    ]
    assert [row[0] for row in rows] == ["resnet stem"] * 8 + ["resnet18"] * 8 and rows[0][3] == "80.00"


def test_subjects_are_networks_and_their_stems():
    assert set(SUBJECTS) == {*NETWORKS, *STEMS} and {name for name, _ in STEMS.values()} <= set(NETWORKS)
    assert set(cost_time.COMPILE_SECONDS) == {"stem", *NETWORKS} and set(cost_time.FEW) <= set(cost_models.VARIANTS)


def test_the_short_table_is_of_the_whole_network(folder):
    counts = [
        cost_count._blank("resnet18", name, 8, 224, num_parameters=100, flops_per_image=flops, saved_bytes=7)
        for name, flops in (("stock", 200), ("mixpool", 250))
    ]
    cases = [Case("cost_time", "resnet18", "forward"), Case("cost_time", "resnet18", "forward", True)]
    records.write(folder / "cost.jsonl", counts)
    assert tables_cost.cost_short() == tables_cost.EMPTY
    records.write(folder / "cost.jsonl", counts + [r for case in cases for r in timed_records(case)])
    header, stock, mixpool = cells(tables_cost.cost_short())
    assert (stock[0], mixpool[0]) == ("stock", "mixpool") and mixpool[1:4] == ["1.00", "1.25", "1.00"]
    found = dict(zip(header, mixpool, strict=True))
    assert found["forward"] == found["compiled"] == "1.25 (1.20 to 1.30)" and found["training"] == "-"
