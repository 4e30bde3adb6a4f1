"""The command `mixpool stabilize`: a trained checkpoint in, one that is steady under small shifts out."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixpool.cli.common import existing, folder_photos, integer, progress, say, writable_file
from mixpool.cli.converting import add_model_options
from mixpool.stabilization.pictures import FEW, MARGIN, MOST
from mixpool.stabilization.repair import WHICH
from mixpool.stabilization.stabilize import DEPTHS, STEMS
from mixpool.stabilization.treat import ORDERS

if TYPE_CHECKING:
    from torch import Tensor

    from mixpool.conversion.checkpoint import Checkpoint
    from mixpool.evaluation.model_input import ModelInput
    from mixpool.stabilization.report import StabilizationReport

HELP = "make a trained network steady under small shifts, without labels or training"
DESCRIPTION = """Low-pass the layers of stride 2, refit in closed form what reads the changed maps, write the result.
Held-out photos decide, layer by layer, and others say how much steadier the network is afterwards.
The photos need no labels; 250 of the kind that the network sees do well. Seconds to minutes on a CPU."""
EXAMPLES = """examples:
  mixpool stabilize resnet50.a1_in1k --pretrained --images photos/ --output steady.safetensors
  mixpool stabilize torchvision/squeezenet1_0 --checkpoint weights.pth --images photos/ --output steady.safetensors \\
      --report steady.json --plot steady.png
  mixpool evaluate resnet50.a1_in1k resnet50.a1_in1k=steady.safetensors --pretrained --data imagenet/
in Python: model = timm.create_model("resnet50"); mixpool.load_stabilized(model, "steady.safetensors")"""


def add_options(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser, "file of the trained stock model's weights")
    images = parser.add_argument_group("images")
    images.add_argument(
        "--images", metavar="DIR", help="folder of photos, with subfolders, without labels (default: synthetic ones)"
    )
    images.add_argument(
        "--limit",
        type=integer(0),
        default=250,
        metavar="N",
        help=f"how many, evenly spread over the sorted list; 0 for all, at most {MOST} (default: %(default)s)",
    )
    images.add_argument("--size", type=integer(8), metavar="PX", help="side of the model's input (default: its own)")
    how = parser.add_argument_group("what is done")
    how.add_argument(
        "--stem",
        choices=STEMS,
        default="blurpool",
        help="pooling of the stem; max leaves it as it is (default: %(default)s)",
    )
    how.add_argument(
        "--order",
        choices=ORDERS,
        default="before",
        help="low-pass before a strided convolution or, as BlurPool does, behind its activation (default: %(default)s)",
    )
    how.add_argument(
        "--depth",
        choices=DEPTHS,
        default="auto",
        help="low-pass from the image on as deep as held-out images say it is worth, or everywhere "
        "(default: %(default)s)",
    )
    how.add_argument(
        "--repair",
        choices=(*WHICH, "none"),
        default="next",
        help="refit the layers that read a changed map, all from there on, or norm statistics alone "
        "(default: %(default)s)",
    )
    how.add_argument(
        "--fidelity",
        type=_share,
        default=0.5,
        metavar="X",
        help="from 0, the steadiest, to 1, the closest to the stock network (default: %(default)s)",
    )
    how.add_argument("--seed", type=integer(0), default=0, metavar="N", help="of splits and crops (default: 0)")
    how.add_argument("--device", metavar="NAME", help="default: cuda if there is one, else cpu")
    out = parser.add_argument_group("results")
    out.add_argument("--output", metavar="FILE", required=True, help="the *.safetensors file to write")
    out.add_argument("--report", metavar="FILE", help="also the report, as *.json")
    out.add_argument("--plot", metavar="FILE", help="also a picture of it (.png, .pdf, .svg)")
    out.add_argument("--force", action="store_true", help="overwrite these files")


def run(options: argparse.Namespace) -> None:
    """Load the model, stabilize it, write the file, and only then the report and its picture."""
    output, report_file, plot_file = _checked_files(options)

    import torch

    from mixpool.conversion.checkpoint import read_checkpoint
    from mixpool.evaluation.model_input import find_model_input
    from mixpool.evaluation.runner import usable_device
    from mixpool.stabilization.files import is_stabilized, save_stabilized
    from mixpool.stabilization.stabilize import stabilize
    from mixpool.timm_models.loading import load_model

    device = usable_device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    checkpoint = None if options.checkpoint is None else read_checkpoint(options.checkpoint)
    model = load_model(options.model, checkpoint, pretrained=options.pretrained, num_classes=options.num_classes)
    if is_stabilized(model):
        raise ValueError(f"{options.checkpoint} is a stabilized network already; give the stock one it was made from")
    if checkpoint is None and not options.pretrained:
        say("note: random weights; give --checkpoint FILE or --pretrained for trained ones")
    elif checkpoint is not None and checkpoint.is_average:
        say("note: took the moving average of the weights")
    wanted = find_model_input(model, None if checkpoint is None else checkpoint.settings)
    size = options.size or wanted.size
    report = stabilize(
        model.to(device),
        _images(options, wanted, size),
        stem=options.stem,
        order=options.order,
        depth=options.depth,
        repair=None if options.repair == "none" else options.repair,
        fidelity=options.fidelity,
        size=size,
        seed=options.seed,
        track=progress("low-passing and refitting"),
    )
    arch, settings = _origin(checkpoint, options)
    save_stabilized(model, output, arch=arch, settings=settings)
    print(report)
    print(f"\nwrote {output}")
    if report_file is not None:
        report_file.write_text(json.dumps(_record(report, options), indent=2, allow_nan=False) + "\n")
        print(f"report: {report_file}")
    if plot_file is not None:
        print(f"picture: {report.plot(plot_file)}")
    print(_how_to_use(options, output))


def _checked_files(options: argparse.Namespace) -> tuple[Path, Path | None, Path | None]:
    """The files to write; whatever can be checked in no time is checked here, before anything that takes seconds."""
    if options.checkpoint is not None and options.pretrained:
        raise ValueError("expected --pretrained or --checkpoint, got both")
    for path in (options.checkpoint, options.images):
        if path is not None:
            existing(path)
    named = (
        ("--output", options.output, (".safetensors",)),
        ("--report", options.report, (".json",)),
        ("--plot", options.plot, (".png", ".pdf", ".svg")),
    )
    return tuple(None if name is None else writable_file(name, option, ends, options) for option, name, ends in named)


def _images(options: argparse.Namespace, wanted: ModelInput, size: int) -> Tensor | None:
    """The user's photos, normalised, with the margin from which shifted crops are cut; None for synthetic pictures."""
    if options.images is None:
        say(f"note: no --images: synthetic pictures are used; {FEW} photos or more, better 250, repair better")
        return None
    from mixpool.evaluation.photos import normalize

    ratio = wanted.crop_ratio * (size + MARGIN) / size  # the crop is cut from the same part of the photo as ever
    photos = folder_photos(options.images, options.limit or MOST, size + MARGIN, ratio)
    return normalize(photos.images, wanted.mean, wanted.std)


def _origin(checkpoint: Checkpoint | None, options: argparse.Namespace) -> tuple[str, dict[str, Any] | None]:
    """The network's name, and with what it was built: as its checkpoint says, if that was taken for what it is."""
    if checkpoint is None or not checkpoint.is_of(options.model):
        return options.model, None
    if checkpoint.settings is None or options.num_classes is None:
        return checkpoint.arch, checkpoint.settings
    return checkpoint.arch, {**checkpoint.settings, "num_classes": options.num_classes}


def _record(report: StabilizationReport, options: argparse.Namespace) -> dict[str, Any]:
    given = {name: getattr(options, name) for name in ("model", "checkpoint", "pretrained", "images")}
    return report.as_record() | given


def _how_to_use(options: argparse.Namespace, output: Path) -> str:
    from mixpool.timm_models.loading import is_timm_model

    name = options.model
    bare = name.removeprefix("torchvision/")
    build = f'timm.create_model("{name}")' if is_timm_model(name) else f'torchvision.models.get_model("{bare}")'
    return (
        f'to use it: mixpool.load_stabilized({build}, "{output}");\n'
        f"mixpool evaluate {name}={output}; mixpool train --model {name} --initial-checkpoint {output}"
    )


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, got {text!r}")
    return value
