"""The command `mixpool evaluate`: its options, the models it loads, and what it prints and writes."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import datetime
import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mixpool.cli.common import (
    add_output_folder,
    existing,
    folder_photos,
    integer,
    progress,
    say,
    say_failures,
    writable_folder,
)
from mixpool.evaluation.evaluate import DEFAULT, NAMES

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mixpool.conversion.checkpoint import Checkpoint
    from mixpool.evaluation.model_input import ModelInput

HELP = "accuracy and steadiness under shifts of models on a labelled dataset"
DESCRIPTION = (
    "Measure models on the same images: top-1/5, Zhang's shift consistency, circular consistency, flips at 1 to 8\n"
    "pixels, KL over half-pixel shifts and the change of the stem, with 95 % intervals and paired differences to\n"
    "the first model. Adds its records to evaluation.jsonl, and draws the curves; nothing is overwritten.\n"
    "\n"
    "Of a checkpoint that says how it was trained (mixpool train, timm's script) the network is built and the images\n"
    "are made as in that training, and the moving average of its weights is taken if it has one."
)
EXAMPLES = (
    "examples:\n"
    "  mixpool evaluate resnet18.a1_in1k --pretrained --data imagenet/ --convert\n"
    "  mixpool evaluate squeezenet1_0=stock.safetensors squeezenet1_0=mixed.safetensors --data val/ \\\n"
    "      --class-map synsets.txt --limit 1000 --size 227\n"
    "  mixpool evaluate resnet50.a1_in1k resnet50.a1_in1k=steady.safetensors --pretrained --data imagenet/\n"
    "  mixpool evaluate torchvision/resnet50 --checkpoint w.pth --data val.tar --protocols accuracy consistency\n"
    "  mixpool evaluate resnet50.a1_in1k --pretrained --dataset hfds/imagenet-1k --split validation --amp bfloat16\n"
    "  mixpool evaluate mixpool_resnet18=output/run/model_best.pth.tar --data cifar10/ --split test\n"
    "a class folder is known by its name: without --class-map the sorted names are numbered from 0"
)
RECORDS = "evaluation.jsonl"
CALIBRATION_IMAGES = 100


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options; nothing heavy is imported for that."""
    parser.add_argument(
        "models",
        metavar="MODEL[=FILE]",
        nargs="+",
        help="a timm name, torchvision/NAME or mixpool_NAME, its checkpoint",
    )
    weights = parser.add_argument_group("weights (random without)")
    weights.add_argument("--pretrained", action="store_true", help="the library's weights for models without a FILE")
    weights.add_argument("--checkpoint", metavar="FILE", help="stock, converted or stabilized; the same as MODEL=FILE")
    weights.add_argument(
        "--no-ema", dest="ema", action="store_false", help="not the moving average of a checkpoint that has one"
    )
    weights.add_argument("--num-classes", type=integer(1), metavar="N", help="classes of the model, if not the usual")
    weights.add_argument("--convert", action="store_true", help="also measure each model converted by mixpool")
    weights.add_argument(
        "--calibrate", metavar="DIR", help="with --convert: photos to choose and calibrate channels on"
    )
    data = parser.add_argument_group("data")
    data.add_argument("--data", metavar="DIR", help="folder with a folder per class (or per split), a .tar, or a root")
    data.add_argument(
        "--dataset", metavar="NAME", default="", help="timm's name of it: hfds/X, hfids/X, wds/X, torch/X"
    )
    data.add_argument("--split", metavar="NAME", default="validation", help="default: %(default)s, or val and the like")
    data.add_argument("--class-map", metavar="FILE", help=".txt of class folders, one per line, in the model's order")
    data.add_argument("--limit", type=integer(0), default=0, metavar="N", help="images, evenly spread (default: all)")
    data.add_argument("--on-error", choices=("raise", "skip"), default="raise", help="images that cannot be read")
    images = parser.add_argument_group(
        "images",
        "Default: as a checkpoint's training had them, else as timm's configuration of the model or torchvision's of\n"
        "its --pretrained weights says. Any other torchvision model: resized to 256, crop of 224, bilinear.",
    )
    images.add_argument("--size", type=integer(8), metavar="PX", help="side of the model's input")
    images.add_argument("--test-size", action="store_true", help="size and crop of timm's tables, where it has two")
    images.add_argument("--crop-ratio", type=float, metavar="R", help="crop over resized side of its accuracy")
    images.add_argument("--interpolation", choices=("bilinear", "bicubic"), help="of the resize of its accuracy")
    images.add_argument("--mean", type=float, nargs=3, metavar="X", help="of red, green and blue in 0 to 1")
    images.add_argument("--std", type=float, nargs=3, metavar="X", help="their standard deviations")
    how = parser.add_argument_group("measurement")
    names = f"{', '.join(NAMES)} (default: {' '.join(DEFAULT)})"
    how.add_argument("--protocols", nargs="+", choices=NAMES, default=DEFAULT, metavar="NAME", help=names)
    how.add_argument("--seed", type=integer(0), default=0, metavar="N", help="of random shifts (default: %(default)s)")
    how.add_argument("--batch-size", type=integer(1), metavar="N", help="default: 16 on a CPU, 256 on a GPU")
    how.add_argument("--workers", type=integer(0), metavar="N", help="processes that load images")
    how.add_argument("--device", metavar="NAME", help="default: cuda if there is one, else cpu")
    how.add_argument("--amp", choices=("bfloat16", "float16"), help="autocast to this dtype")
    how.add_argument("--channels-last", action=argparse.BooleanOptionalAction, help="default: on a CPU and with --amp")
    out = parser.add_argument_group("results")
    add_output_folder(out, "the results")
    out.add_argument("--json", action="store_true", help="print the records as JSON instead of the table")


def run(options: argparse.Namespace) -> None:
    """Load the models, evaluate one after another, write after each, and print the table."""
    specs = _model_specs(options)
    if options.data is None and not options.dataset:
        raise ValueError(
            "--data is missing: a folder of labelled images with one folder per class, such as ImageNet's validation "
            "set, or a .tar of one; or --dataset NAME for a dataset that timm's readers know"
        )
    if options.calibrate is not None and not options.convert:
        raise ValueError("--calibrate needs --convert")
    for path in (options.data if not options.dataset else None, options.class_map, options.calibrate):
        if path is not None:
            existing(path)
    folder = writable_folder(options.output)
    path = folder / RECORDS
    if path.is_dir() or path.exists() and not os.access(path, os.W_OK):
        raise PermissionError(f"cannot write {path}")

    import torch

    from mixpool import records
    from mixpool.evaluation.dataset import open_images
    from mixpool.evaluation.evaluate import evaluate
    from mixpool.evaluation.plots import write_figures
    from mixpool.evaluation.result import difference_record
    from mixpool.evaluation.runner import usable_device
    from mixpool.evaluation.table import table_text

    records.code()  # that of the start, whatever is edited while the models are measured
    device = usable_device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    images = open_images(
        options.data or "",
        dataset=options.dataset,
        split=options.split,
        class_map=options.class_map,
        limit=options.limit or None,
    )
    # All models before any of them is measured: a name with a typing error should not be found hours later.
    models = [entry for name, file in specs for entry in _load(name, file, options)]
    if len({entry.label for entry in models}) < len(models):  # files of one name in different folders
        models = [entry._replace(label=f"{entry.label} ({entry.about['checkpoint']})") for entry in models]
    call = f"{datetime.datetime.now(datetime.timezone.utc).isoformat(timespec='milliseconds')} {os.getpid()}"
    found, first = [], None
    for label, model, wanted, about in models:
        result = evaluate(
            model,
            images,
            protocols=options.protocols,
            model_input=wanted,
            batch_size=options.batch_size,
            workers=options.workers,
            device=device,
            amp=None if options.amp is None else getattr(torch, options.amp),
            channels_last=options.channels_last,
            seed=options.seed,
            on_error=options.on_error,
            track=progress(label),
        )
        say_failures(result.failed)
        for note in result.notes:
            say(f"{label}: {note}")
        say(f"{label}: {result.num_images} images, {result.speed.frames_per_second:.1f} crops per second")
        fields: dict[str, Any] = {"model": label, **about, "dataset": images.origin, "split": options.split}
        if first is None:
            first = (label, result)
        else:
            try:
                fields |= {"difference": difference_record(first[1], result), "difference_to": first[0]}
            except ValueError as error:  # inputs of another size; the numbers of this model are good all the same
                say(f"{label}: no difference to {first[0]}: {error}")
        found.append(result.as_record(**fields, call=call))
        records.append(path, found[-1])
    figures = write_figures(found, folder, _free_prefix(folder))
    if options.json:
        print(json.dumps(found, indent=2, allow_nan=False))
    else:
        print("Means over images, in brackets 95 % intervals; * marks a difference whose interval leaves out 0\n")
        print(table_text(found))
        print(f"\nrecords: {path}, the last {len(found)}")
        print("\n".join(f"picture: {figure}" for figure in figures))


def _free_prefix(folder: Path) -> str:
    """evaluation, evaluation-2, ...: the first under which the folder has no figure."""
    number = 1
    while True:
        prefix = "evaluation" if number == 1 else f"evaluation-{number}"
        if not any(folder.glob(f"{prefix}-[a-z]*.png")):
            return prefix
        number += 1


# --- models -----------------------------------------------------------------------------------------------------------


def _model_specs(options: argparse.Namespace) -> list[tuple[str, str | None]]:
    """(name, checkpoint or None) of each model asked for."""
    specs: list[tuple[str, str | None]] = []
    for text in options.models:
        name, _, file = text.partition("=")
        specs.append((name, file or None))
    if options.checkpoint is not None:
        if len(specs) > 1 or specs[0][1] is not None:
            raise ValueError("--checkpoint is for one model without a file; for several write MODEL=FILE")
        specs = [(specs[0][0], options.checkpoint)]
    if len(set(specs)) < len(specs):
        raise ValueError("expected different models, got one of them twice")
    for _, file in specs:
        if file is not None and not Path(file).is_file():
            raise FileNotFoundError(f"expected a checkpoint file, but {file} does not exist")
    return specs


class _Entry(NamedTuple):
    """A model to evaluate, the input it wants, and what the record says about it."""

    label: str
    model: nn.Module
    wanted: ModelInput
    about: dict[str, Any]


def _load(name: str, file: str | None, options: argparse.Namespace) -> list[_Entry]:
    """A model, and with --convert its conversion."""
    from mixpool.conversion.checkpoint import read_checkpoint
    from mixpool.conversion.convert import convert
    from mixpool.timm_models.loading import load_model

    is_pretrained = options.pretrained and file is None
    checkpoint = None if file is None else read_checkpoint(file, use_ema=options.ema)
    model = load_model(name, checkpoint, pretrained=is_pretrained, num_classes=options.num_classes)
    label = name if file is None else f"{name}={Path(file).name}"
    wanted = _input_of(model, options, checkpoint)
    _tell_what_was_taken(name, label, model, wanted, options, checkpoint)
    about = {
        "checkpoint": file,
        "checkpoint_sha256": None if file is None else _sha256(file),
        "moving_average": checkpoint is not None and checkpoint.is_average,
        "trained_as": None if checkpoint is None else checkpoint.arch,
        "pretrained": is_pretrained,
    }
    entries = [_Entry(label, model, wanted, about | _stems_of(model))]
    if options.convert:
        if checkpoint is not None and checkpoint.plan is not None:
            raise ValueError(f"--convert is for stock models, and {file} is a stabilized one")
        twin = copy.deepcopy(model)
        report = convert(twin, images=_calibration_images(wanted, options))
        say("\n".join(str(report).splitlines()[:2]))
        about = about | _stems_of(twin) | {"calibrated_on": options.calibrate}
        entries.append(_Entry(f"{label} + mixpool", twin, wanted, about))
    return entries


def _stems_of(model: nn.Module) -> dict[str, Any]:
    """Whether the model has converted stems, how many of their channels are complex; how many layers are low-passed."""
    from mixpool.conversion.stock import converted_stems
    from mixpool.stabilization.treat import treated_layers

    stems = converted_stems(model).values()
    return {
        "converted": bool(stems),
        "num_complex": sum(stem.num_complex for stem in stems),
        "num_low_passed": len(treated_layers(model)),
    }


def _tell_what_was_taken(
    name: str,
    label: str,
    model: nn.Module,
    wanted: ModelInput,
    options: argparse.Namespace,
    checkpoint: Checkpoint | None,
) -> None:
    """What was chosen without being asked for."""
    if checkpoint is None and not options.pretrained:
        say(f"note: {name} has random weights; give {name}=FILE or --pretrained for trained ones")
    if checkpoint is not None and checkpoint.is_average:
        say(f"{label}: took the moving average of the weights (--no-ema for the weights themselves)")
    elif checkpoint is not None and checkpoint.has_average:
        say(f"{label}: took the weights, not their moving average")
    if checkpoint is not None and checkpoint.plan is not None:
        say(f"{label}: stabilized, {len(checkpoint.plan)} layers with a low-pass")
    if checkpoint is not None and checkpoint.arch is not None and not checkpoint.is_of(name):
        say(f"warning: {label}: the checkpoint is of {checkpoint.arch}")
    if checkpoint is not None and checkpoint.is_of(name):
        built, arguments = checkpoint.built_as(name)
        given = ", ".join(f"{key}={value}" for key, value in arguments.items() if key != "num_classes")
        if given or built != name:
            say(f"{label}: built as in its training: {built}{' with ' if given else ''}{given}")
    about = f"{wanted.size} px, crop ratio {wanted.crop_ratio:.4g}, {wanted.interpolation}"
    if checkpoint is not None and checkpoint.settings is not None:
        mean, std = (" ".join(f"{value:.4g}" for value in values) for values in (wanted.mean, wanted.std))
        say(f"{label}: images as in its training: {about}, mean {mean}, std {std}")
    elif not hasattr(model, "pretrained_cfg") and options.size is None and options.crop_ratio is None:
        say(f"note: {name} does not say how its images have to be; taken: {about} (see --size, --crop-ratio, --mean)")


def _input_of(model: nn.Module, options: argparse.Namespace, checkpoint: Checkpoint | None) -> ModelInput:
    """As the training had its images, or as the model says, but where the options say otherwise."""
    from mixpool.evaluation.model_input import find_model_input

    settings = None if checkpoint is None else checkpoint.settings
    wanted = find_model_input(model, settings, use_test_size=options.test_size)
    changes = {
        "size": options.size,
        "crop_ratio": options.crop_ratio,
        "interpolation": options.interpolation,
        "mean": None if options.mean is None else tuple(options.mean),
        "std": None if options.std is None else tuple(options.std),
    }
    return dataclasses.replace(wanted, **{name: value for name, value in changes.items() if value is not None})


def _calibration_images(wanted: ModelInput, options: argparse.Namespace) -> Tensor | None:
    if options.calibrate is None:
        return None
    from mixpool.evaluation.photos import normalize

    photos = folder_photos(options.calibrate, CALIBRATION_IMAGES, wanted.size, wanted.crop_ratio)
    return normalize(photos.images, wanted.mean, wanted.std)


def _sha256(file: str) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as opened:
        while block := opened.read(2**20):
            digest.update(block)
    return digest.hexdigest()
