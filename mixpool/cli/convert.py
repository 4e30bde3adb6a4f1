"""The command `mixpool convert`: a stock checkpoint in, a converted one out."""

from __future__ import annotations

import argparse

import mixpool
from mixpool.cli.common import writable_file
from mixpool.cli.converting import add_shared_options, load_and_convert
from mixpool.conversion.checkpoint import write_safetensors

HELP = "convert a checkpoint and write it as safetensors"
DESCRIPTION = """Load a model, convert its stem, print the report and write the converted state.
With --images the swapped channels are calibrated on them, which you want before fine-tuning."""
EXAMPLES = """examples:
  mixpool convert resnet18 --checkpoint stock.pth --output mixed.safetensors
  mixpool convert resnet50.a1_in1k --pretrained --images photos/ --output mixed.safetensors"""


def add_options(parser: argparse.ArgumentParser) -> None:
    add_shared_options(parser)
    parser.add_argument("--output", metavar="FILE", required=True, help="the *.safetensors file to write")
    parser.add_argument("--force", action="store_true", help="overwrite the output")


def run(options: argparse.Namespace) -> None:
    output = writable_file(options.output, "--output", (".safetensors",), options)
    model, report, _ = load_and_convert(options)
    print(report)
    metadata = {
        "model": options.model,
        "pooling": options.pooling,
        "rest": options.rest,
        "select": options.select,
        "stem": options.stem or "",
        "num_complex": str(report.num_complex),
        "mixpool_version": mixpool.__version__,
    }
    write_safetensors(model, output, metadata)
    print(
        f"\nwrote {output}\n"
        "to use it: build the stock model, mixpool.convert(model"
        + (f', stem="{options.stem}"' if options.stem else "")
        + f'), model.load_state_dict(safetensors.torch.load_file("{output}"))'
    )
