"""What mixpool costs on this CPU beside stock, a BlurPool stem and timm's `aa_layer`: ResNet-18/34/50 and AlexNet.

    python -m benchmarks.cost [--only count growth stem time]    about 30 minutes; writes records/cost.jsonl

count       parameters, FLOPs and activations saved for the backward pass (`count.py` says what is counted)
growth      the forward pass of the ResNet stem and of ResNet-18 over batch 1 to 64 and over 128 to 448 pixels
stem        the ResNet stem in batches of 16, in a session of its own (`stem.py`; records/cpu.jsonl)
time        stems (NCHW and channels_last) and whole networks (NCHW), forward and training, eager and compiled;
            batch 8, 224 x 224, float32; ratios to stock within each round

Records are written case by case, and a call goes on where the last one stopped, as long as `mixpool` is the same. Of
compiled networks five variants are timed. What does not fit into `--minutes` is recorded as not run, compiled ResNet-34
and ResNet-50 first, and left to another call. What times on a GPU are, `benchmarks.gpu` measures.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.cost.count import run_count
from benchmarks.cost.stem import run_stem
from benchmarks.cost.times import growth_cases, run_cases, time_cases
from benchmarks.kit.store import RECORDS, Store
from benchmarks.kit.timing import Budget

PARTS = ("count", "growth", "stem", "time")
MINUTES = 30.0


def main(
    parts: Sequence[str] = PARTS, minutes: float = MINUTES, path: Path = RECORDS / "cost.jsonl", again: bool = False
) -> None:
    budget = Budget(60 * minutes)
    store = Store(path)
    if "count" in parts:
        run_count(store, again=again)
    if "growth" in parts:
        run_cases(growth_cases(), store, budget, again=again)
    if "stem" in parts:
        run_stem(Store(path.with_name("cpu.jsonl")), again=again)
    if "time" in parts:
        run_cases(time_cases(), store, budget, again=again)
