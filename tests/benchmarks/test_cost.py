"""The cost measurements on small images: what is counted, timed, skipped and taken up again."""

from __future__ import annotations

import shutil
from collections import Counter

import pytest
import torch
from torch import nn

from benchmarks.cost import count as cost_count
from benchmarks.cost import run as cost
from benchmarks.cost import stem
from benchmarks.cost import times as cost_time
from benchmarks.cost.models import (
    BLUR_STEM,
    CMOD,
    ENERGY,
    NETWORKS,
    STEMS,
    TIMM_AA,
    build,
    random_images,
    variants_of,
)
from benchmarks.cost.times import Case, growth_cases, run_cases, time_cases
from benchmarks.kit import timing
from benchmarks.kit.store import NOT_RUN, Store
from benchmarks.kit.timing import Budget
from mixpool import MixPoolStem, records


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Not here: dynamo cannot trace the wrappers of conftest.py."""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """The fewest rounds, which would otherwise last for seconds."""
    monkeypatch.setattr(cost_time, "SECONDS", {"stem": 0.0, "network": 0.0})


# --- the variants -----------------------------------------------------------------------------------------------------


def mixed_stem(model: nn.Module) -> MixPoolStem | None:
    return next((module for module in model.modules() if isinstance(module, MixPoolStem)), None)


@pytest.mark.parametrize("subject, num_bank, num_cmod", [("resnet stem", 48, 24), ("alexnet stem", 32, 32)])
def test_every_stem_has_the_pooling_of_its_name(subject, num_bank, num_cmod):
    shapes = set()
    for variant in variants_of(subject):
        stem = build(subject, variant).eval()
        mixed = mixed_stem(stem)
        expected = {
            BLUR_STEM: {"blurpool": 64},
            CMOD: {"cmod": num_cmod, "max": 64 - num_cmod},
            "mixpool": {"modulus": num_bank, "blurpool": 64 - num_bank},
            ENERGY: {"energy": num_bank, "blurpool": 64 - num_bank},
        }.get(variant)
        assert (None if mixed is None else Counter(mixed.poolings)) == expected
        assert mixed is None or mixed.backend == "reference"
        shapes.add(tuple(stem(random_images(2, 64)).shape))
    assert shapes == {(2, 64, 16, 16)} if subject == "resnet stem" else shapes == {(2, 64, 7, 7)}


def test_blurs_stand_where_the_variant_says():
    def num_blurs(variant: str) -> int:
        return sum(type(module).__name__ == "BlurPool2d" for module in build("resnet18", variant).modules())

    assert [num_blurs(variant) for variant in variants_of("resnet18")] == [0, 0, 4, 0, 0, 0, 3]
    torch.testing.assert_close(
        build("resnet stem", BLUR_STEM).eval()(random_images(1, 64)),
        build("resnet stem", TIMM_AA).eval()(random_images(1, 64)),
    )


def test_what_there_is_not_is_not_built():
    assert TIMM_AA not in variants_of("alexnet") and TIMM_AA not in variants_of("alexnet stem")
    assert all("mixpool aa_layer" not in variants_of(stem) for stem in STEMS)
    for subject, variant in (("alexnet", TIMM_AA), ("vgg11", "stock"), ("resnet stem", "mixpool aa_layer")):
        with pytest.raises(ValueError, match="variant"):
            build(subject, variant)


# --- counting ---------------------------------------------------------------------------------------------------------


class Derived(nn.Module):
    """A convolution whose filters are the product of two matrices, 12 x 5 by 5 x 9, in every pass."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Parameter(torch.randn(12, 5)), nn.Parameter(torch.randn(5, 9))

    def forward(self, x):
        return nn.functional.conv2d(x, (self.left @ self.right).view(4, 3, 3, 3))


def test_flops_by_hand():
    # 5 x 5 pixels: 3 x 3 positions of 4 channels, 27 products and sums each
    assert cost_count.flops(nn.Conv2d(3, 4, 3), 5) == (2 * 27 * 4 * 9, 0)
    assert cost_count.flops(Derived(), 5) == (2 * 27 * 4 * 9, 2 * 12 * 5 * 9), "the filters' own product stands apart"


def test_flops_of_the_stems():
    def of(variant: str) -> tuple[int, int]:
        return cost_count.flops(build("resnet stem", variant), 32)  # 16 x 16 positions, 8 x 8 pooled

    conv, blur = 2 * 147 * 16**2, 2 * 9 * 8**2  # of one channel
    assert of("stock") == (64 * conv, 0)
    assert of(BLUR_STEM) == of(TIMM_AA) == (64 * (conv + blur), 0)
    assert of(CMOD)[0] == 40 * conv + 24 * 2 * conv / 4, "24 channels convolve twice, at a quarter of the positions"
    assert of("mixpool")[0] == 64 * (conv + blur) + 48 * conv, "48 channels convolve twice, and all blur"
    assert 0 < of("mixpool")[1] < 1e6, "the imaginary filters"
    assert of(ENERGY) == of("mixpool")


def test_saved_bytes_by_hand():
    x = random_images(2, 5)
    relu = 2 * 4 * 9 * 4  # 2 images, 4 channels, 3 x 3 positions, float32
    conv = nn.Conv2d(3, 4, 3)
    assert cost_count.saved_bytes(conv, x) == 0, "neither the images nor the weights"
    assert cost_count.saved_bytes(nn.Sequential(conv, nn.ReLU()), x) == relu
    pooled = nn.Sequential(conv, nn.ReLU(inplace=True), nn.MaxPool2d(3))
    assert cost_count.saved_bytes(pooled, x) == relu + 2 * 4 * 8, "its input once, and indices of 8 bytes"

    class Copying(nn.Sequential):
        def forward(self, x):
            return super().forward(x + 1)

    assert cost_count.saved_bytes(Copying(conv), x) == 2 * 3 * 25 * 4, "a copy of the images counts"


def test_counts_are_written_once(tmp_path, capsys):
    path = tmp_path / "cost.jsonl"
    options = {"subjects": ("resnet stem",), "batch": 1, "size": 32}
    cost_count.run_count(Store(path), **options)
    assert capsys.readouterr().out.count("GFLOP") == len(variants_of("resnet stem"))
    cost_count.run_count(Store(path), **options)
    assert capsys.readouterr().out == ""
    cost_count.run_count(Store(path), again=True, **options)
    found = {r["provider"]: r for r in records.read(path)}
    assert tuple(found) == variants_of("resnet stem") and len(list(records.read(path))) == len(found)
    assert {r["num_parameters"] for r in found.values()} == {64 * 147 + 128}
    assert found["stock"]["saved_bytes"] < found["mixpool"]["saved_bytes"] < found[BLUR_STEM]["saved_bytes"]


# --- cases ------------------------------------------------------------------------------------------------------------


def test_everything_asked_for_is_a_case():
    cases = time_cases()
    assert len(set(cases)) == len(cases)
    for is_compiled in (False, True):
        here = [(c.subject, c.mode, c.layout) for c in cases if c.is_compiled == is_compiled]
        modes = ("forward", "training")
        stems = {(stem, mode, layout) for stem in STEMS for mode in modes for layout in ("NCHW", "channels_last")}
        assert set(here) == stems | {(network, mode, "NCHW") for network in NETWORKS for mode in modes}
    assert [c.is_compiled for c in cases] == sorted(c.is_compiled for c in cases)
    assert {c.subject for c in cases[-4:]} == {"resnet34", "resnet50"} and all(c.is_compiled for c in cases[-4:])
    assert len(Case("cost_time", "resnet18", "forward").variants()) == 7
    assert len(Case("cost_time", "resnet18", "forward", True).variants()) == 5

    growth = growth_cases()
    assert len(set(growth)) == len(growth) == 16
    for subject in ("resnet stem", "resnet18"):
        here = [c for c in growth if c.subject == subject]
        assert {c.batch for c in here if c.size == 224} >= {1, 4, 16, 64}
        assert {c.size for c in here if c.batch == 8} == {128, 224, 320, 448}


def test_no_two_cases_share_a_record():
    names = {cost_time._what(c.record(v)) for c in time_cases() + growth_cases() for v in c.variants()}
    assert len(names) == sum(len(c.variants()) for c in time_cases() + growth_cases())


def test_rounds_fill_the_seconds(monkeypatch):
    case = Case("cost_time", "resnet stem", "forward")
    for one_ms, expected in ((10.0, 41), (500.0, 16), (60_000.0, 3), (0.0, 41)):
        monkeypatch.setattr(timing, "interleave", lambda calls, *rest, ms=one_ms: {name: [[ms]] for name in calls})
        monkeypatch.setattr(cost_time, "SECONDS", {"stem": 16.0})
        assert cost_time.num_rounds({"a": None, "b": None}, case) == expected


# --- timing -----------------------------------------------------------------------------------------------------------

TINY = Case("cost_time", "resnet stem", "forward", batch=1, size=32)


def run(path, *cases: Case, seconds: float = 1e4, **options) -> list[dict]:
    run_cases(cases or [TINY], Store(path), Budget(seconds), **options)
    return list(records.read(path))


@pytest.mark.parametrize("case", [TINY, TINY._replace(mode="training", layout="channels_last")], ids=str)
def test_all_variants_are_timed_against_stock(tmp_path, case):
    found = {r["variant"]: r for r in run(tmp_path / "cost.jsonl", case)}
    assert tuple(found) == variants_of("resnet stem")
    assert found["stock"]["ratio_to_stock"] == {"p50": 1.0, "p20": 1.0, "p80": 1.0, "n": 3}
    assert all(r["ms"]["p50"] > 0 and r["ms"]["n"] == 3 for r in found.values())
    assert {(r["mode"], r["layout"]) for r in found.values()} == {(case.mode, case.layout)}


def test_times_are_per_image(tmp_path):
    case = Case("cost_growth", "resnet18", "forward", batch=2, size=33)
    for record in run(tmp_path / "cost.jsonl", case):
        assert record["ms_per_image"] == pytest.approx(record["ms"]["p50"] / 2, rel=1e-3)
        assert record["params"] == {"N": 2, "H": 33, "W": 33} and record["subject"] == "resnet18"


@pytest.mark.slow
def test_what_is_measured_stays(tmp_path, monkeypatch):
    path = tmp_path / "cost.jsonl"
    first = run(path)
    calls = []
    timed = cost_time.timed
    monkeypatch.setattr(cost_time, "timed", lambda case: calls.append(case) or timed(case))
    assert run(path) == first and calls == []
    larger = TINY._replace(batch=2)
    assert len(run(path, TINY, larger)) == 2 * len(first) and calls == [larger]
    run(path, TINY, again=True)
    assert calls == [larger, TINY] and len(list(records.read(path))) == 2 * len(first), "replaced, not added"
    # other code, and another number of threads
    for field, changed in (("code", {"source": "old"}), ("machine", {"threads": 64})):
        found = list(records.read(path))
        records.write(path, [{**record, field: {**record[field], **changed}} for record in found])
        calls.clear()
        run(path, TINY)
        assert calls == [TINY] and len(list(records.read(path))) == len(found)


def test_without_time_a_case_waits_for_another_call(tmp_path, capsys):
    path = tmp_path / "cost.jsonl"
    found = run(path, seconds=0.0)
    assert len(found) == len(variants_of("resnet stem")) and all(r["skipped"].startswith(NOT_RUN) for r in found)
    found = run(path)
    assert len(found) == len(variants_of("resnet stem")) and not any("skipped" in r for r in found)
    old = [{**record, "code": {**record["code"], "source": "old"}} for record in found]
    records.write(path, old)
    assert run(path, seconds=0.0) == old, "a time of earlier code is not thrown away for nothing"


def test_a_variant_that_fails_leaves_its_reason(tmp_path, monkeypatch):
    def compiled(module):
        stem = mixed_stem(module)
        if stem is None:
            return module
        if stem.num_complex == 0:
            raise RuntimeError("no C++ compiler\nfound")
        return lambda x: module(x) + 0.01

    monkeypatch.setattr(cost_time, "compiled", compiled)
    found = {r["variant"]: r for r in run(tmp_path / "cost.jsonl", TINY._replace(is_compiled=True))}
    assert found[BLUR_STEM]["skipped"] == "RuntimeError: no C++ compiler"
    assert "compiled differs by 0.01" in found["mixpool"]["skipped"]
    assert found[TIMM_AA]["ratio_to_stock"]["p50"] > 0 and found["stock"]["provider"] == "stock compiled"
    assert "ms" not in found[BLUR_STEM]


def test_without_stock_there_is_no_ratio(tmp_path, monkeypatch):
    prepared = cost_time.prepared

    def without_stock(case, variant, x):
        if variant == "stock":
            raise cost_time.Unavailable("gone")
        return prepared(case, variant, x)

    monkeypatch.setattr(cost_time, "prepared", without_stock)
    found = {r["variant"]: r for r in run(tmp_path / "cost.jsonl")}
    assert found["stock"]["skipped"] == "gone"
    assert "ratio_to_stock" not in found["mixpool"] and found["mixpool"]["ms"]["p50"] > 0


def test_a_part_that_cannot_be_compiled_is_an_error():
    class Broken(nn.Module):
        def forward(self, x):
            torch._dynamo.graph_break()
            return x + 1

    with pytest.raises(Exception, match="graph_break|graph break"):
        cost_time.compiled(Broken())(torch.zeros(2))
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # inductor's own
def test_inductor_compiles_a_stem():
    if shutil.which("g++") is None:
        pytest.skip("needs g++, by which inductor compiles for a CPU")
    call = cost_time.prepared(TINY._replace(is_compiled=True), "mixpool", random_images(1, 32))
    assert call().shape == (1, 64, 8, 8)
    torch.compiler.reset()


def test_the_stem_of_its_own_session_is_timed_once(tmp_path, monkeypatch):
    monkeypatch.setattr(stem, "ROUNDS", {"forward": 1, "full": 1})
    monkeypatch.setattr(stem, "RESNET", stem.RESNET._replace(size=32))
    monkeypatch.setattr(stem, "BATCH", 1)
    monkeypatch.setattr(stem, "PROVIDERS", ("stock", "mixpool all-max"))
    monkeypatch.setattr(timing, "WARM_UP_SECONDS", 0.0)
    called, compare = [], stem.compare

    def small(layout, mode, rounds):
        called.append((layout, mode))
        return compare(layout, mode, rounds, stem.RESNET, stem.BATCH, stem.PROVIDERS)

    monkeypatch.setattr(stem, "compare", small)
    store = Store(tmp_path / "cpu.jsonl")
    stem.run_stem(store)
    assert len(called) == 4 and len(list(store)) == 4 * len(stem.PROVIDERS)
    assert {r["ratio_to_stock"]["p50"] for r in store if r["provider"] == "stock"} == {1.0}
    stem.run_stem(Store(store.path))
    assert len(called) == 4, "what is there is not measured again"
    stem.run_stem(store, again=True)
    assert len(called) == 8 and len(list(records.read(store.path))) == 4 * len(stem.PROVIDERS)


def test_passes_do_what_they_say():
    stem = build("resnet stem", "mixpool").train()
    x = random_images(2, 32)
    gradients = cost_time.training_pass(stem, stem, x)()
    assert [g.shape for g in gradients] == [p.shape for p in stem.parameters()]
    assert all(g.abs().max() > 0 for g in gradients)
    before = {name: value.clone() for name, value in stem.eval().state_dict().items()}
    out = cost_time.forward_pass(stem, x)()
    assert not out.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in stem.state_dict().items())


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_runs_the_parts_asked_for(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(cost, "run_count", lambda store, again: ran.append("count"))
    monkeypatch.setattr(cost, "run_stem", lambda store, again: ran.append((store.path.name, again)))
    monkeypatch.setattr(cost, "run_cases", lambda cases, store, budget, again: ran.append((cases[0].kind, again)))
    cost.main(["time"], path=tmp_path / "cost.jsonl")
    cost.main(path=tmp_path / "cost.jsonl", again=True)
    assert ran == [("cost_time", False), "count", ("cost_growth", True), ("cpu.jsonl", True), ("cost_time", True)]
