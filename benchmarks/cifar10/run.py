"""CIFAR-10 through `mixpool train`: networks that differ in the stem alone, how accurate and how steady they are.

    python -m benchmarks.cifar10 [TABLE ...] [--seeds 0 1 2] [--output DIR] [--processes 2]

A queue that may be cut: what has a record is left out, what was cut goes on from its last epoch, and each run that ends
adds a line to records/cifar10.jsonl. The images are those of the shared folder's JPEG copy, so accuracies lie a little
under those on the original.
"""

from __future__ import annotations

import argparse
import importlib
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks.cifar10.variants import CONFIG, MODULES, TABLES, Row, rows
from benchmarks.kit.earlier import in_present_words
from benchmarks.kit.queue import run_each
from benchmarks.kit.sample import shared_folder
from benchmarks.kit.store import RECORDS
from mixpool import records
from mixpool.conversion.checkpoint import read_checkpoint
from mixpool.evaluation.dataset import open_images
from mixpool.evaluation.evaluate import evaluate
from mixpool.evaluation.model_input import ModelInput, find_model_input
from mixpool.timm_models.loading import load_model
from mixpool.training.configuration import complete
from mixpool.training.saving import RECORD as TRAINING_RECORD
from mixpool.training.state_file import LAST
from mixpool.training.train import train

RECORD = RECORDS / "cifar10.jsonl"
KL_IMAGES = 2000  # of the 10,000: its 49 crops of each take longer than all others
SHIFTS = range(1, 5)  # pixels


def has_record(row: Row) -> bool:
    found = records.read(RECORD) if RECORD.exists() else ()
    return any(_present(r["definition"]) == row.definition() and r["recipe"] == row.recipe for r in found)


def _present(definition: Mapping[str, Any]) -> dict[str, Any]:
    """A definition, maybe of version 0.1, in the words of today."""
    return {**definition, "model_kwargs": in_present_words(definition.get("model_kwargs") or {})}


def register_networks() -> None:
    for module in MODULES:
        importlib.import_module(module)


def run(row: Row, output: Path) -> dict[str, Any]:
    """Train or go on with one network, and evaluate its last weights; the record."""
    data = output / "data" / "cifar10"
    place = {"config": str(CONFIG), "data_dir": str(data), "output": str(output), "experiment": row.name}
    place["device_modules"] = MODULES
    register_networks()
    finished = output / row.name / TRAINING_RECORD
    if finished.exists():  # maybe by an earlier version of the code, which the record names
        (trained,) = records.read(finished)
        told = _present({key: trained["settings"].get(key) for key in row.definition()})
        if told != row.definition():
            raise ValueError(f"expected a run of {row.definition()} in {finished.parent}, found one of {told}")
    else:
        trained = train(complete(place | {"device": "cpu", "workers": 1} | row.definition()))
    network, model_input = trained_network(row, output)
    common = {"model_input": model_input, "batch_size": 256, "workers": 1}
    few = evaluate(network, open_images(data, split="test", limit=KL_IMAGES), protocols=("kl",), **common)
    found = evaluate(network, open_images(data, split="test"), protocols=("accuracy", "flips", "stem"), **common)
    record = found.as_record(
        dataset="cifar10_jpeg",
        variant=row.variant,
        recipe=row.recipe,
        seed=row.seed,
        epochs=trained["epochs"],
        definition=row.definition(),
        kl=few.summary()["kl"],
        kl_ci95=few.as_record()["ci95"]["kl"],
        kl_images=few.num_images,
        training={key: trained[key] for key in ("code", "settings", "final", "history")},
    )
    return record | {"kind": "eval", "top1": record["summary"]["top1"], "flip": _flips(record["summary"])}


def trained_network(row: Row, output: Path) -> tuple[nn.Module, ModelInput]:
    """The network of a run with its last weights, and what it wants for its input."""
    checkpoint = read_checkpoint(output / row.name / LAST)
    network = load_model(row.definition()["model"], checkpoint)
    return network, find_model_input(network, checkpoint.settings)


def _flips(summary: Mapping[str, Any]) -> dict[str, float]:
    """h1 to h4, v1 to v4 and d1 to d4, percent."""
    curves = summary["flip_probability"]
    return {f"{way[0]}{k}": curve[str(k)] for way, curve in curves.items() for k in SHIFTS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"what to compare, of {', '.join(TABLES)} (main)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one run of each network per seed")
    parser.add_argument("--output", type=Path, default=Path("output/cifar10"), help="folder of the runs (%(default)s)")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, each on one core (%(default)s)")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    output = options.output.absolute()
    if not (output / "data" / "cifar10").is_dir():
        with tarfile.open(shared_folder() / "data/cifar10_jpeg.tar.xz") as archive:
            archive.extractall(output / "data", filter="data")
    if options.one:
        variant, recipe, seed = options.one
        records.append(RECORD, run(Row(variant, recipe, int(seed)), output))
        return
    queue = [row for table in options.tables or ["main"] for row in rows(table, options.seeds)]
    missing = [row for row in queue if not has_record(row)]
    print(f"{len(missing)} of {len(queue)} runs have no record yet")
    run_each("benchmarks.cifar10", missing, output, options.processes)
