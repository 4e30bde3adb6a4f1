"""The GPU measurements without a GPU: floors, cases, budget, resuming; and all of it in a dry run."""

from __future__ import annotations

import itertools
import re
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import cases, roofline
from benchmarks.gpu import checks as gpu_checks
from benchmarks.gpu import models as gpu_models
from benchmarks.gpu import run as gpu
from benchmarks.gpu import stem as gpu_stem
from benchmarks.gpu import summary as gpu_summary
from benchmarks.gpu import tune as gpu_tune
from benchmarks.gpu.cases import Case, cases_of
from benchmarks.gpu.roofline import floor_of
from benchmarks.kit import stems, store, tables, timing
from benchmarks.kit.stems import ALEXNET, CMOD, MAX, MIX, MODULUS, RESNET
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
    "CMod inference": (RESNET, CMOD, False, 60, 38, 30.2),
    "RMax training": (RESNET, MAX, True, 291, 229, 181.3),
    "CMod training": (RESNET, CMOD, True, 257, 115, 90.6),
    "AlexNet RMax inference": (ALEXNET, MAX, False, 34, 46, 36.0),
    "AlexNet CMod inference": (ALEXNET, CMOD, False, 34, 22, 17.3),
    "AlexNet RMax training": (ALEXNET, MAX, True, 75, 91, 72.0),
    "AlexNet CMod training": (ALEXNET, CMOD, True, 67, 66, 52.0),
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
    # the mean needs the modulus everywhere: four times as many positions
    blurred, sharp = (floor_of(RESNET, plan, 256, "bfloat16", False) for plan in (MODULUS, CMOD))
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
    for plan in (MAX, MIX, CMOD):
        stem = stems.mixpool_stem(small, plan, "reference")
        assert stem(x).shape == (2, 8, *small.pooled_size) and stem.num_complex == plan.num_complex(8)
        assert torch.equal(stem.weight, stock[0].weight)
    reordered = stems.mixpool_stem(small, MAX, "reference").eval()
    assert torch.equal(reordered(x), stock(x)), "the baseline computes the stock stem's numbers"


# --- which cases ------------------------------------------------------------------------------------------------------


def test_the_targets_come_first_and_against_every_compiler():
    found = cases_of("stem")
    assert [(case.plan, case.mode) for case in found[:4]] == [
        (MIX, "forward"),
        (MAX, "forward"),
        (CMOD, "forward"),
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
            assert plans == {MAX, CMOD, MODULUS, MIX}
    settings = {(case.dtype, case.layout) for case in found}
    assert settings >= {("bfloat16", "NCHW"), ("float16", "channels_last"), ("tf32", "channels_last")}
    assert any(case.dtype == "autocast" for case in found)
    for dtype, layout in {s for s in settings if s[0] != "autocast"}:  # what decides the default
        for plan in (MAX, CMOD, MODULUS):
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
        assert record["params"]["num_complex"] == 4 and record["code"]["source"] == records.code()["source"]
    assert found["stock"]["floor"]["flops"] < found["fused"]["floor"]["flops"], "two convolutions per modulus"


@pytest.mark.slow
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
    other = {**records.code(), "source": "other sources"}
    monkeypatch.setattr(records, "code", lambda: other)
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


@pytest.mark.slow
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


# --- all of it --------------------------------------------------------------------------------------------------------


def test_the_tests_for_a_gpu_are_found_in_every_folder():
    fused, others = gpu_checks.test_files()
    assert fused and all((tables.ROOT / name).name.startswith("test_fused") for name in fused)
    assert others and not set(fused) & set(others)
    assert all(re.search(r"mark\.gpu\b", (tables.ROOT / name).read_text()) for name in others)


@pytest.mark.slow
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
    assert "== summary" in out and "mix, inference, over compiled stock" in out
    assert "dry run: these numbers mean nothing" in out
