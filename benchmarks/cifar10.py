"""CIFAR-10 with the short recipe, through `mixpool train`: the stock network and mixpool's, and how steady they are.

    python -m benchmarks.cifar10 [--output DIR]     about 2 hours on 2 cores; continues what was cut

Writes records/training.jsonl, the runs' own records, and records/cifar10.jsonl, the evaluation of their last weights.
The images are those of the shared folder's JPEG copy, so accuracies lie a little under those on the original.
"""

from __future__ import annotations

import argparse
import tarfile
from pathlib import Path

from benchmarks.sample import RECORDS, shared_folder
from mixpool import records
from mixpool.evaluate import evaluate
from mixpool.evaluation.result import difference_record
from mixpool.evaluation.views import find_model_input
from mixpool.labelled_images import open_images
from mixpool.loading import load_model, read_checkpoint
from mixpool.train import train
from mixpool.training.checkpoint import LAST
from mixpool.training.configuration import parse
from mixpool.training.saving import RECORD

CONFIG = Path(__file__).parents[1] / "configs" / "cifar10_resnet18_30epochs.yaml"
MODELS = ("resnet18", "mixpool_resnet18")
PROTOCOLS = ("accuracy", "flips", "stem")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("output/cifar10"), help="folder of the runs (%(default)s)")
    output = parser.parse_known_args()[0].output
    data = output / "data"
    if not (data / "cifar10").is_dir():
        with tarfile.open(shared_folder() / "data/cifar10_jpeg.tar.xz") as archive:
            archive.extractall(data, filter="data")
    images = open_images(data / "cifar10", split="test")
    runs, evaluations = [], {}
    for model in MODELS:
        command = ["-c", str(CONFIG), "--data-dir", str(data / "cifar10"), "--device", "cpu", "--workers", "1"]
        record = output / model / RECORD
        if not record.exists():  # else it is finished, maybe by an earlier version of the code
            train(parse([*command, "--model", model, "--experiment", model, "--output", str(output)]))
        runs += records.read(record)
        trained = read_checkpoint(output / model / LAST)
        network = load_model(model, trained)
        wanted = find_model_input(network, trained.settings)
        evaluations[model] = evaluate(network, images, protocols=PROTOCOLS, model_input=wanted, batch_size=256)
    records.write(RECORDS / "training.jsonl", runs)
    stock, mixed = (evaluations[model] for model in MODELS)
    found = [evaluations[model].as_record(model=model, dataset="cifar10", split="test") for model in MODELS]
    found[1] |= {"difference_to": MODELS[0], "difference": difference_record(stock, mixed)}
    records.write(RECORDS / "cifar10.jsonl", found)


if __name__ == "__main__":
    main()
