"""`evaluate` on real photos: its speed beside the plain forward, and a stock classifier beside its conversion.

    python -m benchmarks.pretrained.evaluation [--only speed|comparison]

10 and 30 minutes on 2 cores; writes records/evaluation.jsonl.

Speed (on a quiet machine): milliseconds per crop of `evaluate` (reading, decoding, cropping, measuring, all protocols
of its default) and of the model alone on one batch of the same shape that lies ready in memory, in rounds one after the
other; the ratio is that of the medians. Comparison: SqueezeNet and its conversion with 100 photos, on the other 400,
all numbers with intervals and the paired difference.
"""

from __future__ import annotations

import argparse
import statistics
import time

import timm
import torch
from torch import Tensor, nn

from benchmarks.kit.sample import CROP, shared_folder, split, squeezenet
from benchmarks.kit.store import RECORDS
from mixpool import convert, records
from mixpool.evaluation.dataset import Images, open_images
from mixpool.evaluation.evaluate import CPU_BATCH, DEFAULT, evaluate
from mixpool.evaluation.model_input import ModelInput
from mixpool.evaluation.photos import normalize
from mixpool.evaluation.result import difference_record
from mixpool.evaluation.table import table_text
from mixpool.evaluation.views import OwnView

ROUNDS = 3
INPUT = ModelInput(size=CROP, crop_ratio=CROP / 256)
# Protocols and on how many photos: enough that starting the workers does not count.
CASES = {"accuracy": (("accuracy",), 500), "default": (DEFAULT, 24)}


def photos(limit: int | None = None) -> Images:
    folder = shared_folder() / "data/imagenet_sample"
    return open_images(folder, class_map=folder / "synsets.txt", limit=limit)


def prepared(images: Images) -> Tensor:
    """The photos as the model's own evaluation crops them, normalised, (N, 3, 227, 227)."""
    view = OwnView(INPUT)
    squares = [torch.from_numpy(view(images.read(index)[0]).copy()).permute(2, 0, 1) for index in images.indices]
    return normalize(torch.stack(squares).float() / 255)


@torch.no_grad()
def plain_ms(model: nn.Module, size: int, num_batches: int = 12) -> float:
    """Milliseconds per image of the model alone."""
    x = torch.randn(CPU_BATCH, 3, size, size).contiguous(memory_format=torch.channels_last)
    model(x)
    started = time.perf_counter()
    for _ in range(num_batches):
        model(x)
    return (time.perf_counter() - started) / num_batches / CPU_BATCH * 1e3


def speed(name: str, model: nn.Module, wanted: ModelInput) -> list[dict]:
    found = []
    for case, (protocols, limit) in CASES.items():
        images = photos(limit)
        plain, ours = [], []
        for _ in range(ROUNDS):
            plain.append(plain_ms(model, wanted.size))
            result = evaluate(model, images, protocols=protocols, model_input=wanted, device="cpu")
            ours.append(1e3 / result.speed.frames_per_second)
        plain.append(plain_ms(model, wanted.size))
        ratio = statistics.median(plain) / statistics.median(ours)
        found.append(
            records.stamp(
                "evaluation_speed",
                model=name,
                case=case,
                protocols=list(protocols),
                num_images=limit,
                crops=result.speed.num_frames,
                waited_share=result.speed.waited / result.speed.seconds,
                settings=dict(result.settings),
                ms={"plain": plain, "evaluate": ours},
                ratio=ratio,
            )
        )
        print(f"{name}, {case}: {statistics.median(ours):.1f} ms per crop, {ratio:.0%} of the plain forward's speed")
    return found


def comparison() -> list[dict]:
    """Stock SqueezeNet and its conversion on the same 400 photos."""
    calibration, others = split(seed=0)
    images = photos()
    images.indices = calibration.tolist()
    stock, mixed = squeezenet(), squeezenet()
    convert(mixed, images=prepared(images))
    images.indices = others.tolist()
    protocols = [*DEFAULT, "accuracy-wcnn", "consistency-shared"]
    options = {"protocols": protocols, "model_input": INPUT, "device": "cpu"}
    first, second = (evaluate(model, images, **options) for model in (stock, mixed))
    fields = {"dataset": "imagenet_sample", "calibration_images": len(calibration)}
    name = "squeezenet1_0"
    return [
        first.as_record(model=name, **fields),
        second.as_record(
            model=f"{name} + mixpool", **fields, difference_to=name, difference=difference_record(first, second)
        ),
    ]


def speeds() -> list[dict]:
    mixed = squeezenet()
    convert(mixed)
    models = {
        "squeezenet1_0": (squeezenet(), INPUT),
        "squeezenet1_0 + mixpool": (mixed, INPUT),
        "resnet18, random weights": (timm.create_model("resnet18").eval(), ModelInput()),
    }
    return [record for name, (model, wanted) in models.items() for record in speed(name, model, wanted)]


def main() -> None:
    parts = {"speed": speeds, "comparison": comparison}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=parts, help="one part; the records of the other stay")
    only = parser.parse_known_args()[0].only
    path = RECORDS / "evaluation.jsonl"
    kinds = {"speed": "evaluation_speed", "comparison": "evaluation"}
    for part in parts if only is None else [only]:
        kept = [record for record in records.read(path) if record["kind"] != kinds[part]] if path.exists() else []
        found = parts[part]()
        if part == "comparison":
            print(table_text(found))
        records.write(path, kept + found)


if __name__ == "__main__":
    main()
