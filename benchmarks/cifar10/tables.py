"""The tables of CIFAR-10, from records/cifar10.jsonl: a row per network, means over its seeds."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

from benchmarks.cifar10.variants import MAIN, TABLES
from benchmarks.kit.markdown import origins, read, table
from benchmarks.kit.store import RECORDS

# The tables, by the names that pages call them.
__all__ = [
    "cifar10",
    "cifar10_float32",
    "cifar10_30_float32",
    "cifar10_later",
    "cifar10_bound",
    "cifar10_straight",
    "cifar10_designs",
    "cifar10_designs_float32",
    "cifar10_full",
    "cifar10_alexnet",
    "cifar10_first",
    "cifar10_short",
]

NOT_RUN = "Not run yet."
BRACKETS = "in brackets the lowest and the highest seed; with one seed, the 95 % interval over the images"
DIRECTIONS = {"h": "horizontal", "v": "vertical", "d": "diagonal"}
FLIPS = {f"{way}{shift}": ("flip_probability", DIRECTIONS[way], shift) for way, shift in ("h1", "v1", "d1", "h2", "h4")}
BASELINES = {"stock": "stock", "blurpool": "BlurPool"}
# What straight.py replaces, in words.
STRAIGHT = {
    "real": "nothing",
    "straight": "the stem",
    "max_straight": "its max channels",
    "modulus_straight": "its modulus channels",
}
# The recipes of the first table: both of the same epochs.
ARITHMETIC = {"half": "bfloat16", "half_float32": "float32"}
# Its networks, in words.
NAMES = {
    "stock": "stock: max pooling",
    "blurpool": "BlurPool",
    "cmod": "CMod (Leterme et al.), 24 wavelets that train",
    "mixpool": "`mixpool_resnet18`: 48 wavelets on the modulus, 16 as BlurPool",
}


def cifar10() -> str:
    return _with_outcome("main")


def cifar10_float32() -> str:
    return _with_outcome("main_float32")


def cifar10_30_float32() -> str:
    return _with_outcome("main_30_float32")


def cifar10_later() -> str:
    return _table("later")


def cifar10_bound() -> str:
    """Stems that cost any price, beside those that they bound."""
    return _table("bound", before=("stock", "stock_aa", "mixpool", "mixpool_aa"))


def cifar10_straight() -> str:
    """What is left of the flips where the stem's output, or some of its channels, goes straight between grid points."""
    if not (RECORDS / "cifar10_straight.jsonl").exists():
        return NOT_RUN
    found = read("cifar10_straight")
    names = [name for name in FLIPS if name != "h4"]
    rows = []
    for record in found:
        about = [record["variant"], record["recipe"], str(record["seed"])]
        for straight, label in STRAIGHT.items():
            if straight in record["flips"]:
                cells = [_changed(record, straight, name) for name in names]
                rows.append([*(about if straight == "real" else ["", "", ""]), label, *cells])
    header = ["stem", "recipe", "seed", "what goes straight", *(f"flips % {name}" for name in names)]
    count = found[0]["num_images"]
    about = f"{count:,} test images; in brackets the change and its 95 % interval, paired by image"
    return f"{table(header, rows)}\n\n{about}. {origins(found, 'python -m benchmarks.cifar10.straight')}"


def _changed(record: dict, straight: str, name: str) -> str:
    value = f"{record['flips'][straight][name]['mean']:.2f}"
    if straight == "real":
        return value
    low, mean, high = (record["difference"][straight][name][end] for end in ("low", "mean", "high"))
    return f"{value} ({mean:+.2f}, {low:+.2f} to {high:+.2f})"


def cifar10_designs() -> str:
    return _table("designs", before=("mixpool",))


def cifar10_designs_float32() -> str:
    return _table("designs_float32", before=("stock", "mixpool"))


def cifar10_full() -> str:
    return _with_outcome("full")


def cifar10_alexnet() -> str:
    return _with_outcome("alexnet")


def cifar10_first() -> str:
    return _table("batch_128")


def cifar10_short() -> str:
    """The main networks in few columns, for the first screen."""
    columns = {
        "top-1 %": ("top1",),
        **{f"flips % {DIRECTIONS[name[0]]}": path for name, path in FLIPS.items() if name[1] == "1"},
    }
    rows, everything = [], []
    for recipe, arithmetic in ARITHMETIC.items():
        for name, found in _runs(recipe, MAIN).items():
            everything += found
            cells = [_spread(found, path) for path in columns.values()]
            rows.append([NAMES[name], f"{arithmetic}, {len(found)}", *cells])
    if not rows:
        return NOT_RUN
    first = everything[0]
    about = (
        f"ResNet-18 with half the channels behind the stem, CIFAR-10 (JPEG), {first['epochs']} epochs, "
        f"{first['num_images']:,} test images; {BRACKETS}. {origins(everything, 'python -m benchmarks.cifar10')}"
    )
    return f"{table(['stem', 'training in, seeds', *columns], rows)}\n\n{about}"


def _table(name: str, before: Sequence[str] = ()) -> str:
    """A row per network with a record; of a narrow table also rows of others, for comparison."""
    recipe, variants = TABLES[name]
    runs = _runs(recipe, (*before, *variants))
    if not any(variant in runs for variant in variants):
        return NOT_RUN
    columns = {"top-1 %": ("top1",), **{f"flips % {name}": path for name, path in FLIPS.items()}}
    rows = []
    for variant, found in runs.items():
        bound = f"{mean(_at(r['summary'], FLIPS['h4']) for r in found) / 4:.2f}"
        cells = [*(_spread(found, path) for path in columns.values()), bound, _kl_spread(found)]
        rows.append([variant, str(len(found)), *cells])
    first = next(iter(runs.values()))[0]
    everything = [record for found in runs.values() for record in found]
    about = f"{first['epochs']} epochs, {first['num_images']:,} test images (KL: {first['kl_images']:,})"
    header = ["stem", "seeds", *columns, "h4 / 4", "KL h1, 0.01 nats"]
    return (
        f"{table(header, rows)}\n\n{about}; {BRACKETS}. {origins(everything, f'python -m benchmarks.cifar10 {name}')}"
    )


def _with_outcome(name: str) -> str:
    """The table, and in words how mixpool's default compares with stock and BlurPool."""
    runs = _runs(TABLES[name][0], MAIN)
    if not {"mixpool", *BASELINES} <= runs.keys():
        return _table(name)
    sentences = [f"against {label} {outcome(runs['mixpool'], runs[other])}" for other, label in BASELINES.items()]
    return f"{_table(name)}\n\nThe default's means over the seeds: {'; '.join(sentences)}."


def outcome(ours: list[dict], theirs: list[dict]) -> str:
    """How the means over seeds of one network compare with those of another, in words."""

    def means(runs: list[dict], path: tuple[str, ...]) -> float:
        return mean(_at(record["summary"], path) for record in runs)

    top1 = means(ours, ("top1",)) - means(theirs, ("top1",))
    curves = theirs[0]["summary"]["flip_probability"]
    paths = [("flip_probability", way, shift) for way, curve in curves.items() for shift in curve]
    ratios = {path: means(ours, path) / means(theirs, path) for path in paths}
    fewer = sum(ratio < 1 for ratio in ratios.values())
    shown = ", ".join(f"{100 * (ratios[FLIPS[f'{way}1']] - 1):+.0f} %" for way in DIRECTIONS)
    farthest = max(int(shift) for _, _, shift in paths)
    return (
        f"top-1 {top1:+.2f}, flips at 1 px {shown} (h, v, d), fewer flips in {fewer} of the {len(paths)} directions "
        f"and shifts (1 to {farthest} px)"
    )


def _runs(recipe: str, variants: Sequence[str]) -> dict[str, list[dict]]:
    """Variant -> records of its seeds, of those that have some, in the order of `variants`."""
    found = read("cifar10") if (RECORDS / "cifar10.jsonl").exists() else []
    runs = {variant: [r for r in found if (r["recipe"], r["variant"]) == (recipe, variant)] for variant in variants}
    return {variant: records for variant, records in runs.items() if records}


def _spread(runs: list[dict], path: tuple[str, ...]) -> str:
    """The mean over seeds and their range; of one run its interval over the images."""
    values = [_at(record["summary"], path) for record in runs]
    low, high = (min(values), max(values)) if len(runs) > 1 else _at(runs[0]["ci95"], path)
    return f"{mean(values):.2f} ({low:.2f} to {high:.2f})"


def _kl_spread(runs: list[dict]) -> str:
    """The same of KL at 1 px, horizontally, in 0.01 nats; records before 2026-11-28 have no interval of it."""
    values = [100 * record["kl"]["horizontal"]["1"] for record in runs]
    if len(runs) > 1:
        low, high = min(values), max(values)
    elif "kl_ci95" in runs[0]:
        low, high = (100 * end for end in runs[0]["kl_ci95"]["horizontal"]["1"])
    else:
        return f"{values[0]:.2f}"
    return f"{mean(values):.2f} ({low:.2f} to {high:.2f})"


def _at(values, path: tuple[str, ...]):
    for name in path:
        values = values[name]
    return values
