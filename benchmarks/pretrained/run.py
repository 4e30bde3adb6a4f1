"""Converting real trained classifiers: what each stem costs and gains at once, calibrated, and after a short training.

    python -m benchmarks.pretrained [NETWORK ...] [--splits 0 1] [--output DIR] [--processes 2]

About 3 hours per network and split on one core (2 at a time); adds to records/pretrained.jsonl. A queue that may be
cut: what has a record is left out, a training goes on from its last epoch, an evaluation that is done is kept.

Of the 500 photos (one per class) a split takes 250 for training and the other 250, of other classes, for evaluation.
Stages: "zero-shot" has seen no image (the swapped channels are calibrated on synthetic pictures, as convert() does it),
"calibrated" 100 of the training photos, and from there "distilled" learns from the stock network on random crops of all
250, without labels: those could only teach it to forget the classes that are evaluated. The stock network is distilled
from itself in the same way. Differences are to the stock network at the same stage, paired by photo.

Networks: SqueezeNet 1.0 of the shared folder; and open_nsfw, where its file is (`open_nsfw.py`). That has no
class of these photos: KL and the stem's change tell something of it, top-1 does not.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from timm.data import resolve_data_config
from torch import Tensor, nn

from benchmarks.kit.earlier import in_present_words
from benchmarks.kit.queue import run_each
from benchmarks.kit.sample import shared_folder, split
from benchmarks.kit.store import RECORDS
from benchmarks.pretrained import open_nsfw
from mixpool import analyze, convert, records
from mixpool.conversion.find import find_stem
from mixpool.conversion.stock import converted_stems
from mixpool.evaluation.dataset import open_images
from mixpool.evaluation.evaluate import evaluate
from mixpool.evaluation.result import Evaluation, Speed, difference_record
from mixpool.selection.predict import pictures_for
from mixpool.selection.rules import MAX_DC_SHARE
from mixpool.timm_models.loading import load_model
from mixpool.training.configuration import complete
from mixpool.training.data import evaluation_images
from mixpool.training.state_file import LAST, save
from mixpool.training.train import train

RECORD = RECORDS / "pretrained.jsonl"
NUM_TRAIN, CALIBRATION = 250, 100  # photos
KL_IMAGES = 50  # of the 250: its 49 crops of each take longer than all others
PROTOCOLS = ("consistency", "flips", "stem")
CLASSES = ("photo", "none")  # as which a network without ImageNet's classes is given the photos: all are the first
ZERO_SHOT, CALIBRATED, DISTILLED = "zero-shot", "calibrated", "distilled"
RECIPE: dict[str, Any] = {
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
    "scale": [0.35, 1.0],
    "val_interval": 20,
    "log_interval": 10,
}


# --- networks ---------------------------------------------------------------------------------------------------------


class Network(NamedTuple):
    """A trained classifier: its name for timm, the module that registers it, whether it has ImageNet's classes."""

    model: str
    module: str
    is_labelled: bool

    def build(self) -> nn.Module:
        """In evaluation mode, with its weights."""
        importlib.import_module(self.module)
        return timm.create_model(self.model, pretrained=True).eval()


NETWORKS = {
    "squeezenet": Network("squeezenet_sample", "benchmarks.pretrained.sample_models", is_labelled=True),
    "open_nsfw": Network("open_nsfw", "benchmarks.pretrained.open_nsfw", is_labelled=False),
}

# --- what they are converted to ---------------------------------------------------------------------------------------

AS_MIXPOOL, BAND_PASS = "as mixpool", "band-pass"
# Names -> arguments of convert(), None for the stock network. With "cmod" images would choose hardly any channel, so
# paper 2's CMod takes those that the default takes, or all whose dc share is below 0.05.
VARIANTS: dict[str, dict[str, Any] | None] = {
    "stock": None,
    "blurpool": {"select": "none", "rest": "blurpool"},
    "cmod": {"select": AS_MIXPOOL, "pooling": "cmod"},
    "cmod_band_pass": {"select": BAND_PASS, "pooling": "cmod"},
    "mixpool": {},
    "mixpool_rest_blurpool": {"rest": "blurpool"},
}


class Row(NamedTuple):
    """One run."""

    network: str
    variant: str
    split: int

    @property
    def name(self) -> str:
        return "-".join(map(str, self))

    @property
    def stages(self) -> tuple[str, ...]:
        """Calibration is of channels on the modulus alone."""
        has_modulus = self.variant not in ("stock", "blurpool")
        return (ZERO_SHOT, CALIBRATED, DISTILLED) if has_modulus else (ZERO_SHOT, DISTILLED)


def arguments_of(network: Network, variant: str, images: Tensor | None) -> dict[str, Any] | None:
    """What convert() and the key `convert` of `mixpool train` take beside the images, the channels named."""
    arguments = VARIANTS[variant]
    select = (arguments or {}).get("select")
    if select == AS_MIXPOOL:
        return arguments | {"select": list(convert(network.build(), images=images).plan.is_complex)}
    if select == BAND_PASS:
        return arguments | {"select": (analyze(_conv_of(network.build())).dc_share < MAX_DC_SHARE).tolist()}
    return arguments


def converted(network: Network, variant: str, images: Tensor | None = None) -> nn.Module:
    """The network of a variant, calibrated on images, or on the synthetic pictures that convert() takes by itself."""
    model = network.build()
    arguments = arguments_of(network, variant, images)
    if arguments is None:
        return model
    if images is None and isinstance(arguments.get("select"), list):
        conv = _conv_of(model)
        images = pictures_for(conv.weight, conv.stride)
    convert(model, images=images, **arguments)
    return model


def num_complex(model: nn.Module) -> int:
    return sum(stem.num_complex for stem in converted_stems(model).values())


def _conv_of(model: nn.Module) -> nn.Conv2d:
    found = find_stem(model)
    return found.modules[found.conv]


# --- a run ------------------------------------------------------------------------------------------------------------


def definition(row: Row) -> dict[str, Any]:
    """What is measured and how, as the record has it."""
    return {
        "network": NETWORKS[row.network].model,
        "convert": VARIANTS[row.variant],
        "recipe": RECIPE,
        "calibration_images": CALIBRATION,
        "num_train": NUM_TRAIN,
        "kl_images": KL_IMAGES,
        "protocols": list(_protocols(row)),
    }


def _protocols(row: Row) -> tuple[str, ...]:
    return ("accuracy", *PROTOCOLS) if NETWORKS[row.network].is_labelled else PROTOCOLS


def has_record(row: Row) -> bool:
    found = records.read(RECORD) if RECORD.exists() else ()
    return any(
        Row(r["network"], r["variant"], r["split"]) == row and present_definition(r) == definition(row) for r in found
    )


def present_definition(record: Mapping[str, Any]) -> dict[str, Any]:
    """What a record measured, maybe with version 0.1, in the words of today."""
    found = record["definition"]
    return found | {"convert": None if found["convert"] is None else in_present_words(found["convert"])}


def data_of(row: Row, output: Path) -> tuple[Path, Path]:
    """The folder of a split's photos, and the file of its class names."""
    folder = output / "data" / f"split{row.split}{'' if NETWORKS[row.network].is_labelled else '-unlabelled'}"
    return folder, folder / "classes.txt"


def link_photos(row: Row, output: Path) -> None:
    """Links to a split's photos, as a training and a validation folder.

    A network that does not know their classes has them all in one, named beside another that it takes for its second.
    """
    sample = shared_folder() / "data/imagenet_sample"
    folder, class_map = data_of(row, output)
    is_labelled = NETWORKS[row.network].is_labelled
    photos = sorted((sample / "val").glob("*/*.jpg"))
    for name, chosen in zip(("train", "validation"), split(row.split, NUM_TRAIN, len(photos)), strict=True):
        for photo in (photos[index] for index in chosen.tolist()):
            link = folder / name / (photo.parent.name if is_labelled else "photo") / photo.name
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.is_symlink():
                link.symlink_to(photo)
    lines = (sample / "synsets.txt").read_text().splitlines()
    class_map.write_text("\n".join([line.split()[0] for line in lines if line.strip()] if is_labelled else CLASSES))


def network_at(row: Row, stage: str, output: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The network of a run at a stage, with the record of its training, if that is over."""
    network, (folder, class_map) = NETWORKS[row.network], data_of(row, output)
    if stage == ZERO_SHOT:
        return converted(network, row.variant), {}
    photos = open_images(folder, split="train", class_map=class_map)
    config = resolve_data_config({}, model=network.build())
    images = evaluation_images(photos, config, CALIBRATION)
    if stage == CALIBRATED:
        return converted(network, row.variant, images), {}
    place = {"model": network.model, "data_dir": str(folder), "class_map": str(class_map), "seed": row.split}
    place |= {"output": str(output), "experiment": row.name}
    arguments = arguments_of(network, row.variant, images)
    if arguments is not None:
        place |= {"convert": arguments, "convert_images": CALIBRATION if CALIBRATED in row.stages else 0}
    trained = train(complete(RECIPE | place))
    return load_model(network.model, output / row.name / LAST), trained


def measured(row: Row, stage: str, output: Path) -> dict[str, Any]:
    """The evaluations of a stage, over all photos and the few of KL: from the output folder, or made and put there."""
    path, wanted = _file_of(row, stage, output), json.dumps(definition(row))
    kept = _read(path)
    if kept is not None and kept["definition"] == wanted:
        return kept
    model, trained = network_at(row, stage, output)
    folder, class_map = data_of(row, output)
    found = {}
    for name, protocols, limit in (("all", _protocols(row), None), ("kl", ("kl",), KL_IMAGES)):
        photos = open_images(folder, split="validation", class_map=class_map, limit=limit)
        found[name] = evaluate(model, photos, protocols=protocols, workers=1, device="cpu")
    kept = {"definition": wanted, "num_modulus": num_complex(model), "evaluations": found}
    kept["training"] = {key: trained[key] for key in ("code", "final", "history") if key in trained}
    path.parent.mkdir(parents=True, exist_ok=True)
    save(path, kept | {"evaluations": {name: as_plain(evaluation) for name, evaluation in found.items()}})
    print(f"{row.name}, {stage}: {_shown(found['all'].summary())}", flush=True)
    return kept


def as_plain(evaluation: Evaluation) -> dict[str, Any]:
    """An evaluation as tensors and plain values, which torch.load reads with weights_only."""
    names = [field.name for field in dataclasses.fields(evaluation) if field.init and not field.name.startswith("_")]
    plain = {name: getattr(evaluation, name) for name in names}
    return plain | {"speed": dataclasses.asdict(evaluation.speed)}


def from_plain(plain: dict[str, Any]) -> Evaluation:
    return Evaluation(**plain | {"speed": Speed(**plain["speed"])})


def _file_of(row: Row, stage: str, output: Path) -> Path:
    return output / row.name / f"{stage}.pt"


def _read(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    kept = torch.load(path, weights_only=True)
    return kept | {"evaluations": {name: from_plain(plain) for name, plain in kept["evaluations"].items()}}


def run(row: Row, output: Path) -> dict[str, Any]:
    """All stages of a network; the record. That of another than the stock network needs the stock one's run before."""
    stages, training = {}, {}
    stock = row._replace(variant="stock")
    for stage in row.stages:
        found = measured(row, stage, output)
        training |= found["training"]
        stages[stage] = {"num_modulus": found["num_modulus"]} | _summary(found["evaluations"])
        if row != stock:
            of_stock = _read(_file_of(stock, stage if stage in stock.stages else ZERO_SHOT, output))
            if of_stock is None:
                raise FileNotFoundError(f"expected the evaluations of {stock.name} in {output}: run it first")
            stages[stage]["difference"] = difference(of_stock["evaluations"], found["evaluations"])
        if stage == DISTILLED:
            start = measured(row, CALIBRATED if CALIBRATED in row.stages else ZERO_SHOT, output)
            stages[stage]["change_by_distillation"] = difference(start["evaluations"], found["evaluations"])
    evaluations = found["evaluations"]
    return records.stamp(
        "pretrained",
        **row._asdict(),
        definition=definition(row),
        num_images=evaluations["all"].num_images,
        kl_images=evaluations["kl"].num_images,
        settings=dict(evaluations["all"].settings),
        training=training,
        stages=stages,
    )


def difference(first: dict[str, Evaluation], second: dict[str, Evaluation]) -> dict[str, Any]:
    """second - first, paired by photo: summary and ci95, those of KL among them."""
    return _merged(difference_record(first[name], second[name]) for name in first)


def _summary(evaluations: dict[str, Evaluation]) -> dict[str, Any]:
    return _merged(evaluation.as_record() for evaluation in evaluations.values())


def _merged(found: Iterable[dict[str, Any]]) -> dict[str, Any]:
    found = list(found)
    return {key: {name: value for one in found for name, value in one[key].items()} for key in ("summary", "ci95")}


def _shown(summary: dict[str, Any]) -> str:
    flips = ", ".join(f"{way[0]}1 {curve['1']:.2f}" for way, curve in summary["flip_probability"].items())
    top1 = f"top-1 {summary['top1']:.2f} %, " if "top1" in summary else ""
    return f"{top1}flips % {flips}"


# --- the queue --------------------------------------------------------------------------------------------------------


def is_done(row: Row, output: Path) -> bool:
    """Whether nothing is left to do; of the stock network the others' differences need the values per photo, too."""
    files = [_file_of(row, stage, output) for stage in row.stages] if row.variant == "stock" else []
    return has_record(row) and all(file.exists() for file in files)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help=f"out of {', '.join(NETWORKS)} (all)")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS, help="(all)")
    parser.add_argument("--splits", type=int, nargs="+", default=[0, 1], help="halves of the photos, by their seeds")
    parser.add_argument("--output", type=Path, default=Path("output/pretrained"), help="folder of the runs")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, each on one core (%(default)s)")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    output = options.output.absolute()
    if options.one:
        row = Row(*options.one[:2], int(options.one[2]))
        record = run(row, output)
        if not has_record(row):
            records.append(RECORD, record)
        return
    networks = options.networks or list(NETWORKS)
    if unknown := set(networks) - set(NETWORKS):
        parser.error(f"expected networks out of {', '.join(NETWORKS)}, got {', '.join(sorted(unknown))}")
    if "open_nsfw" in networks and not open_nsfw.is_present():
        print(f"open_nsfw left out: ${open_nsfw.VARIABLE} does not name open-nsfw.onnx")
        networks.remove("open_nsfw")
    queue = [Row(n, v, s) for n in networks for s in options.splits for v in ("stock", *options.variants)]
    queue = list(dict.fromkeys(queue))
    output.mkdir(parents=True, exist_ok=True)
    for row in queue:
        link_photos(row, output)
    for is_stock in (True, False):  # the others are compared with it
        rows = [row for row in queue if (row.variant == "stock") == is_stock and not is_done(row, output)]
        run_each("benchmarks.pretrained", rows, output, options.processes)
