"""The tables of CIFAR-10, from records/cifar10.jsonl: a row per network, means over its seeds."""

from __future__ import annotations

from collections.abc import Callable
from statistics import mean

from benchmarks.cifar10_variants import TABLES
from benchmarks.markdown import machine_line, read, table
from benchmarks.store import RECORDS

NOT_RUN = "Not run yet."
FLIPS = ("h1", "v1", "d1", "h2", "h4")
COLUMNS: dict[str, Callable[[dict], float]] = {
    "top-1 %": lambda record: record["top1"],
    **{f"flips % {name}": lambda record, name=name: record["flip"][name] for name in FLIPS},
    "KL h1, 0.01 nats": lambda record: record["kl"]["horizontal"]["1"] * 100,
}


def cifar10() -> str:
    return _table("main")


def cifar10_first() -> str:
    return _table("batch_128")


def cifar10_alexnet() -> str:
    return _table("alexnet")


def cifar10_screen() -> str:
    return _table("screen")


def _table(name: str) -> str:
    recipe, variants = TABLES[name]
    found = read("cifar10") if (RECORDS / "cifar10.jsonl").exists() else []
    found = [record for record in found if record["recipe"] == recipe]
    rows = []
    for variant in variants:
        runs = [record for record in found if record["variant"] == variant]
        if runs:
            rows.append([variant, str(len(runs)), *(_spread([value(r) for r in runs]) for value in COLUMNS.values())])
    if not rows:
        return NOT_RUN
    text = table(["stem", "seeds", *COLUMNS], rows)
    about = f"{found[0]['epochs']} epochs, {found[0]['num_images']:,} test images (KL: {found[0]['kl_images']:,})"
    return f"{text}\n\n{about}; mean over seeds, in brackets the lowest and the highest. {machine_line(found[0])}"


def _spread(values: list[float]) -> str:
    shown = f"{mean(values):.2f}"
    return shown if len(values) == 1 else f"{shown} ({min(values):.2f} to {max(values):.2f})"
