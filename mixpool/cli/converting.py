"""What `inspect` and `convert` have in common: their options, and the model that is loaded and converted."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from mixpool.cli.common import existing, folder_photos, integer, say

if TYPE_CHECKING:
    from torch import nn

    from mixpool.conversion.report import ConversionReport
    from mixpool.evaluation.photos import Photos
    from mixpool.selection.stats import FilterStats


def add_model_options(parser: argparse.ArgumentParser, checkpoint: str) -> None:
    """The model and its weights; `checkpoint` is the help of that option."""
    parser.add_argument("model", metavar="MODEL", help="a timm name, torchvision/NAME, or a name only torchvision has")
    weights = parser.add_argument_group("weights (random without)")
    weights.add_argument("--pretrained", action="store_true", help="the library's trained weights, downloaded")
    weights.add_argument("--checkpoint", metavar="FILE", help=checkpoint)
    weights.add_argument("--num-classes", type=integer(1), metavar="N", help="classes of the checkpoint, if not usual")


def add_shared_options(parser: argparse.ArgumentParser) -> None:
    """The model, its weights, how it is converted, and images to measure on."""
    add_model_options(parser, "file of the stock model's weights (inspect: or of a converted one)")
    pooling = parser.add_argument_group("conversion")
    pooling.add_argument(
        "--select",
        metavar="WHICH",
        default="auto",
        help="channels to swap: auto, all, none, or numbers such as 0,4,10-15 (default: %(default)s)",
    )
    pooling.add_argument(
        "--pooling",
        choices=("modulus", "energy", "cmod"),
        default="modulus",
        help="of these channels: the mean of the modulus over the window, the root of its mean square, or the modulus "
        "at its centre (default: %(default)s)",
    )
    pooling.add_argument(
        "--rest",
        choices=("max", "blurpool"),
        default="max",
        help="of the other channels: as before, or as BlurPool (default: %(default)s)",
    )
    pooling.add_argument("--stem", metavar="NAME", help="the stem's convolution, if it is not the first")
    images = parser.add_argument_group("images")
    images.add_argument(
        "--images", metavar="DIR", help="folder of photos, with subfolders, to measure and calibrate on"
    )
    images.add_argument(
        "--limit",
        type=integer(0),
        default=100,
        metavar="N",
        help="how many, evenly spread over the sorted list; 0 for all, of which 512 are used (default: %(default)s)",
    )


def parse_select(text: str) -> str | Callable[[FilterStats], list[bool]]:
    """`auto`, `all`, `none`, or channel numbers such as `0,4,10-15`, as an argument for `convert`."""
    if text in ("auto", "all", "none"):
        return text
    channels: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or not (last.isdecimal() if dash else True):
            raise ValueError(f"expected --select auto, all, none or channel numbers such as 0,4,10-15, got {text!r}")
        if dash and int(last) < int(first):
            raise ValueError(f"expected the range {part.strip()} of --select to go upwards")
        channels.update(range(int(first), int(last if dash else first) + 1))

    def mask(stats: FilterStats) -> list[bool]:
        if max(channels, default=-1) >= len(stats):
            raise ValueError(f"expected --select to name channels 0 to {len(stats) - 1}, got {max(channels)}")
        return [channel in channels for channel in range(len(stats))]

    return mask


def load_and_convert(
    options: argparse.Namespace, *, may_be_converted: bool = False
) -> tuple[nn.Module, ConversionReport, Photos | None]:
    """The model named by the options with its weights, converted; with --images also measured and calibrated.

    One that is converted already is left as it is, if it may be.
    """
    if options.checkpoint is not None and options.pretrained:
        raise ValueError("expected --pretrained or --checkpoint, got both")
    select = parse_select(options.select)
    # What can be checked in no time is, before anything that takes seconds.
    for path in (options.checkpoint, options.images):
        if path is not None:
            existing(path)

    from mixpool.conversion.checkpoint import read_checkpoint
    from mixpool.conversion.convert import convert
    from mixpool.conversion.stock import converted_stems
    from mixpool.evaluation.model_input import find_model_input
    from mixpool.evaluation.photos import normalize
    from mixpool.stabilization.files import is_stabilized
    from mixpool.timm_models.loading import load_model

    checkpoint = None if options.checkpoint is None else read_checkpoint(options.checkpoint)
    model = load_model(options.model, checkpoint, pretrained=options.pretrained, num_classes=options.num_classes)
    if checkpoint is None and not options.pretrained:
        say("note: random weights; give --checkpoint FILE or --pretrained for trained ones")
    elif checkpoint is not None and checkpoint.is_average:
        say("note: took the moving average of the weights")
    what = options.checkpoint or options.model
    if is_stabilized(model) and not (may_be_converted and converted_stems(model)):
        raise ValueError(f"{what} is a stabilized network; give the stock one it was made from")
    if converted_stems(model):
        if not may_be_converted:
            raise ValueError(f"{what} is a converted model already; give the stock one it was made from")
        return model, _present_report(model, options), None
    photos, images = None, None
    if options.images is not None:
        wanted = find_model_input(model)
        photos = folder_photos(options.images, options.limit, wanted.size, wanted.crop_ratio)
        images = normalize(photos.images, wanted.mean, wanted.std)
    report = convert(
        model,
        select=select,
        pooling=options.pooling,
        rest=options.rest,
        images=images,
        stem=options.stem,
    )
    return model, report, photos


def _present_report(model: nn.Module, options: argparse.Namespace) -> ConversionReport:
    """What a converted model is: its plan as it is, and the numbers of its filters as they are now."""
    import torch

    from mixpool.conversion.report import ConversionReport
    from mixpool.conversion.stock import converted_stems
    from mixpool.selection.plan import ChannelPlan
    from mixpool.selection.stats import analyze

    usual = {"select": "auto", "pooling": "modulus", "rest": "max", "stem": None, "images": None}
    given = [f"--{name.replace('_', '-')}" for name, value in usual.items() if getattr(options, name) != value]
    if given:
        raise ValueError(f"the model is converted already: its plan is shown as it is, without {' and '.join(given)}")
    name, stem = next(iter(converted_stems(model).items()))
    stats, count = analyze(stem.weight.detach(), stem.stride, window=stem.window), len(stem.poolings)
    options.select = None  # for the JSON: nothing was selected here
    plan = ChannelPlan(stem.poolings, ("as the model has it",) * count, stats, torch.full((count,), math.nan))
    parts = name if stem.stock is None else " -> ".join(stem.stock.names.values())
    return ConversionReport(parts, plan, None, ())
