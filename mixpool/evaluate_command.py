"""The command `mixpool evaluate`: its options, the models it loads, and what it prints and writes."""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixpool.evaluate import DEFAULT, NAMES

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mixpool.evaluation.protocols import ModelInput

HELP = "accuracy and steadiness under shifts of models on a labelled dataset"
DESCRIPTION = (
    "Measure models on the same images: top-1/5, Zhang's shift consistency, circular consistency, flips at 1 to 8\n"
    "pixels, KL over half-pixel shifts and the change of the stem, with 95 % intervals and paired differences to\n"
    "the first model. Writes evaluation.jsonl and figures of the curves."
)
EXAMPLES = (
    "examples:\n"
    "  mixpool evaluate resnet18.a1_in1k --pretrained --data imagenet/ --convert\n"
    "  mixpool evaluate squeezenet1_0=stock.safetensors squeezenet1_0=mixed.safetensors --data val/ \\\n"
    "      --class-map synsets.txt --limit 1000 --size 227\n"
    "  mixpool evaluate torchvision/resnet50 --checkpoint w.pth --data val.tar --protocols accuracy consistency\n"
    "  mixpool evaluate resnet50.a1_in1k --pretrained --dataset hfds/imagenet-1k --split validation --amp bfloat16\n"
    "a class folder is known by its name: without --class-map the sorted names are numbered from 0"
)
SHOWN_FAILURES = 10


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
    weights.add_argument("--checkpoint", metavar="FILE", help="stock or converted; the same as MODEL=FILE of one model")
    weights.add_argument("--num-classes", type=_integer(1), metavar="N", help="classes of the model, if not the usual")
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
    data.add_argument("--limit", type=_integer(0), default=0, metavar="N", help="images, evenly spread (default: all)")
    data.add_argument("--on-error", choices=("raise", "skip"), default="raise", help="images that cannot be read")
    how = parser.add_argument_group("measurement")
    names = f"{', '.join(NAMES)} (default: {' '.join(DEFAULT)})"
    how.add_argument("--protocols", nargs="+", choices=NAMES, default=DEFAULT, metavar="NAME", help=names)
    how.add_argument("--size", type=_integer(8), metavar="PX", help="side of the model's input, if not as it says")
    how.add_argument("--crop-ratio", type=float, metavar="R", help="crop over resized side of its accuracy")
    how.add_argument("--interpolation", choices=("bilinear", "bicubic"), help="of the resize of its accuracy")
    how.add_argument("--seed", type=_integer(0), default=0, metavar="N", help="of random shifts (default: %(default)s)")
    how.add_argument("--batch-size", type=_integer(1), metavar="N", help="default: 16 on a CPU, 256 on a GPU")
    how.add_argument("--workers", type=_integer(0), metavar="N", help="processes that load images")
    how.add_argument("--device", metavar="NAME", help="default: cuda if there is one, else cpu")
    how.add_argument("--amp", choices=("bfloat16", "float16"), help="autocast to this dtype")
    how.add_argument("--channels-last", action=argparse.BooleanOptionalAction, help="default: on a CPU and with --amp")
    out = parser.add_argument_group("results")
    out.add_argument("--output", metavar="DIR", default="outputs", help="folder for the results (%(default)s)")
    out.add_argument("--json", action="store_true", help="print the records as JSON instead of the table")


def run(options: argparse.Namespace) -> None:
    """Load the models, evaluate one after another, write after each, and print the table.

    Raises:
        ValueError, OSError: as the modules that do the work; in one line for the user.
    """
    specs = _model_specs(options)
    if options.data is None and not options.dataset:
        raise ValueError(
            "--data is missing: a folder of labelled images with one folder per class, such as ImageNet's validation "
            "set, or a .tar of one; or --dataset NAME for a dataset that timm's readers know"
        )
    if options.calibrate is not None and not options.convert:
        raise ValueError("--calibrate needs --convert")
    for path in (options.data if not options.dataset else None, options.class_map, options.calibrate):
        if path is not None and not Path(path).exists():
            raise FileNotFoundError(f"{path} does not exist")
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"cannot write into {folder}")

    import torch

    from mixpool import records
    from mixpool.evaluate import evaluate
    from mixpool.evaluation.plots import write_figures
    from mixpool.evaluation.result import difference_record
    from mixpool.evaluation.table import table_text
    from mixpool.labelled_images import open_images

    images = open_images(
        options.data or "",
        dataset=options.dataset,
        split=options.split,
        class_map=options.class_map,
        limit=options.limit or None,
    )
    # All models before any of them is measured: a name with a typing error should not be found hours later.
    models = [entry for name, file in specs for entry in _load(name, file, options)]
    if len({label for label, _, _ in models}) < len(models):  # files of one name in different folders
        models = [(f"{label} ({about['checkpoint']})", model, about) for label, model, about in models]
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    found, first = [], None
    for label, model, about in models:
        result = evaluate(
            model,
            images,
            protocols=options.protocols,
            model_input=_input_of(model, options),
            batch_size=options.batch_size,
            workers=options.workers,
            device=device,
            amp=None if options.amp is None else getattr(torch, options.amp),
            channels_last=options.channels_last,
            seed=options.seed,
            on_error=options.on_error,
            track=_progress(label),
        )
        _report_failures(result.failed)
        for note in result.notes:
            _say(f"{label}: {note}")
        _say(f"{label}: {result.num_images} images, {result.speed.frames_per_second:.1f} crops per second")
        fields: dict[str, Any] = {"model": label, **about, "dataset": images.origin, "split": options.split}
        if first is None:
            first = (label, result)
        elif first[1].settings["size"] == result.settings["size"]:
            fields |= {"difference_to": first[0], "difference": difference_record(first[1], result)}
        else:
            _say(f"{label}: no difference to {first[0]}, whose input has another size")
        found.append(result.as_record(**fields))
        records.write(folder / "evaluation.jsonl", found)
    figures = write_figures(found, folder)
    if options.json:
        print(json.dumps(found, indent=2, allow_nan=False))
    else:
        print("Means over images, in brackets 95 % intervals; * marks a difference whose interval leaves out 0\n")
        print(table_text(found))
        print(f"\nrecords: {folder / 'evaluation.jsonl'}")
        print("\n".join(f"picture: {figure}" for figure in figures))


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


def _load(name: str, file: str | None, options: argparse.Namespace) -> list[tuple[str, nn.Module, dict[str, Any]]]:
    """(label, model, fields of the record) of a model, and with --convert of its conversion."""
    from mixpool.convert import convert

    model = load_model(name, file, pretrained=options.pretrained and file is None, num_classes=options.num_classes)
    if file is None and not options.pretrained:
        _say(f"note: {name} has random weights; give {name}=FILE or --pretrained for trained ones")
    label = name if file is None else f"{name}={Path(file).name}"
    about = {"checkpoint": file, "checkpoint_sha256": None if file is None else _sha256(file), "converted": False}
    entries = [(label, model, {**about, "pretrained": options.pretrained and file is None})]
    if options.convert:
        twin = copy.deepcopy(model)
        report = convert(twin, images=_calibration_images(twin, options))
        _say("\n".join(str(report).splitlines()[:2]))
        about = entries[0][2] | {
            "converted": True,
            "num_modulus": report.num_modulus,
            "calibrated_on": options.calibrate,
        }
        entries.append((f"{label} + mixpool", twin, about))
    return entries


def load_model(
    name: str, file: str | Path | None = None, *, pretrained: bool = False, num_classes: int | None = None
) -> nn.Module:
    """A model by name with the weights of a file, of a stock model or of a converted one.

    Raises:
        ValueError: no such model, or the file does not fit it.
    """
    from mixpool.checkpoint import converted_stems
    from mixpool.convert import convert
    from mixpool.loading import create_model, load_checkpoint, read_state

    model = create_model(name, pretrained=pretrained, num_classes=num_classes)
    if file is None:
        return model
    state = read_state(file)
    stems = [key.removesuffix(".plan") for key in state if key.endswith(".plan")]
    if not stems and not converted_stems(model):
        load_checkpoint(model, file)
        return model
    try:
        if not converted_stems(model):
            for stem in stems:
                imag = "free" if f"{stem}.weight_imag" in state else "tied"
                convert(model, select="none", imag=imag, stem=stem)
        model.load_state_dict(state)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{file} does not fit {name}: {' '.join(str(error).split())[:300]}") from error
    return model.eval()


def _input_of(model: nn.Module, options: argparse.Namespace) -> ModelInput:
    import dataclasses

    from mixpool.evaluation.protocols import find_model_input

    changes = {"size": options.size, "crop_ratio": options.crop_ratio, "interpolation": options.interpolation}
    return dataclasses.replace(find_model_input(model), **{k: v for k, v in changes.items() if v is not None})


def _calibration_images(model: nn.Module, options: argparse.Namespace) -> Tensor | None:
    if options.calibrate is None:
        return None
    from mixpool.data import load_images, normalize

    wanted = _input_of(model, options)
    photos = load_images(options.calibrate, wanted.size, 100, crop_ratio=wanted.crop_ratio)
    _report_failures(photos.failed)
    return normalize(photos.images, wanted.mean, wanted.std)


def _sha256(file: str) -> str:
    import hashlib

    digest = hashlib.sha256()
    with open(file, "rb") as opened:
        while block := opened.read(2**20):
            digest.update(block)
    return digest.hexdigest()


# --- the terminal -----------------------------------------------------------------------------------------------------


def _report_failures(failed: Iterable[tuple[str, str]]) -> None:
    failed = list(failed)
    for name, reason in failed[:SHOWN_FAILURES]:
        _say(f"warning: left out {name}: {reason}")
    if failed:
        _say(f"warning: {len(failed)} image(s) left out" + ("; all are in the record" if len(failed) > 10 else ""))


def _say(text: str) -> None:
    print("\n".join(f"mixpool: {line}" for line in text.splitlines()), file=sys.stderr)


def _progress(description: str) -> Callable[[Iterable, int | None], Iterable]:
    """A progress bar on stderr; silent where that is no terminal."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)

    def wrap(steps: Iterable, total: int | None) -> Iterable:
        return track(steps, description, total, console=console, transient=True, disable=not console.is_terminal)

    return wrap


def _integer(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected an integer of at least {least}, got {text!r}")
        return int(text)

    return parse
