"""The parser of the command `mixpool`, put together from its commands, and `main`, which runs one of them.

What needs timm, matplotlib or rich is imported inside the commands: `--help` and errors need not wait for them.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import mixpool
from mixpool.cli import convert, demo, evaluate, inspect, stabilize, train
from mixpool.cli.common import EXIT_BROKEN_PIPE, EXIT_INTERRUPTED, EXIT_USER_ERROR, say
from mixpool.training.configuration import Parser

# Each of them has HELP, DESCRIPTION, EXAMPLES, add_options(parser) and run(options).
COMMANDS = {
    "demo": demo,
    "inspect": inspect,
    "convert": convert,
    "stabilize": stabilize,
    "evaluate": evaluate,
    "train": train,
}
MOVED = {"theory": "theory moved: python -m benchmarks.theory, in the repository"}
EXAMPLES = """examples:
  mixpool demo
  mixpool inspect resnet18.a1_in1k --pretrained --plot filters.png
  mixpool inspect squeezenet1_0 --checkpoint weights.safetensors --images photos/
  mixpool convert resnet18 --checkpoint stock.pth --output mixed.safetensors
  mixpool stabilize resnet18.a1_in1k --pretrained --images photos/ --output steady.safetensors
  mixpool evaluate resnet18.a1_in1k --pretrained --data imagenet/ --convert
  mixpool train -c configs/imagenet_resnet34_finetune.yaml --data-dir imagenet
exit codes: 0 done, 2 an error of yours in one line on stderr, 130 interrupted"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 2 for a user's error (one line on stderr), 130 for Ctrl-C."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = None
    try:
        if arguments and arguments[0] in MOVED:
            raise ValueError(MOVED[arguments[0]])
        options = build_parser().parse_args(arguments)
        options.run(options)
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt:
        say("interrupted")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader (`| head`) has gone: without this, Python complains once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except (ValueError, OSError) as error:
        if options is not None and options.traceback:
            raise
        say(f"error: {' '.join(str(error).split())}")
        return EXIT_USER_ERROR


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line; it puts the function of the command into the options as `run`."""
    common = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = Parser(
        prog="mixpool",
        description="Image classifiers that move less when the image moves: by their stem, or by all that decimates.",
        epilog=EXAMPLES,
        **common,
    )
    parser.add_argument("--version", action="version", version=f"mixpool {mixpool.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=Parser)
    for name, module in COMMANDS.items():
        command = commands.add_parser(
            name, help=module.HELP, description=module.DESCRIPTION, epilog=module.EXAMPLES, **common
        )
        module.add_options(command)
        command.add_argument("--traceback", action="store_true", help="show where an error came from")
        command.set_defaults(run=module.run)
    return parser
