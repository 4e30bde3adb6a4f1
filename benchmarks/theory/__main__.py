"""The theory against the 500 photos: what `mixpool theory` measures, at depths 2 and 3.

    python -m benchmarks.theory          about 4 minutes; writes records/theory.jsonl

The same numbers come from `mixpool theory --images PHOTOS --limit 0`.
"""

from __future__ import annotations

import argparse

from rich.progress import track

from benchmarks.kit.sample import shared_folder
from benchmarks.kit.store import RECORDS
from benchmarks.theory.experiment import run_experiment
from benchmarks.theory.tables import summary_text
from mixpool import records
from mixpool.evaluation.photos import load_images
from mixpool.selection.predict import predict

SIZE = 256  # as `mixpool theory`
DEPTHS = (2, 3)


def main() -> None:
    photos = load_images(shared_folder() / "data/imagenet_sample/val", SIZE)
    found = []
    for depth in DEPTHS:
        experiment = run_experiment(
            photos.images,
            depth,
            predict=predict,
            track=lambda steps, total, depth=depth: track(steps, f"depth {depth}", total),
        )
        found.append(experiment.as_record("imagenet_sample"))
    print(summary_text(found))
    records.write(RECORDS / "theory.jsonl", found)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    main()
