"""How many flips a trained network of CIFAR-10 keeps if its stem's output goes straight from grid point to grid point.

    python -m benchmarks.cifar10.straight [RUN ...] [--output DIR]

Runs are folders of `benchmarks.cifar10`, by name (half_float32-mixpool-0); default: all finished ones of the folder
that have no record. Some minutes each on one core; adds to records/cifar10_straight.jsonl.

A shift by the stem's whole stride moves its output by one position, so there the stem has no part in what follows. In
between, its output is replaced by the mean of the outputs at both of these shifts, weighted by the distance: no
aliasing, nor any other detour, makes that way longer. The layers behind it stay as they were trained; what flips then
flips behind the stem. In a mixed stem this is also done to the max channels alone and to the modulus channels alone.
It is no bound: a diagonal mean shows the later layers every edge twice, which they have never seen.

Legend: N images, T = 25 frames (the protocol "flips": the first crop, then 8 along each of 3 directions).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn

from benchmarks.cifar10.dense_stem import TOTAL_STRIDE
from benchmarks.cifar10.run import KL_IMAGES, register_networks, trained_network
from benchmarks.cifar10.variants import RECIPES, Row
from benchmarks.kit.store import RECORDS
from mixpool import records
from mixpool.conversion.stock import converted_stems
from mixpool.evaluation.dataset import Images, open_images
from mixpool.evaluation.loader import batches
from mixpool.evaluation.metrics import bootstrap_interval
from mixpool.evaluation.model_input import ModelInput
from mixpool.evaluation.protocols import MAX_SHIFT, Flips, frames_of_directions
from mixpool.evaluation.runner import Runner, at_work
from mixpool.evaluation.shifts import DIRECTIONS
from mixpool.ops.reference import POOLINGS
from mixpool.training.saving import RECORD as TRAINING_RECORD

RECORD = RECORDS / "cifar10_straight.jsonl"
NUM_IMAGES = KL_IMAGES  # of the 10,000: up to 100 passes of each
BATCH = 250
SHIFTS = (1, 2, 4)  # pixels


def straightened(maps: Sequence[Tensor], step: int = TOTAL_STRIDE, channels: Tensor | None = None) -> list[Tensor]:
    """The maps with those between two multiples of `step` pixels replaced by the weighted mean of both.

    Args:
        maps: T maps, (N, C, H, W), in the order of the protocol's frames.
        channels: indices of the channels that are replaced; default all.
    """
    moved = list(maps)
    for frames in frames_of_directions(MAX_SHIFT):
        for shift, frame in enumerate(frames):
            before, part = shift // step * step, shift % step / step
            if part:
                straight = torch.lerp(maps[frames[before]], maps[frames[before + step]], part)
                if channels is not None:
                    straight = maps[frame].index_copy(1, channels, straight.index_select(1, channels))
                moved[frame] = straight
    return moved


def flips(network: nn.Module, wanted: ModelInput, images: Images) -> dict[str, Tensor]:
    """Name -> (N, 3, 8) flips by direction and distance, of the network as it is and with straightened maps."""
    stem = nn.Sequential(network.conv1, network.bn1, network.act1, network.maxpool)
    protocol = Flips(wanted.size)
    replaced: dict[str, Tensor | None] = {"straight": None}
    for mixed in converted_stems(network).values():
        if 0 < mixed.num_complex < mixed.out_channels:
            is_complex = torch.tensor([POOLINGS[name].is_complex for name in mixed.poolings])
            replaced |= {"max_straight": (~is_complex).nonzero()[:, 0], "modulus_straight": is_complex.nonzero()[:, 0]}
    found: dict[str, list[Tensor]] = {name: [] for name in ("real", *replaced)}

    def logits(maps: Sequence[Tensor]) -> Iterator[Tensor]:
        for out in maps:
            yield network.forward_head(network.layer4(network.layer3(network.layer2(network.layer1(out)))))

    with at_work(network, None) as where:
        runner = Runner(network, wanted, where, None, None)
        for batch in track(batches(images, [protocol.view], BATCH, 1, pin_memory=False), "crops"):
            if batch.failed:
                raise ValueError(f"cannot use {': '.join(batch.failed[0])}")
            frames = protocol.frames(batch.views[protocol.view], batch.places, seed=0)
            maps = [runner.run(stem, frame) for frame in frames]
            for name, values in found.items():
                moved = straightened(maps, channels=replaced[name]) if name in replaced else maps
                values.append(protocol.measure(logits(moved), batch.labels)["flip_probability"])
    return {name: torch.cat(values) for name, values in found.items()}


def run(row: Row, output: Path) -> dict[str, Any]:
    """The record of a finished run."""
    network, wanted = trained_network(row, output)
    found = flips(network, wanted, open_images(output / "data" / "cifar10", split="test", limit=NUM_IMAGES))
    differences = {name: values - found["real"] for name, values in found.items() if name != "real"}
    return records.stamp(
        "straight",
        dataset="cifar10_jpeg",
        variant=row.variant,
        recipe=row.recipe,
        seed=row.seed,
        definition=row.definition(),
        num_images=len(found["real"]),
        flips={name: summary(values) for name, values in found.items()},
        difference={name: summary(values) for name, values in differences.items()},
    )


def summary(values: Tensor) -> dict[str, dict[str, float]]:
    """h1, v1, d1, h2 ... -> mean over images and the ends of its 95 % interval, percent."""
    interval = bootstrap_interval(100 * values)
    return {
        f"{way[0]}{shift}": {end: float(part[direction, shift - 1]) for end, part in interval._asdict().items()}
        for shift in SHIFTS
        for direction, way in enumerate(DIRECTIONS)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="RECIPE-VARIANT-SEED (all without a record)")
    parser.add_argument("--output", type=Path, default=Path("output/cifar10"), help="folder of the runs (%(default)s)")
    options = parser.parse_args()
    output = options.output.absolute()
    finished = {row.name: row for row in map(_row_of, output.glob(f"*/{TRAINING_RECORD}")) if row is not None}
    missing = sorted(set(options.runs) - set(finished))
    if missing:
        parser.error(f"expected finished ResNets of {output} ({', '.join(finished)}), got {', '.join(missing)}")
    found = records.read(RECORD) if RECORD.exists() else ()
    known = {Row(record["variant"], record["recipe"], record["seed"]).name for record in found}
    register_networks()
    torch.set_num_threads(1)  # other runs may have the other cores
    for name in options.runs or sorted(finished):
        if name not in known:
            records.append(RECORD, run(finished[name], output))
        print(f"{name}: {'has a record' if name in known else 'recorded'}", flush=True)


def _row_of(record: Path) -> Row | None:
    """The run of a training's record; None if it is of another queue or another network than a ResNet."""
    recipe, *rest = record.parent.name.split("-")
    is_resnet = recipe in RECIPES and RECIPES[recipe].stock == "resnet18"
    return Row(rest[0], recipe, int(rest[1])) if is_resnet else None


if __name__ == "__main__":
    main()
