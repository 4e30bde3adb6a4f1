"""What the command line can be asked: its options, their help, and how they are read. `cli` does the rest."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import mixpool
from mixpool.cli import evaluate as evaluate_command
from mixpool.training.configuration import DESCRIPTION, EXAMPLES, add_options

if TYPE_CHECKING:
    from mixpool.selection.stats import FilterStats

EXIT_USER_ERROR = 2


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        """One line, as all other errors."""
        self.exit(EXIT_USER_ERROR, f"mixpool: error: {message} (see {self.prog} --help)\n")


def build_parser(run: Mapping[str, Callable[[argparse.Namespace], None]]) -> argparse.ArgumentParser:
    """The parser of the command line; `run` has the function of each command, put into the options as `run`."""
    common = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = _Parser(
        prog="mixpool",
        description="Stems of convolutional networks whose channels pool by the maximum or by the modulus.",
        epilog="examples:\n"
        "  mixpool demo\n"
        "  mixpool inspect resnet18.a1_in1k --pretrained --plot filters.png\n"
        "  mixpool inspect squeezenet1_0 --checkpoint weights.safetensors --images photos/\n"
        "  mixpool convert resnet18 --checkpoint stock.pth --output mixed.safetensors\n"
        "  mixpool theory --images photos/ --depth 2 3\n"
        "  mixpool evaluate resnet18.a1_in1k --pretrained --data imagenet/ --convert\n"
        "  mixpool train -c configs/imagenet_resnet34_finetune.yaml --data-dir imagenet\n"
        "exit codes: 0 done, 2 an error of yours in one line on stderr, 130 interrupted",
        **common,
    )
    parser.add_argument("--version", action="version", version=f"mixpool {mixpool.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=_Parser)

    demo = commands.add_parser(
        "demo",
        help="show on photos how much less a stem's output moves; needs no download",
        description="Move photos pixel by pixel under a stem with max pooling, BlurPool, plain CMod and mixpool;\n"
        "print how much its output changes, and draw one picture. About 20 seconds; needs no download.",
        epilog="examples:\n  mixpool demo\n  mixpool demo --output docs\n"
        "  mixpool demo --model resnet50.a1_in1k --pretrained",
        **common,
    )
    demo.add_argument("--output", metavar="DIR", default="outputs", help="folder for demo.png (default: %(default)s)")
    demo.add_argument("--model", metavar="NAME", help="a timm or torchvision model instead of the resnet18")
    demo.add_argument("--pretrained", action="store_true", help="with --model: its trained weights, downloaded")
    demo.set_defaults(run=run["demo"])

    shared = _shared_options()
    inspect = commands.add_parser(
        "inspect",
        parents=[shared],
        help="which channels of a model's stem would be swapped, and why",
        description="Convert a model in memory and print the plan: each channel's kind, its numbers, the reason.\n"
        "With --images also how well the modulus stands in for max pooling (fid: their correlation)\n"
        "and how often the converted model still says the same. Nothing is written but the plot.",
        epilog="examples:\n"
        "  mixpool inspect resnet18.a1_in1k --pretrained --plot filters.png\n"
        "  mixpool inspect squeezenet1_0 --checkpoint weights.safetensors --images photos/ --limit 200\n"
        "  mixpool inspect torchvision/resnet18 --checkpoint stock.pth --select 0,4,10-15 --json",
        **common,
    )
    inspect.add_argument("--plot", metavar="FILE", help="write a picture of the filter bank (.png, .pdf, .svg)")
    inspect.add_argument("--json", action="store_true", help="print JSON instead of the table")
    inspect.set_defaults(run=run["inspect"])

    convert = commands.add_parser(
        "convert",
        parents=[shared],
        help="convert a checkpoint and write it as safetensors",
        description="Load a model, convert its stem, print the report and write the converted state.\n"
        "With --images the swapped channels are calibrated on them, which you want before fine-tuning.",
        epilog="examples:\n"
        "  mixpool convert resnet18 --checkpoint stock.pth --output mixed.safetensors\n"
        "  mixpool convert resnet50.a1_in1k --pretrained --images photos/ --output mixed.safetensors",
        **common,
    )
    convert.add_argument("--output", metavar="FILE", required=True, help="the *.safetensors file to write")
    convert.add_argument("--force", action="store_true", help="overwrite the output")
    convert.set_defaults(run=run["convert"])

    theory = commands.add_parser(
        "theory",
        help="measure on photos what the theory says of both poolings; needs no download",
        description="Apply dual-tree wavelet packets to photos, pool them by the maximum and by the modulus, and move\n"
        "the photos by half a pixel to eight. Prints how well the theory's gamma orders the gaps between\n"
        "both poolings, and these the shift instability; writes theory.jsonl and four figures per depth.",
        epilog="examples:\n  mixpool theory\n  mixpool theory --images photos/ --limit 0 --depth 3 --output results",
        **common,
    )
    theory.add_argument(
        "--images", metavar="DIR", help="folder of photos, with subfolders (default: those that scikit-image ships)"
    )
    theory.add_argument(
        "--limit",
        type=_not_negative,
        default=100,
        metavar="N",
        help="how many photos, evenly spread over the sorted list; 0 for all (default: %(default)s)",
    )
    theory.add_argument(
        "--size",
        type=_positive,
        default=256,
        metavar="PX",
        help="photos are resized to this shorter side and cropped to a square (default: %(default)s)",
    )
    theory.add_argument(
        "--depth",
        type=int,
        nargs="+",
        choices=(2, 3, 4),
        default=(2, 3),
        metavar="J",
        help="depths of the packets, 2 to 4; the convolution's stride is 2^(J-1) (default: 2 3)",
    )
    theory.add_argument(
        "--wavelet", metavar="NAME", default="qshift_a", help="tap family of the packets (default: %(default)s)"
    )
    theory.add_argument("--output", metavar="DIR", default="outputs", help="folder for the results (%(default)s)")
    theory.set_defaults(run=run["theory"])

    evaluate = commands.add_parser(
        "evaluate",
        help=evaluate_command.HELP,
        description=evaluate_command.DESCRIPTION,
        epilog=evaluate_command.EXAMPLES,
        **common,
    )
    evaluate_command.add_options(evaluate)
    evaluate.set_defaults(run=run["evaluate"])

    train = commands.add_parser(
        "train",
        help="train or fine-tune a model",
        usage="mixpool train [-c FILE] [--KEY VALUE ...]",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        **common,
    )
    add_options(train)
    train.set_defaults(run=run["train"])
    for command in (demo, inspect, convert, theory, evaluate, train):
        command.add_argument("--traceback", action="store_true", help="show where an error came from")
    return parser


def _shared_options() -> argparse.ArgumentParser:
    """What `inspect` and `convert` have in common."""
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("model", metavar="MODEL", help="a timm name, torchvision/NAME, or a name only torchvision has")
    weights = shared.add_argument_group("weights (random without)")
    weights.add_argument("--pretrained", action="store_true", help="the library's trained weights, downloaded")
    weights.add_argument(
        "--checkpoint", metavar="FILE", help="file of the stock model's weights (inspect: or of a converted one)"
    )
    weights.add_argument(
        "--num-classes", type=_positive, metavar="N", help="classes of the checkpoint, if not the usual"
    )
    pooling = shared.add_argument_group("conversion")
    pooling.add_argument(
        "--select",
        metavar="WHICH",
        default="auto",
        help="channels for the modulus: auto, all, none, or numbers such as 0,4,10-15 (default: %(default)s)",
    )
    pooling.add_argument(
        "--blur", type=int, choices=(1, 3), default=3, help="3: mean of the modulus over the window; 1: its centre"
    )
    pooling.add_argument(
        "--max-blur", type=int, choices=(1, 3), default=1, help="3: the other channels pool as BlurPool; 1: as before"
    )
    pooling.add_argument(
        "--imag", choices=("tied", "free"), default="tied", help="imaginary filters follow the real ones, or are free"
    )
    pooling.add_argument("--stem", metavar="NAME", help="the stem's convolution, if it is not the first")
    images = shared.add_argument_group("images")
    images.add_argument(
        "--images", metavar="DIR", help="folder of photos, with subfolders, to measure and calibrate on"
    )
    images.add_argument(
        "--limit",
        type=_not_negative,
        default=100,
        metavar="N",
        help="how many, evenly spread over the sorted list; 0 for all, of which 512 are used (default: %(default)s)",
    )
    return shared


def _positive(text: str) -> int:
    return _integer(text, 1)


def _not_negative(text: str) -> int:
    return _integer(text, 0)


def _integer(text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"expected an integer of at least {least}, got {text!r}")
    return int(text)


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
