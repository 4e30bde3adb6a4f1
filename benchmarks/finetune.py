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
import torch
from torch import nn

import benchmarks.sample_models  # noqa: F401  registers squeezenet_sample
from benchmarks.sample import RECORDS, shared_folder, split
from mixpool import convert, records
from mixpool.evaluate import evaluate
from mixpool.evaluation.result import Evaluation, paired_difference
from mixpool.labelled_images import open_images
from mixpool.loading import read_state
from mixpool.train import train
from mixpool.training.configuration import parse

MODEL = "squeezenet_sample"
SEEDS = (0, 1)
CALIBRATION = 100
PROTOCOLS = ("accuracy", "consistency", "flips", "stem")
RECIPE = {
    "device_modules": "benchmarks.sample_models",
    "model": MODEL,
    "pretrained": True,
    "device": "cpu",
    "workers": 1,
    "batch_size": 25,
    "channels_last": True,
    "epochs": 20,
    "warmup_epochs": 1,
    "warmup_lr": 3e-5,
    "lr": 3e-4,
    "clip_grad": 1.0,
    "weight_decay": 1e-4,
    "distill": "stock",
    "task_loss_weight": 0.0,
    "smoothing": 0.0,
    "color_jitter": 0.2,
    "scale": (0.35, 1.0),
    "val_interval": 20,
    "log_interval": 10,
}


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
        arguments += [flag] if value is True else [flag, *map(str, value if isinstance(value, tuple) else (value,))]
    train(parse(arguments))
    return folder / name / "last.pth.tar"


def loaded(checkpoint: Path, converted: bool) -> nn.Module:
    model = timm.create_model(MODEL, pretrained=True)
    if converted:
        convert(model, select="none")
    model.load_state_dict(read_state(checkpoint))
    return model.eval()


def numbers(evaluation: Evaluation) -> dict:
    return {"summary": evaluation.summary(), "num_images": evaluation.num_images}


def differences(first: Evaluation, second: Evaluation) -> dict:
    """second - first in points, paired over the images, with 95 % intervals."""
    found = {}
    for name, interval in paired_difference(first, second).items():
        found[name] = {"mean": interval.mean.tolist(), "low": interval.low.tolist(), "high": interval.high.tolist()}
    return found


def main() -> None:
    results = []
    for seed in SEEDS:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            class_map = divide(folder, seed)
            photos = open_images(folder, split="validation", class_map=class_map)
            models = {"stock before": timm.create_model(MODEL, pretrained=True)}
            models["mixpool before"] = timm.create_model(MODEL, pretrained=True)
            training = open_images(folder, split="train", class_map=class_map)
            models["stock after"] = loaded(finetuned(folder, class_map, seed, False), False)
            models["mixpool after"] = loaded(finetuned(folder, class_map, seed, True), True)
            # Before training is what the run started from: the same selection, on the same photos.
            from mixpool.training.run import training_images

            options = parse(["--data-dir", str(folder), "--class-map", str(class_map)])
            from timm.data import resolve_data_config

            data_config = resolve_data_config({}, model=models["mixpool before"])
            report = convert(models["mixpool before"], images=training_images(options, data_config, CALIBRATION))
            assert len(training) == 250
            found = {key: evaluate(model, photos, protocols=PROTOCOLS) for key, model in models.items()}
        record = records.stamp(
            "finetune",
            model=MODEL,
            seed=seed,
            recipe={key: value if not isinstance(value, tuple) else list(value) for key, value in RECIPE.items()},
            channels=len(report.kinds),
            num_modulus=report.num_modulus,
            num_train=250,
            results={key: numbers(evaluation) for key, evaluation in found.items()},
            differences={
                "mixpool - stock, before": differences(found["stock before"], found["mixpool before"]),
                "mixpool - stock, after": differences(found["stock after"], found["mixpool after"]),
                "after - before, mixpool": differences(found["mixpool before"], found["mixpool after"]),
                "after - before, stock": differences(found["stock before"], found["stock after"]),
            },
        )
        results.append(record)
        for key, evaluation in found.items():
            print(key, {n: v for n, v in evaluation.summary().items() if isinstance(v, float)}, flush=True)
            print("   flips", {d: round(v["1"], 2) for d, v in evaluation.summary()["flip_probability"].items()})
        records.write(RECORDS / "finetune.jsonl", results)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
