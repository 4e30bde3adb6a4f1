"""The command `mixpool convert`: a stock checkpoint in, a converted one out."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

import mixpool
from mixpool.cli.common import existing
from mixpool.cli.converting import add_shared_options, load_and_convert

if TYPE_CHECKING:
    from torch import nn

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
    output = Path(options.output)
    if output.suffix != ".safetensors":
        raise ValueError(f"expected --output to be named *.safetensors, got {output}")
    if output.is_dir() or not output.parent.is_dir():
        raise ValueError(f"expected --output to be a file in an existing folder, got {output}")
    if not os.access(output.parent, os.W_OK):
        raise PermissionError(f"cannot write into {output.parent}")
    if output.exists():
        if options.checkpoint is not None and output.samefile(existing(options.checkpoint)):
            raise ValueError(f"--output is the checkpoint itself: {output}")
        if not options.force:
            raise ValueError(f"{output} exists; give --force to overwrite it")
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


def write_safetensors(model: nn.Module, path: Path, metadata: dict[str, str]) -> None:
    """Write a model's state, all or nothing: into a file beside `path`, which then takes its name."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    # Clones, since tensors that share memory (tied weights) are refused.
    state = {key: value.detach().cpu().contiguous().clone() for key, value in model.state_dict().items()}
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        save_file(state, unfinished, metadata=metadata)
        os.replace(unfinished, path)
    except SafetensorError as error:  # what it makes of a full disk or a read-only folder
        raise OSError(f"cannot write {path}: {error}") from error
    finally:
        unfinished.unlink(missing_ok=True)
