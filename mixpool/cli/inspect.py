"""The command `mixpool inspect`: what a conversion would do, or what a converted model is."""

from __future__ import annotations

import argparse
import json
import math
import sys
from typing import TYPE_CHECKING, Any

import mixpool
from mixpool.cli.converting import add_shared_options, load_and_convert

if TYPE_CHECKING:
    from torch import Tensor

    from mixpool.conversion.report import ConversionReport
    from mixpool.evaluation.photos import Photos

HELP = "which channels of a model's stem would be swapped, and why"
DESCRIPTION = """Convert a model in memory and print the plan: each channel's pooling, its numbers, the reason.
With --images also how well the modulus stands in for max pooling (fid: their correlation)
and how often the converted model still says the same. Nothing is written but the plot."""
EXAMPLES = """examples:
  mixpool inspect resnet18.a1_in1k --pretrained --plot filters.png
  mixpool inspect squeezenet1_0 --checkpoint weights.safetensors --images photos/ --limit 200
  mixpool inspect torchvision/resnet18 --checkpoint stock.pth --select 0,4,10-15 --json"""


def add_options(parser: argparse.ArgumentParser) -> None:
    add_shared_options(parser)
    parser.add_argument("--plot", metavar="FILE", help="write a picture of the filter bank (.png, .pdf, .svg)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")


def run(options: argparse.Namespace) -> None:
    model, report, photos = load_and_convert(options, may_be_converted=True)
    if options.plot is not None:
        from mixpool.conversion.stock import converted_stems, stock_state_dict
        from mixpool.figures import save_figure
        from mixpool.selection.plot import plot_filter_bank

        name = next(iter(converted_stems(model)))
        weight = stock_state_dict(model)[f"{name}.weight"]  # as it was before any calibration
        plot = save_figure(plot_filter_bank(weight, report.plan), options.plot)
    if options.json:
        print(json.dumps(report_as_dict(report, options, photos), indent=2, allow_nan=False))
    else:
        print(report)
    if options.plot is not None:
        print(f"picture: {plot}", file=sys.stderr if options.json else sys.stdout)


def report_as_dict(report: ConversionReport, options: argparse.Namespace, photos: Photos | None) -> dict[str, Any]:
    """The report as plain values; what was not measured is None."""
    plan, stats, agreement = report.plan, report.plan.stats, report.agreement
    columns = {
        "center_frequency": stats.center_frequency.tolist(),
        "phase_step": stats.phase_step.tolist(),
        "orientation_degrees": (stats.orientation * (180 / math.pi)).tolist(),
        "bandwidth": stats.bandwidth.tolist(),
        "relative_bandwidth": stats.relative_bandwidth.tolist(),
        "concentration": stats.concentration.tolist(),
        "dc_share": stats.dc_share.tolist(),
        **{f"predicted_{name}": _or_none(values.flatten()) for name, values in stats.predicted._asdict().items()},
        "fidelity": [None] * len(plan.poolings) if plan.fidelity is None else _or_none(plan.fidelity),
    }
    channels = [
        {"channel": i, "pooling": pooling, "reason": reason, **{name: column[i] for name, column in columns.items()}}
        for i, (pooling, reason) in enumerate(zip(plan.poolings, plan.reasons, strict=True))
    ]
    return {
        "mixpool_version": mixpool.__version__,
        "model": options.model,
        "checkpoint": options.checkpoint,
        "pretrained": options.pretrained,
        "stem": report.stem,
        "select": options.select,
        "poolings": {name: plan.poolings.count(name) for name in sorted(set(plan.poolings))},
        "num_channels": len(plan.poolings),
        "num_complex": report.num_complex,
        "agreement": None
        if agreement is None
        else {"top1": agreement.top1, "kl": agreement.kl, "num_images": agreement.num_images},
        "images": None
        if photos is None
        else {"used": len(photos.names), "found": photos.num_found, "failed": dict(photos.failed)},
        "notes": list(report.notes),
        "channels": channels,
    }


def _or_none(values: Tensor) -> list[float | None]:
    return [None if math.isnan(value) else value for value in values.tolist()]
