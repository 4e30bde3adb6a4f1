"""The tables of CIFAR-10, from records/cifar10.jsonl: a row per network, means over its seeds."""

from __future__ import annotations

from statistics import mean

from benchmarks.cifar10_variants import TABLES
from benchmarks.markdown import machine_line, read, table
from benchmarks.store import RECORDS

NOT_RUN = "Not run yet."
DIRECTIONS = {"h": "horizontal", "v": "vertical", "d": "diagonal"}
# Where the number lies in `summary`, and its interval in `ci95`.
COLUMNS = {
    "top-1 %": ("top1",),
    **{
        f"flips % {name}": ("flip_probability", DIRECTIONS[name[0]], name[1]) for name in ("h1", "v1", "d1", "h2", "h4")
    },
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
            kl = f"{mean(r['kl']['horizontal']['1'] for r in runs) * 100:.2f}"
            rows.append([variant, str(len(runs)), *(_spread(runs, path) for path in COLUMNS.values()), kl])
    if not rows:
        return NOT_RUN
    text = table(["stem", "seeds", *COLUMNS, "KL h1, 0.01 nats"], rows)
    about = f"{found[0]['epochs']} epochs, {found[0]['num_images']:,} test images (KL: {found[0]['kl_images']:,})"
    brackets = "in brackets the lowest and the highest seed; where there is one, the 95 % interval over the images"
    return f"{text}\n\n{about}; {brackets}. {machine_line(found[0])}"


def _spread(runs: list[dict], path: tuple[str, ...]) -> str:
    """The mean over seeds and their range; of one run its interval over the images."""
    values = [_at(record["summary"], path) for record in runs]
    low, high = (min(values), max(values)) if len(runs) > 1 else _at(runs[0]["ci95"], path)
    return f"{mean(values):.2f} ({low:.2f} to {high:.2f})"


def _at(values, path: tuple[str, ...]):
    for name in path:
        values = values[name]
    return values
