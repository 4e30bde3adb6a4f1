"""Trained networks stabilized without training: flips, KL, top-1 beside stock, and what each part adds.

    python -m benchmarks.stabilize [BED ...] [--runs DIR] [--only VARIANT ...] [--images N]

Beds: squeezenet/0 squeezenet/1 (both halves of the shared photos), open_nsfw/0 (needs $MIXPOOL_OPEN_NSFW), resnet18 and
small_vgg (trained by `benchmarks.cifar10` into --runs). A queue that may be cut: what has a record is left out. Writes
records/stabilize.jsonl; about two minutes a variant on one core.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.kit.store import RECORDS
from benchmarks.stabilize.beds import Bed, cifar10, open_nsfw, squeezenet
from benchmarks.stabilize.measure import Measured
from benchmarks.stabilize.variants import COMMON, CONVERT, WITH_NORMS, Variant
from mixpool import convert, records, stabilize

RECORD = RECORDS / "stabilize.jsonl"
SEED = 1  # of the CIFAR-10 networks


def beds(runs: Path, num_images: int) -> dict[str, tuple[Callable[[], Bed], dict[str, Variant]]]:
    return {
        "squeezenet/0": (lambda: squeezenet(0), COMMON),
        "squeezenet/1": (lambda: squeezenet(1), COMMON),
        "open_nsfw/0": (lambda: open_nsfw(0), COMMON),
        "resnet18": (lambda: cifar10("half_30_float32", SEED, runs, num_images), COMMON | WITH_NORMS),
        "small_vgg": (lambda: cifar10("vgg_30_float32", SEED, runs, num_images), COMMON | WITH_NORMS),
    }


def measure(bed: Bed, variant: Variant) -> tuple[Measured, dict[str, Any]]:
    """What a variant gives, and what it took."""
    model = bed.build().to(memory_format=torch.channels_last)
    fields: dict[str, Any] = {}
    started = time.perf_counter()
    if variant == CONVERT:
        report = convert(model, images=bed.repair[:100, :, 4 : 4 + bed.size, 4 : 4 + bed.size])
        fields |= {"num_complex": report.num_complex}
    elif variant is not None:
        options = dict(variant)
        count = options.pop("images", len(bed.repair))
        images = None if count is None else bed.repair[torch.linspace(0, len(bed.repair) - 1, count).long()]
        report = stabilize(model, images, size=bed.size, **options)
        repaired = [[own.name, own.what, own.before, own.after] for own in report.repaired]
        fields |= {"plan": report.plan, "repaired": repaired, "kept_bytes": report.kept_bytes}
    seconds = time.perf_counter() - started
    return bed.judge(model), fields | {"seconds": round(seconds, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("beds", nargs="*", metavar="BED", help="default: all")
    parser.add_argument("--runs", type=Path, default=Path("output/cifar10"), help="of benchmarks.cifar10 (%(default)s)")
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="some variants")
    parser.add_argument("--images", type=int, default=10_000, help="of CIFAR-10's test set (%(default)s)")
    options = parser.parse_args()
    known = beds(options.runs.absolute(), options.images)
    for name in options.beds or known:
        build, variants = known[name]
        done = {r["variant"] for r in records.read(RECORD) if r["bed"] == name} if RECORD.exists() else set()
        wanted = [v for v in variants if v not in done and v in (options.only or variants)]
        if not wanted:
            continue
        bed = build()
        stock = measure(bed, None)
        for variant in wanted:
            found, fields = stock if variants[variant] is None else measure(bed, variants[variant])
            record = records.stamp(
                "stabilize",
                bed=name,
                variant=variant,
                definition=variants[variant],
                num_images=bed.num_images,
                means=found.means(),
                to_stock=found.ratios(stock[0]),
                **fields,
            )
            records.append(RECORD, record)
            told = ", ".join(f"{key} {value[0]:.3g}" for key, value in record["to_stock"].items())
            print(f"{name} {variant} ({fields['seconds']} s): {told}", flush=True)
