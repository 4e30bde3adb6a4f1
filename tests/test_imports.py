"""What `import mixpool` gives and costs; each test with a proof that it can fail. (Who imports whom: test_house.py.)"""

from __future__ import annotations

import statistics
import subprocess
import sys

import pytest

import mixpool

# --- libraries --------------------------------------------------------------------------------------------------------

HEAVY = (
    "triton",
    "matplotlib",
    "timm",
    "torchvision",
    "skimage",
    "scipy",
    "pytorch_wavelets",
    "pywt",
    "PIL",
    "rich",
    "safetensors",
    "onnx",
    "onnxruntime",
)


def run_python(code: str) -> str:
    """What a fresh interpreter prints."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120).stdout


def heavy_modules_after(statement: str) -> set[str]:
    code = f"import torch, sys; before = set(sys.modules); {statement}; print(*(set(sys.modules) - before))"
    return {name.split(".")[0] for name in run_python(code).split()} & set(HEAVY)


def test_import_loads_no_heavy_library():
    assert heavy_modules_after("import mixpool") == set()


def test_the_test_of_heavy_libraries_can_fail():
    assert heavy_modules_after("import mixpool, safetensors, matplotlib") >= {"safetensors", "matplotlib"}


# What every user needs. Return types and filter banks are reached through their folders.
PUBLIC = {"MixPoolStem", "StemError", "analytic_partner", "analyze", "convert", "initialize", "mixpool2d", "revert"} | {
    "stock_state_dict",
    "why_not_fused",
}


def public_names() -> list[str]:
    """`mixpool.__all__`, without what is not there, as a fresh interpreter finds it."""
    return run_python(
        "import mixpool; print(*[n for n in mixpool.__all__ if callable(getattr(mixpool, n, 0))])"
    ).split()


def test_every_public_name_is_there():
    names = public_names()
    assert names == sorted(mixpool.__all__), "all of them exist and are sorted, functions and classes, no modules"
    assert PUBLIC <= set(names) and len(names) < 20
    assert len(set(names)) == len(names)


def test_the_test_of_public_names_can_fail(monkeypatch):
    monkeypatch.setattr(mixpool, "__all__", [*mixpool.__all__, "nothing"])
    assert public_names() != sorted(mixpool.__all__)


# --- time -------------------------------------------------------------------------------------------------------------


def import_time_ratio(statement: str, runs: int = 3) -> float:
    """(torch + statement) over torch, both in the same fresh interpreter; the median of several.

    In one interpreter and not in two, so that a busy machine slows both alike.
    """
    code = (
        "from time import perf_counter as now; a = now(); import torch; b = now(); "
        f"{statement}; c = now(); print((c - a) / (b - a))"
    )
    return statistics.median(float(run_python(code)) for _ in range(runs))


@pytest.mark.slow
def test_import_takes_little_more_than_torch():
    assert import_time_ratio("import mixpool") < 1.3


@pytest.mark.slow
def test_the_test_of_the_import_time_can_fail():
    assert import_time_ratio("import time; time.sleep(0.5 * (b - a))", runs=1) > 1.3
