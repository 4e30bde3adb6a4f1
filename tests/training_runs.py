"""A small data set and the command line of a run of three epochs on it, for the tests of `mixpool train`."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

CLASSES = ("cat", "dog", "frog", "ship")


def write_photos(folder: Path) -> Path:
    """24 training and 9 validation images of 40 pixels in four classes that differ in colour and stripes."""
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 6), ("validation", 3)):
        for label, name in enumerate(CLASSES):
            (folder / split / name).mkdir(parents=True)
            for number in range(count - (split == "validation" and label >= 1)):
                pixels = torch.rand(40, 40, 3, generator=generator) * 120
                pixels[:, :: label + 2] += 100
                Image.fromarray(pixels.byte().numpy()).save(folder / split / name / f"{number}.png")
    return folder


def arguments(photos: Path, output: Path, **settings) -> list[str]:
    """The command line of a run of three epochs of three updates."""
    settings = {
        "device_modules": "tiny_models",
        "model": "tiny_stem",
        "data_dir": photos,
        "output": output,
        "experiment": "run",
        "device": "cpu",
        "workers": 0,
        "batch_size": 8,
        "epochs": 3,
        "warmup_epochs": 0,
        "lr": 0.05,
        "log_interval": 1,
    } | settings
    found = []
    for name, value in settings.items():
        flag = "--" + name.replace("_", "-")
        if value is False:
            found.append("--no-" + flag[2:])
        else:
            found += [flag] if value is True else [flag, *map(str, value if isinstance(value, tuple) else (value,))]
    return found
