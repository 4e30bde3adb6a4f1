"""What becomes of the GPU's records: commits, summary, tables."""

from __future__ import annotations

import subprocess

import pytest
import torch
from torch import nn

from benchmarks.gpu import checks as gpu_checks
from benchmarks.gpu import models as gpu_models
from benchmarks.gpu import summary as gpu_summary
from benchmarks.gpu import tables as tables_gpu
from benchmarks.gpu.cases import Case
from benchmarks.kit import markdown, stems, store
from benchmarks.kit.stems import MAX, MIX, RESNET
from mixpool import records

PLANS = {plan.name: plan for plan in stems.PLANS}

# --- commits ----------------------------------------------------------------------------------------------------------


def test_the_source_hash_is_gits(tmp_path):
    package = tmp_path / "mixpool"
    (package / "fused").mkdir(parents=True)
    (package / "__init__.py").write_text("x = 1\n")
    (package / "fused" / "a.py").write_text("")
    (package / "fused" / "notes.json").write_text("[]")
    empty = "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"  # git's name of the empty file
    known = subprocess.run(["git", "hash-object", package / "__init__.py"], capture_output=True, text=True)
    if known.returncode:
        pytest.skip("needs git")
    blobs = [("fused/a.py", empty), ("__init__.py", known.stdout.strip()), ("fused/notes.json", "any")]
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
    provider: str, ms: float, plan: str = "mix", mode: str = "forward", *, batch=256, gpu_name="H100",
    dtype="bfloat16", layout="channels_last", source="s", commit="c", dirty=False, **fields,
) -> dict:  # fmt: skip
    record = Case(RESNET, PLANS[plan], batch, mode, dtype, layout).record(provider, ms={"p50": ms})
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
    assert rows["mix, inference, over compiled stock"] == [">= 2.00 x", "2.50 x", "met"], "of its fastest"
    assert rows["mix, inference, over eager stock"] == [">= 4.00 x", "5.00 x", "met"]
    assert rows["mix, training, over compiled stock"] == [">= 1.30 x", "1.05 x", "missed"]
    assert rows["all-max, inference, over compiled stock"][-1] == "not measured"
    skipped = [{**record, "skipped": "failed"} for record in measured_case(0.8) if record["provider"] == "fused"]
    without = [record for record in measured_case(0.8) if record["provider"] != "fused"]
    assert rows_of(without + skipped)["mix, inference, over eager stock"][-1] == "not measured"


def test_targets_read_the_largest_batch_and_the_right_plan():
    found = measured_case(0.1, batch=64) + measured_case(0.8) + measured_case(0.1, plan="modulus")
    assert rows_of(found)["mix, inference, over eager stock"][1] == "5.00 x"
    found = measured_case(0.1, plan="cmod")
    assert rows_of(found)["all-cmod, inference, of the roofline"] == [">= 50%", "60%", "met"]


def test_memory_models_and_accuracy_have_targets():
    case = Case(RESNET, MIX, 256, "full")
    found = [case.record("stock", "memory", held_mib=1000.0), case.record("fused", "memory", held_mib=260.0)]
    assert rows_of(found)["mix, memory held for backward, of eager's"] == ["<= 25%", "26%", "missed"]
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


def test_the_tables_of_the_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(tables_gpu, "RECORDS", tmp_path)
    empty = [make() for make in (tables_gpu.gpu, tables_gpu.gpu_targets, tables_gpu.gpu_models)]
    assert set(empty) == {tables_gpu.NO_GPU}
    found = measured_case(0.8, plan="max") + measured_case(0.4, batch=64)
    found.append(Case(RESNET, MIX, 256, "full").record("fused", "memory", held_mib=154.0, peak_mib=300.0))
    found[-1]["machine"]["gpu"], found[-1]["code"] = "H100", found[0]["code"]
    records.write(tmp_path / "gpu.jsonl", found)
    monkeypatch.setattr(markdown.read, "__defaults__", (tmp_path,))
    assert "| max | inference | 4.000 | 2.000 | 1.000 | 0.800 | 5.00 x | 2.50 x | 1.25 x |" in tables_gpu.gpu()
    assert "resnet 64" in tables_gpu.gpu_others() and "| max |" not in tables_gpu.gpu_others()
    assert "| 154 | 300 |" in tables_gpu.gpu_memory() and "H100, driver" in tables_gpu.gpu_memory()
    assert "5.00 x" not in tables_gpu.gpu_models()


def test_tables_refuse_a_dry_run(tmp_path):
    records.write(tmp_path / "gpu.jsonl", [speed_record("fused", 1.0, dry=True)])
    with pytest.raises(ValueError, match="dry run"):
        markdown.read("gpu", tmp_path)
