"""Fine-tuning a converted classifier, against its stock twin fine-tuned in the same way.

    python -m benchmarks.finetune       about half an hour on 2 cores; writes records/finetune.jsonl

Of the 500 photos (one per class) a split takes 250 for training and the other 250, of other classes, for evaluation.
So labels could only teach the model to forget the classes that are evaluated: it learns from a teacher, the stock
network itself (`distill: stock`, no labels), on random crops. Both networks go through `mixpool train` with the same
options; the converted one is selected and calibrated on 100 of the training photos.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import timm
from timm.data import resolve_data_config
from torch import nn

import benchmarks.sample_models  # noqa: F401  registers squeezenet_sample
from benchmarks import pretrained
from benchmarks.sample import RECORDS, shared_folder, split
from mixpool import convert, records
from mixpool.evaluate import evaluate
from mixpool.evaluation.result import difference_record
from mixpool.labelled_images import open_images
from mixpool.loading import read_state
from mixpool.train import train
from mixpool.training.configuration import parse
from mixpool.training.data import evaluation_images

MODEL = "squeezenet_sample"
SEEDS = (0, 1)
CALIBRATION = 100
PROTOCOLS = ("accuracy", "consistency", "flips", "stem")
RECIPE = pretrained.RECIPE | {"device_modules": "benchmarks.sample_models", "model": MODEL}


def divide(folder: Path, seed: int) -> Path:
    """Links to the photos of a split, as a training and a validation folder; returns the file of class names."""
    sample = shared_folder() / "data/imagenet_sample"
    photos = sorted((sample / "val").glob("*/*.jpg"))
    for name, chosen in zip(("train", "validation"), split(seed, num_calibration=250)):
        for index in chosen.tolist():
            photo = photos[index]
            (folder / name / photo.parent.name).mkdir(parents=True)
            (folder / name / photo.parent.name / photo.name).symlink_to(photo)
    names = [line.split()[0] for line in (sample / "synsets.txt").read_text().splitlines() if line.strip()]
    class_map = folder / "classes.txt"
    class_map.write_text("\n".join(names))
    return class_map


def finetuned(folder: Path, class_map: Path, seed: int, converted: bool) -> Path:
    """The checkpoint of one run."""
    name = "mixpool" if converted else "stock"
    settings = RECIPE | {"data_dir": folder, "class_map": class_map, "seed": seed, "output": folder, "experiment": name}
    arguments = ["--convert"] * converted + ["--convert-images", str(CALIBRATION)] * converted
    for key, value in settings.items():
        flag = "--" + key.replace("_", "-")
        arguments += [flag] if value is True else [flag, *map(str, value if isinstance(value, list) else (value,))]
    train(parse(arguments))
    return folder / name / "last.pth.tar"


def loaded(checkpoint: Path, converted: bool) -> nn.Module:
    model = timm.create_model(MODEL, pretrained=True)
    if converted:
        convert(model, select="none")
    model.load_state_dict(read_state(checkpoint))
    return model.eval()


def start_of(folder: Path, class_map: Path) -> tuple[nn.Module, int]:
    """The network that the converted run starts from, selected and calibrated on the same photos; its channels."""
    model = timm.create_model(MODEL, pretrained=True)
    photos = open_images(folder, split="train", class_map=class_map)
    report = convert(model, images=evaluation_images(photos, resolve_data_config({}, model=model), CALIBRATION))
    return model, report.num_modulus


def main() -> None:
    results = []
    for seed in SEEDS:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            class_map = divide(folder, seed)
            photos = open_images(folder, split="validation", class_map=class_map)
            mixed, num_modulus = start_of(folder, class_map)
            models = {
                "stock before": timm.create_model(MODEL, pretrained=True),
                "mixpool before": mixed,
                "stock after": loaded(finetuned(folder, class_map, seed, converted=False), converted=False),
                "mixpool after": loaded(finetuned(folder, class_map, seed, converted=True), converted=True),
            }
            found = {key: evaluate(model, photos, protocols=PROTOCOLS) for key, model in models.items()}
        pairs = {
            "mixpool - stock, before": ("stock before", "mixpool before"),
            "mixpool - stock, after": ("stock after", "mixpool after"),
            "after - before, stock": ("stock before", "stock after"),
            "after - before, mixpool": ("mixpool before", "mixpool after"),
        }
        record = records.stamp(
            "finetune",
            model=MODEL,
            seed=seed,
            recipe=RECIPE,
            calibration_images=CALIBRATION,
            num_modulus=num_modulus,
            num_train=250,
            num_images=len(photos),
            results={key: evaluation.summary() for key, evaluation in found.items()},
            differences={key: difference_record(found[a], found[b]) for key, (a, b) in pairs.items()},
        )
        results.append(record)
        records.write(RECORDS / "finetune.jsonl", results)
        for key, summary in record["results"].items():
            flips = {way: round(curve["1"], 2) for way, curve in summary["flip_probability"].items()}
            print(f"{key}: top-1 {summary['top1']:.2f}, consistency {summary['shift_consistency']:.2f}, flips {flips}")


if __name__ == "__main__":
    main()
