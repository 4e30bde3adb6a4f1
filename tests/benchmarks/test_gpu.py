"""The GPU measurements without a GPU: floors, cases, budget, resuming, summary, tables; and all of it in a dry run."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.gpu import cases, roofline
from benchmarks.gpu import checks as gpu_checks
from benchmarks.gpu import models as gpu_models
from benchmarks.gpu import run as gpu
from benchmarks.gpu import stem as gpu_stem
from benchmarks.gpu import summary as gpu_summary
from benchmarks.gpu import tables as tables_gpu
from benchmarks.gpu import tune as gpu_tune
from benchmarks.gpu.cases import Case, cases_of
from benchmarks.gpu.roofline import floor_of
from benchmarks.kit import markdown, stems, store, tables, timing
from benchmarks.kit.stems import ALEXNET, MAX, MIX, MODULUS1, MODULUS3, RESNET
from benchmarks.kit.timing import Budget
from mixpool import records
from mixpool.ops import backend


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Not here: dynamo cannot trace the wrappers of conftest.py."""


# --- the floors -------------------------------------------------------------------------------------------------------

# Section 1 of the design, batch 256 in bfloat16: microseconds of memory traffic and of nominal products, GFLOP.
FLOORS = {
    "RMax inference": (RESNET, MAX, False, 60, 76, 60.4),
    "CMod inference": (RESNET, MODULUS1, False, 60, 38, 30.2),
    "RMax training": (RESNET, MAX, True, 291, 229, 181.3),
    "CMod training": (RESNET, MODULUS1, True, 257, 115, 90.6),
    "AlexNet RMax inference": (ALEXNET, MAX, False, 34, 46, 36.0),
    "AlexNet CMod inference": (ALEXNET, MODULUS1, False, 34, 22, 17.3),
    "AlexNet RMax training": (ALEXNET, MAX, True, 75, 91, 72.0),
    "AlexNet CMod training": (ALEXNET, MODULUS1, True, 67, 66, 52.0),
}


@pytest.mark.parametrize("name", FLOORS)
def test_floors_are_those_of_the_design(name):
    shape, plan, training, dram_us, tensor_us, gflop = FLOORS[name]
    floor = floor_of(shape, plan, 256, "bfloat16", training)
    assert floor.dram_us == pytest.approx(dram_us, abs=0.6) and floor.tensor_us == pytest.approx(tensor_us, abs=0.6)
    assert floor.flops / 1e9 == pytest.approx(gflop, abs=0.06)
    assert floor.us == max(floor.dram_us, floor.tensor_us)


def test_a_floor_scales():
    half = floor_of(RESNET, MIX, 256, "bfloat16", False)
    single = floor_of(RESNET, MIX, 256, "tf32", False)
    assert single.dram_us == pytest.approx(2 * half.dram_us) and single.tensor_us == pytest.approx(2 * half.tensor_us)
    quarter = floor_of(RESNET, MIX, 64, "bfloat16", False)
    assert 4 * quarter.dram_bytes == half.dram_bytes and 4 * quarter.flops == half.flops
    # blur=3 needs the modulus everywhere: four times as many positions
    blurred, sharp = (floor_of(RESNET, plan, 256, "bfloat16", False) for plan in (MODULUS3, MODULUS1))
    assert blurred.flops == 4 * sharp.flops and blurred.dram_bytes == sharp.dram_bytes
    # a mix: half the products of each kind, the images read once
    assert 2 * half.flops == floor_of(RESNET, MAX, 256, "bfloat16", False).flops + blurred.flops
    assert half.dram_bytes == sharp.dram_bytes
    autocast = floor_of(RESNET, MIX, 256, "autocast", False)
    assert autocast.dram_bytes - half.dram_bytes == 256 * 3 * 224 * 224 * 2, "the images are float32"


def test_what_a_time_achieves():
    floor = roofline.Floor(dram_bytes=3_000_000, flops=790_000_000, dram_us=1.0, tensor_us=0.5)
    found = floor.achieved(2.0)
    assert found == pytest.approx({"gb_per_s": 1500.0, "tflop_per_s": 395.0, "fraction_of_floor": 0.5})


@pytest.mark.parametrize("shape", [RESNET, ALEXNET], ids=lambda shape: shape.name)
def test_the_stems_have_the_shape_they_say(shape):
    small = shape._replace(size=67, out_channels=8)
    x = stems.images(small, 2, "float32")
    stock = stems.stock_stem(small).eval()
    assert stock[0](x).shape[2:] == small.conv_size
    assert stock(x).shape == (2, 8, *small.pooled_size)
    for plan in (MAX, MIX, MODULUS1):
        stem = stems.mixpool_stem(small, plan, "reference")
        assert stem(x).shape == (2, 8, *small.pooled_size) and stem.num_modulus == plan.num_modulus(8)
        assert torch.equal(stem.weight, stock[0].weight)
    reordered = stems.mixpool_stem(small, MAX, "reference").eval()
    assert torch.equal(reordered(x), stock(x)), "the baseline computes the stock stem's numbers"


# --- which cases ------------------------------------------------------------------------------------------------------


def test_the_targets_come_first_and_against_every_compiler():
    found = cases_of("stem")
    assert [(case.plan, case.mode) for case in found[:4]] == [
        (MIX, "forward"),
        (MAX, "forward"),
        (MODULUS1, "forward"),
        (MIX, "full"),
    ]
    assert cases_of("stem", quick=True) == found[:4]
    for case in found:
        assert (case.shape, case.batch, case.dtype, case.layout) == (RESNET, 256, "bfloat16", "channels_last")
        names = case.providers()
        wanted = {"stock", "reference", "fused", "fused compiled"}
        wanted |= {f"{name} {how}" for name in ("stock", "reference") for how in cases.COMPILE_MODES}
        assert wanted <= set(names) and len(set(names)) == len(names)
        assert ("fused graph" in names) == (case.mode == "forward")
        assert ("stock reordered" in names) == (case.plan != MAX), "of all-max it is the reference itself"


def test_every_setting_of_the_issue_is_there():
    found = [case for part in ("stem", "table", "shapes") for case in cases_of(part)]
    assert len(set(found)) == len(found)
    for shape, batch in ((RESNET, 64), (RESNET, 256), (ALEXNET, 256)):
        for mode in ("forward", "full"):
            plans = {c.plan for c in found if (c.shape, c.batch, c.mode) == (shape, batch, mode)}
            assert plans == {MAX, MODULUS1, MODULUS3, MIX}
    settings = {(case.dtype, case.layout) for case in found}
    assert settings >= {("bfloat16", "NCHW"), ("float16", "channels_last"), ("tf32", "channels_last")}
    assert any(case.dtype == "autocast" for case in found)
    for dtype, layout in {s for s in settings if s[0] != "autocast"}:  # what decides the default
        for plan in (MAX, MODULUS1, MODULUS3):
            for mode in ("forward", "full"):
                case = next(c for c in found if c[1:6] == (plan, 256, mode, dtype, layout) and c.shape == RESNET)
                assert set(case.compilers) & set(gpu_summary.TUNED)


def test_the_models_target_comes_first():
    first, second = gpu_models.cases(quick=True)
    assert (first.model, first.mode, first.batch) == (second.model, second.mode, 256) == ("resnet50", "training", 256)
    assert {case.model for case in gpu_models.cases()} == {"resnet18", "resnet50"}


def test_parts_fit_in_a_lease():
    assert sum(gpu.PARTS.values()) <= 25 * 60 and max(gpu.PARTS.values()) <= 9 * 60


# --- time and budget --------------------------------------------------------------------------------------------------


def test_calls_are_interleaved_in_turning_order():
    seen = []
    samples = timing.interleave({name: lambda name=name: seen.append(name) for name in "abc"}, 3, 2, "cpu")
    assert "".join(seen) == "aabbcc" + "bbccaa" + "ccaabb"
    assert {name: [len(r) for r in rounds] for name, rounds in samples.items()} == dict.fromkeys("abc", [2, 2, 2])


def test_spread_and_ratio():
    assert timing.spread([5.0, 1.0, 2.0, 3.0, 4.0]) == pytest.approx({"p50": 3, "p20": 1.8, "p80": 4.2, "n": 5})
    assert timing.spread([7.0]) == {"p50": 7, "p20": 7, "p80": 7, "n": 1}
    # ratios within rounds: a machine that is three times slower in the second round changes nothing
    assert timing.ratio([[2.0, 2.0], [6.0, 6.0]], [[1.0], [3.0]])["p50"] == 2
    assert timing.milliseconds([[1.0, 2.0], [3.0]])["p50"] == 2


def test_the_budget_learns_how_long_things_take():
    now = [0.0]
    budget = Budget(100, clock=lambda: now[0])
    assert budget.allows(100) and not budget.allows(101)
    with budget.spending(20):
        now[0] += 41
    assert budget.pace == pytest.approx(2) and budget.left == 59
    assert budget.allows(29) and not budget.allows(30)


def test_an_attempt_gives_the_reason():
    def fail():
        raise RuntimeError("\n  out of shared memory\nmore lines")

    assert timing.attempt(lambda: None, "cpu") is None
    assert timing.attempt(fail, "cpu") == "RuntimeError: out of shared memory"


# --- records and resuming ---------------------------------------------------------------------------------------------

TINY = cases.shrunk(Case(RESNET, MIX, 64, "full", "tf32", compilers=()))


@pytest.fixture
def tiny(monkeypatch):
    """One small case, and a "fused" backend that is the reference by another name."""
    monkeypatch.setattr(gpu_stem, "cases_of", lambda part, **options: [TINY])
    monkeypatch.setattr(stems, "backend_option", lambda function, backend: {})


def run_tiny(path: Path, seconds: float = 100.0, **options) -> dict[str, dict]:
    gpu_stem.run_speed("stem", store.Store(path), Budget(seconds), "cpu", dry=True, **options)
    return {record["provider"]: record for record in records.read(path)}


def test_a_case_has_a_record_for_each_provider(tiny, tmp_path):
    found = run_tiny(tmp_path / "gpu.jsonl")
    assert list(found) == ["stock", "stock reordered", "reference", "fused", "fused compiled"]
    for record in found.values():
        assert record["dry"] is True and record["kind"] == "speed" and record["mode"] == "full"
        assert record["ms"]["p50"] > 0 and record["ms"]["n"] == 1 and record["ratio_to_stock"]["p50"] > 0
        assert record["floor"]["dram_bytes"] > 0 and record["gb_per_s"] > 0 and record["tflop_per_s"] > 0
        assert record["params"]["num_modulus"] == 4 and record["code"]["source"] == records.SOURCE
    assert found["stock"]["floor"]["flops"] < found["fused"]["floor"]["flops"], "two convolutions per modulus"


def test_a_rerun_goes_on_where_the_last_one_stopped(tiny, tmp_path, monkeypatch):
    path = tmp_path / "gpu.jsonl"
    cut = run_tiny(path, seconds=0.0)
    assert all(record["skipped"].startswith(store.NOT_RUN) for record in cut.values()) and len(cut) == 5
    first = run_tiny(path)
    assert not any("skipped" in record for record in first.values()), "what was out of budget is measured now"
    monkeypatch.setattr(gpu_stem, "timed", lambda *args, **options: pytest.fail("nothing is left to measure"))
    assert run_tiny(path) == first
    with pytest.raises(pytest.fail.Exception):
        run_tiny(path, again=True)
    monkeypatch.setattr(records, "SOURCE", "other sources")
    with pytest.raises(pytest.fail.Exception):
        run_tiny(path)


def test_what_is_not_there_is_recorded_and_nothing_else_is_timed_for_it(tmp_path, monkeypatch):
    def unavailable(function, backend):
        if backend == "fused":
            raise stems.Unavailable("no such thing")
        return {}

    monkeypatch.setattr(gpu_stem, "cases_of", lambda part, **options: [TINY])
    monkeypatch.setattr(stems, "backend_option", unavailable)
    found = run_tiny(tmp_path / "gpu.jsonl")
    assert "no such thing" in found["fused"]["skipped"] and "ms" not in found["fused"]
    assert "ms" in found["reference"]


def test_a_broken_context_is_blamed_once_and_the_others_are_timed_after_a_restart(tiny, tmp_path, monkeypatch):
    path, broken = tmp_path / "gpu.jsonl", []
    attempt = timing.attempt

    def break_fused(call, device):
        broken.append(1)
        if len(broken) == 4:  # stock, stock reordered, reference, fused
            raise timing.DeviceLost("an illegal memory access was encountered")
        return attempt(call, device)

    monkeypatch.setattr(timing, "attempt", break_fused)
    with pytest.raises(timing.DeviceLost):
        run_tiny(path)
    (record,) = records.read(path)
    assert record["provider"] == "fused" and "illegal memory access" in record["skipped"]
    found = run_tiny(path)
    assert "skipped" in found["fused"]
    assert not [r["skipped"] for name, r in found.items() if name != "fused" and "skipped" in r]


def test_backends_are_asked_for_by_name():
    assert stems.backend_option(lambda x, backend="auto": None, "fused") == {"backend": "fused"}
    assert stems.backend_option(lambda x: None, "reference") == {}
    with pytest.raises(stems.Unavailable, match="fused"):
        stems.backend_option(lambda x: None, "fused")


def test_a_part_with_a_broken_context_is_started_again(monkeypatch, tmp_path, capsys):
    statuses = iter([gpu.DEVICE_LOST, gpu.DEVICE_LOST, 0])
    commands = []
    monkeypatch.setattr(gpu, "run_child", lambda command, *rest: commands.append(command) or next(statuses))
    args = gpu.parse(["--again", "--quick"])
    assert gpu.run_part(["stem"], tmp_path, 100.0, args) == 0
    assert ["--again" in command for command in commands] == [True, False, False], "what it had measured is kept"
    assert all("--quick" in command and "--dry" not in command for command in commands)


def test_a_part_that_hangs_is_killed(tmp_path, capsys):
    code = "import time; print('started', flush=True); time.sleep(60)"
    assert gpu.run_child([sys.executable, "-c", code], 0.5, tmp_path, False) == 124


# --- commits ----------------------------------------------------------------------------------------------------------


def test_the_source_hash_is_gits(tmp_path):
    package = tmp_path / "mixpool"
    (package / "fused").mkdir(parents=True)
    (package / "__init__.py").write_text("x = 1\n")
    (package / "fused" / "a.py").write_text("")
    (package / "fused" / "measured.json").write_text("[]")
    empty = "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"  # git's name of the empty file
    known = subprocess.run(["git", "hash-object", package / "__init__.py"], capture_output=True, text=True)
    if known.returncode:
        pytest.skip("needs git")
    blobs = [("fused/a.py", empty), ("__init__.py", known.stdout.strip()), ("fused/measured.json", "any")]
    assert records._source_hash_of(package) == records.source_hash(blobs)
    (package / "fused" / "a.py").write_text("y = 2\n")
    assert records._source_hash_of(package) != records.source_hash(blobs)


def test_collecting_finds_the_commit_and_replaces_what_was_measured_before(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "commits_by_source", lambda: {"old": "0123", "new": "4567"})
    target = tmp_path / "gpu.jsonl"
    for source, ms in (("old", 2.0), ("new", 1.0), ("unknown", 3.0)):
        path = tmp_path / f"{source}.jsonl"
        records.write(path, [speed_record("fused", ms, source=source, commit=None, dirty=None)])
        number, complaints = store.collect([path], target)
        (record,) = records.read(target)
        assert number == 1 and record["ms"]["p50"] == ms
        assert bool(complaints) == record["code"]["dirty"] == (source == "unknown")
    records.write(path, [speed_record("fused", 1.0, dry=True)])
    with pytest.raises(SystemExit, match="dry run"):
        store.collect([path], target)


# --- the summary and the tables ---------------------------------------------------------------------------------------


def speed_record(
    provider: str, ms: float, plan: str = "mix", mode: str = "forward", *, blur=3, batch=256, gpu_name="H100",
    dtype="bfloat16", layout="channels_last", source="s", commit="c", dirty=False, **fields,
) -> dict:  # fmt: skip
    record = Case(RESNET, stems.Plan(plan, blur), batch, mode, dtype, layout).record(provider, ms={"p50": ms})
    record |= {"gb_per_s": 1000.0, "tflop_per_s": 100.0, "fraction_of_floor": 0.06 / ms, **fields}
    record["machine"]["gpu"] = gpu_name
    record["code"] = {"version": "1", "commit": commit, "dirty": dirty, "source": source}
    return record


def measured_case(fused: float, **where) -> list[dict]:
    times = {"stock": 4.0, "stock compiled": 2.5, "stock max-autotune": 2.0, "stock max-autotune no graphs": 2.2}
    times |= {"reference": 3.0, "reference compiled": 1.0, "reference max-autotune": 1.5, "fused": fused}
    return [speed_record(name, ms, **where) for name, ms in times.items()]


def rows_of(found: list[dict]) -> dict[str, list[str]]:
    return {row[0]: row[1:] for row in gpu_summary.target_rows(found)}


def test_targets_are_met_or_missed_and_never_guessed():
    rows = rows_of([])
    assert len(rows) == len(gpu_summary.TARGETS) and {row[-1] for row in rows.values()} == {"not measured"}
    rows = rows_of(measured_case(0.8) + measured_case(1.9, mode="full"))
    assert rows["mix blur=3, inference, over compiled stock"] == [">= 2.00 x", "2.50 x", "met"], "of its fastest"
    assert rows["mix blur=3, inference, over eager stock"] == [">= 4.00 x", "5.00 x", "met"]
    assert rows["mix blur=3, training, over compiled stock"] == [">= 1.30 x", "1.05 x", "missed"]
    assert rows["all-max, inference, over compiled stock"][-1] == "not measured"
    skipped = [{**record, "skipped": "failed"} for record in measured_case(0.8) if record["provider"] == "fused"]
    without = [record for record in measured_case(0.8) if record["provider"] != "fused"]
    assert rows_of(without + skipped)["mix blur=3, inference, over eager stock"][-1] == "not measured"


def test_targets_read_the_largest_batch_and_the_right_blur():
    found = measured_case(0.1, batch=64) + measured_case(0.8) + measured_case(0.1, plan="mix", blur=1)
    assert rows_of(found)["mix blur=3, inference, over eager stock"][1] == "5.00 x"
    found = measured_case(0.1, plan="modulus", blur=1)
    assert rows_of(found)["all-modulus blur=1, inference, of the roofline"] == [">= 50%", "60%", "met"]


def test_memory_models_and_accuracy_have_targets():
    case = Case(RESNET, MIX, 256, "full")
    found = [case.record("stock", "memory", held_mib=1000.0), case.record("fused", "memory", held_mib=260.0)]
    assert rows_of(found)["mix blur=3, memory held for backward, of eager's"] == ["<= 25%", "26%", "missed"]
    eager, compiled = gpu_models.cases(quick=True)
    found = [
        eager.record("stock", images_per_s=1000.0),
        eager.record("mixpool fused", images_per_s=1001.0),
        compiled.record("stock", images_per_s=1000.0),
        compiled.record("mixpool fused", images_per_s=999.0),
    ]
    rows = rows_of(found)
    assert rows["ResNet-50 training, mixpool over stock, eager"][-1] == "met"
    assert rows["ResNet-50 training, mixpool over stock, compiled"][-1] == "missed"
    found = [case.record("fused", "accuracy", within=True, bitwise_repeatable=True)]
    found.append(case._replace(plan=MAX).record("fused", "accuracy", within=False, bitwise_repeatable=True))
    rows = rows_of(found)
    assert rows["bfloat16 cases within twice eager's error"][1:] == ["50%", "missed"]
    assert rows["bfloat16 cases bitwise repeatable"][1:] == ["100%", "met"]


def test_the_summary_says_what_was_skipped_and_that_a_dry_run_counts_for_nothing():
    record = speed_record("fused", 1.0, skipped="sm_75 is too old", dry=True)
    text = gpu_summary.summary([record])
    assert "fused skipped 1 times: sm_75 is too old" in text and "mean nothing" in text


def test_errors_are_judged_by_the_eager_ones():
    truth = torch.tensor([1.0, -4.0], dtype=torch.float64)
    found = gpu_checks.errors(truth + 0.5, truth + 0.25, truth, 0.0)
    assert found["within"] and found["rms_ratio_vs_eager"] == pytest.approx(2.0) and found["largest"] == 4
    assert not gpu_checks.errors(truth + 0.75, truth + 0.25, truth, 0.05)["within"]
    assert gpu_checks.errors(truth + 0.75, truth + 0.25, truth, 0.0625)["within"], "one rounding of the largest"
    assert not gpu_checks.errors(truth * float("nan"), truth + 0.25, truth, 1.0)["within"]


def test_accuracy_of_a_wrong_and_of_an_unstable_stem(monkeypatch):
    monkeypatch.setattr(stems, "backend_option", lambda function, backend: {})
    case = gpu_checks.accuracy_cases(dry=True)[0]
    good = gpu_checks.accuracy(case, "cpu")
    assert good["within"] and good["bitwise_repeatable"] and set(good["odd_images"].values()) == {"passed"}
    assert {"out", "grad weight", "grad bn.weight", "grad bn.bias"} == set(good["error"])

    class Wrong(nn.Module):
        def __init__(self, stem):
            super().__init__()
            self.stem, self.calls = stem, 0
            self.weight = stem.weight

        def named_parameters(self, *args, **kwargs):
            return self.stem.named_parameters()

        def state_dict(self):
            return self.stem.state_dict()

        def load_state_dict(self, state):
            return self.stem.load_state_dict(state)

        def forward(self, x):
            self.calls += 1
            return self.stem(x).nan_to_num() * (1 + 1e-3 * self.calls)

    build = stems.mixpool_stem

    def wrong_if_fused(shape, plan, backend, **where):
        stem = build(shape, plan, backend, **where)
        return Wrong(stem) if backend == "fused" else stem

    monkeypatch.setattr(gpu_checks, "mixpool_stem", wrong_if_fused)
    bad = gpu_checks.accuracy(case, "cpu")
    assert not bad["within"] and not bad["bitwise_repeatable"] and "out" in bad["differs"]
    assert "hidden" in bad["odd_images"]["NaN"]
    assert "NOT WITHIN" in gpu_checks.verdict(bad) and "NOT REPEATABLE" in gpu_checks.verdict(bad)


# --- where the fused path is the default ------------------------------------------------------------------------------


def test_measured_compares_single_kinds_with_the_tuned_reference():
    found = measured_case(1.0, plan="max") + measured_case(0.5, plan="modulus", blur=1, mode="full", dtype="float16")
    found += measured_case(0.5, plan="mix") + measured_case(0.5, plan="max", dtype="autocast")
    assert gpu_summary.measured(found) == [
        {"gpu": "H100", "kernel": "max", "mode": "inference", "dtype": "bfloat16", "layout": "channels_last",
         "speedup": 1.5},
        {"gpu": "H100", "kernel": "modulus1", "mode": "training", "dtype": "float16", "layout": "channels_last",
         "speedup": 3.0},
    ]  # fmt: skip


@pytest.mark.parametrize(
    "spoilt",
    [{"dry": True}, {"dirty": True}, {"dirty": None}, {"commit": None}, {"gpu_name": None}],
    ids=lambda spoilt: "-".join(spoilt),
)
def test_measured_takes_clean_records_only(spoilt):
    assert gpu_summary.measured(measured_case(0.5, plan="max", **spoilt)) == []


def test_measured_names_the_cases_as_the_choice_of_the_backend_asks_for_them():
    entry, other = (gpu_summary.measured(measured_case(0.5, plan="max", dtype=d))[0] for d in ("tf32", "float16"))
    assert (entry["dtype"], other["dtype"]) == ("float32", "float16")
    kernel, mode = entry["kernel"], entry["mode"]
    assert backend._slowest([entry]) == {("H100", kernel, mode, "float32", "channels_last"): 3.0}
    assert (kernel, mode) == ("max", "inference")


def test_measured_takes_nothing_of_sources_that_failed_their_tests():
    verdict = gpu_checks.check_record("tests", status="failed")
    verdict["code"] = {"source": "s"}
    found = measured_case(0.5, plan="max")
    assert gpu_summary.measured(found) and gpu_summary.measured([*found, verdict]) == []


def test_the_tables_of_the_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(tables_gpu, "RECORDS", tmp_path)
    empty = [make() for make in (tables_gpu.gpu, tables_gpu.gpu_targets, tables_gpu.gpu_models)]
    assert set(empty) == {tables_gpu.NO_GPU} and tables.measured() == "[]\n"
    found = measured_case(0.8, plan="max") + measured_case(0.4, batch=64)
    found.append(Case(RESNET, MIX, 256, "full").record("fused", "memory", held_mib=154.0, peak_mib=300.0))
    found[-1]["machine"]["gpu"], found[-1]["code"] = "H100", found[0]["code"]
    records.write(tmp_path / "gpu.jsonl", found)
    monkeypatch.setattr(markdown.read, "__defaults__", (tmp_path,))
    assert "| max | inference | 4.000 | 2.000 | 1.000 | 0.800 | 5.00 x | 2.50 x | 1.25 x |" in tables_gpu.gpu()
    assert "resnet 64" in tables_gpu.gpu_others() and "| max |" not in tables_gpu.gpu_others()
    assert "| 154 | 300 |" in tables_gpu.gpu_memory() and "H100, driver" in tables_gpu.gpu_memory()
    assert "5.00 x" not in tables_gpu.gpu_models()
    (entry,) = json.loads(tables.measured())
    assert entry["kernel"] == "max" and entry["speedup"] == pytest.approx(1.875)


def test_tables_refuse_a_dry_run(tmp_path):
    records.write(tmp_path / "gpu.jsonl", [speed_record("fused", 1.0, dry=True)])
    with pytest.raises(ValueError, match="dry run"):
        markdown.read("gpu", tmp_path)


# --- all of it --------------------------------------------------------------------------------------------------------


def test_the_tests_for_a_gpu_are_found_in_every_folder():
    fused, others = gpu_checks.test_files()
    assert fused and all((tables.ROOT / name).name.startswith("test_fused") for name in fused)
    assert others and not set(fused) & set(others)
    assert all(re.search(r"mark\.gpu\b", (tables.ROOT / name).read_text()) for name in others)


def test_the_verdict_of_pytest(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_checks.importlib.util, "find_spec", lambda name: None)  # without xdist's six processes
    file = tmp_path / "test_tiny.py"
    file.write_text("def test_good():\n    pass\n\n\ndef test_bad():\n    assert 1 == 2\n")
    found = gpu_checks.run_tests("tests", [str(file)], tmp_path / "tests.log", 60.0)
    assert found["status"] == "failed" and found["ran"] == 2 and found["counts"]["failures"] == 1
    assert [name.rpartition("::")[2] for name in found["failed"]] == ["test_bad"]
    assert "assert 1 == 2" in (tmp_path / "tests.log").read_text()
    none = gpu_checks.run_tests("other tests", [str(file)], tmp_path / "tests.log", 60.0)
    assert none["status"] == "none ran" and not none["failed"], "neither is for a GPU"
    assert "out of budget" in gpu_checks.run_tests("tests", [str(file)], tmp_path / "tests.log", 5.0)["skipped"]


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "has_gpu", lambda: False)
    assert gpu.main([]) == 2 and "--dry" in capsys.readouterr().err


@pytest.mark.skipif(not backend.HAS_TRITON, reason="needs triton")
def test_blocks_are_tuned_side_by_side(tmp_path):
    found = store.Store(tmp_path / "gpu.jsonl")
    gpu_tune.run_tune(found, Budget(1000.0), "cpu", dry=True)
    assert [r["ms"]["n"] for r in found] == [1, 1] and {r["kind"] for r in found} == {"tune"}
    for kind, purpose in itertools.product(gpu_tune.KINDS, gpu_tune.PURPOSES):
        blocks = gpu_tune.candidates(kind, purpose)
        assert 3 < len(set(blocks)) == len(blocks) <= 8


@pytest.mark.slow
def test_a_dry_run_goes_through_every_part(tmp_path, capfd):
    """Each part in a process of its own, as on a GPU: `python -m benchmarks.gpu --child-until ...`."""
    status = gpu.main(["--dry", "--output", str(tmp_path)])
    out, err = capfd.readouterr()
    assert status == 0, f"{out[-2000:]}\n{err[-2000:]}\n{(tmp_path / 'gpu.log').read_text()[-2000:]}"
    found = list(records.read(tmp_path / "gpu.jsonl"))
    assert {record["kind"] for record in found} == {"check", "accuracy", "speed", "memory", "profile", "model_speed"}
    assert all(record["dry"] is True and record["machine"]["gpu"] is None for record in found)
    not_run = [r for r in found if str(r.get("skipped", "")).startswith(store.NOT_RUN) and r["kind"] != "check"]
    assert not not_run, "out of budget"
    timed = {r["provider"] for r in found if r["kind"] == "speed" and "ms" in r}
    assert timed >= {"stock", "stock compiled", "stock max-autotune", "stock reordered", "reference"}
    assert not backend.HAS_TRITON or timed >= {"fused", "fused compiled"}
    for record in found:
        assert ("skipped" in record) != any(
            key in record for key in ("ms", "status", "error", "held_mib", "kernels")
        ), f"either measured or skipped with a reason: {record}"
    assert "== summary" in out and "mix blur=3, inference, over compiled stock" in out
    assert "dry run: these numbers mean nothing" in out
