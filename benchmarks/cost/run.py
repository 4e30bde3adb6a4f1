"""What mixpool costs on this CPU beside stock, a BlurPool stem and timm's `aa_layer`: ResNet-18/34/50 and AlexNet.

    python -m benchmarks.cost [--only count time growth]    about 25 minutes on 2 quiet cores; writes records/cost.jsonl

count       parameters, FLOPs and activations saved for the backward pass (`cost_count.py` says what is counted)
growth      the forward pass of the ResNet stem and of ResNet-18 over batch 1 to 64 and over 128 to 448 pixels
time        stems (NCHW and channels_last) and whole networks (NCHW), forward and training, eager and compiled;
            batch 8, 224 x 224, float32; ratios to stock within each round

Records are written case by case, and a call goes on where the last one stopped, as long as `mixpool` is the same. Of
compiled networks four variants are timed. What does not fit into `--minutes` is recorded as not run, compiled ResNet-34
and ResNet-50 first, and left to another call. What times on a GPU are, `benchmarks.gpu` measures.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.cost.count import run_count
from benchmarks.cost.times import growth_cases, run_cases, time_cases
from benchmarks.kit.store import RECORDS, Store
from benchmarks.kit.timing import Budget

PARTS = ("count", "growth", "time")
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
    if "time" in parts:
        run_cases(time_cases(), store, budget, again=again)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts (default: all)")
    parser.add_argument(
        "--minutes", type=float, default=MINUTES, help="begin no case that would end later (%(default)s)"
    )
    parser.add_argument("--output", type=Path, default=RECORDS / "cost.jsonl", help="file of records (%(default)s)")
    parser.add_argument("--again", action="store_true", help="measure also what was measured already")
    options = parser.parse_args()
    main(options.only, options.minutes, options.output, options.again)
