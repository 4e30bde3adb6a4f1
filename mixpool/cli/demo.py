"""The command `mixpool demo`: a stem on photos, and where there is a trained classifier, that one stabilized."""

from __future__ import annotations

import argparse
import copy
from typing import TYPE_CHECKING

from mixpool.cli.common import add_output_folder, existing, integer, progress, writable_folder

if TYPE_CHECKING:
    from torch import nn

    from mixpool.evaluation.model_input import ModelInput

MEASURED = ("flips_1px", "movement_1px")
HELP = "show on photos how much less a stem's output moves; needs no download"
DESCRIPTION = """Move photos pixel by pixel under a stem with max pooling, BlurPool, plain CMod and mixpool;
print how much its output changes, and draw one picture. About 20 seconds; needs no download.
With a trained classifier (--model with --checkpoint or --pretrained) also its flips before and after `stabilize`."""
EXAMPLES = """examples:
  mixpool demo
  mixpool demo --output docs
  mixpool demo --model resnet50.a1_in1k --pretrained
  mixpool demo --model torchvision/squeezenet1_0 --checkpoint weights.safetensors"""


def add_options(parser: argparse.ArgumentParser) -> None:
    add_output_folder(parser, "demo.png")
    parser.add_argument("--model", metavar="NAME", help="a timm or torchvision model instead of the resnet18")
    parser.add_argument("--pretrained", action="store_true", help="with --model: its trained weights, downloaded")
    parser.add_argument("--checkpoint", metavar="FILE", help="with --model: a file of its trained weights")
    parser.add_argument("--num-classes", type=integer(1), metavar="N", help="classes of the checkpoint, if not usual")


def run(options: argparse.Namespace) -> None:
    for name in ("pretrained", "checkpoint"):
        if getattr(options, name) and options.model is None:
            raise ValueError(
                f"--{name} needs --model NAME: the demo's own model holds a filter bank, not trained weights"
            )
    if options.pretrained and options.checkpoint is not None:
        raise ValueError("expected --pretrained or --checkpoint, got both")
    if options.checkpoint is not None:
        existing(options.checkpoint)
    folder = writable_folder(options.output)

    from mixpool.conversion.checkpoint import read_checkpoint
    from mixpool.evaluation.demo import SIZE, run_demo
    from mixpool.evaluation.demo_plot import plot_demo
    from mixpool.evaluation.model_input import find_model_input
    from mixpool.evaluation.photos import demo_photos
    from mixpool.figures import save_figure
    from mixpool.stabilization.files import is_stabilized
    from mixpool.timm_models.loading import load_model

    demo_photos(8)  # before anything slow: are they there?
    name = options.model or "resnet18"
    is_trained = options.pretrained or options.checkpoint is not None
    weights = "pretrained weights" if is_trained else "a Gabor filter bank"
    checkpoint = None if options.checkpoint is None else read_checkpoint(options.checkpoint)
    model = load_model(name, checkpoint, pretrained=options.pretrained, num_classes=options.num_classes)
    if is_stabilized(model):
        raise ValueError(f"{options.checkpoint} is a stabilized network; give the stock one it was made from")
    wanted = find_model_input(model, None if checkpoint is None else checkpoint.settings)
    classifier = copy.deepcopy(model) if is_trained else None
    result = run_demo(model, gabor=not is_trained, track=progress("moving the photos"))
    print(f"{name}, {weights} in its stem")
    print("\n".join(str(result.report).splitlines()[:2]))
    print()
    print(
        f"Change of the stem's output when {result.num_photos} photos move by some pixels to the side\n"
        f"(rms change / standard deviation, mean over channels, {SIZE} px crops; less is steadier)\n"
    )
    print(result.table())

    title = _headline(*(result.mean_change(pooling)[0] for pooling in ("mixpool", "max pooling")))
    subtitle = (
        f"The stem of {name} with {weights}: {result.report.num_complex} of {len(result.report.poolings)} channels "
        f"on modulus pooling. {result.num_photos} photos. The maps show one ordinary channel."
    )
    print(f"\npicture: {save_figure(plot_demo(result, title, subtitle), folder / 'demo.png')}")
    if classifier is not None:
        print(f"\n{_stabilized(name, classifier, wanted)}")


def _stabilized(name: str, model: nn.Module, wanted: ModelInput) -> str:
    """The classifier before and after `stabilize`, in words; these photos take no part in its repair."""
    from mixpool.evaluation.photos import demo_photos, normalize
    from mixpool.stabilization.agreement import steadiness
    from mixpool.stabilization.pictures import MARGIN, Squares
    from mixpool.stabilization.stabilize import stabilize

    photos = demo_photos(wanted.size + MARGIN)[1]
    squares = Squares(normalize(photos, wanted.mean, wanted.std), wanted.size)
    before = steadiness(model, squares)
    if before.flips is None:
        return f"{name} is no classifier: its flips were not counted."
    report = stabilize(model, size=wanted.size, track=progress("low-passing and refitting"))
    after = steadiness(model, squares)
    kept = int((before.classes == after.classes).sum())
    flips, movement = ([found.summary()[column]["mean"] for found in (before, after)] for column in MEASURED)
    return (
        f"The whole of {name}, stabilized in {report.seconds:.0f} s without labels, on synthetic pictures:\n"
        f"{len(report.plan)} of {len(report.decimators)} decimating layers low-passed, the next ones refitted\n"
        f"of {len(photos)} photos at all pairs of crops 1 px apart, before -> after:\n"
        f"  flips of the class, %  {flips[0]:6.2f} -> {flips[1]:.2f}\n"
        f"  KL                     {movement[0]:6.3f} -> {movement[1]:.3f}\n"
        f"  photos that keep their class: {kept} of {len(photos)}\n"
        f"{len(photos)} photos are few; mixpool stabilize --images DIR repairs and measures on yours, with intervals"
    )


def _headline(ours: float, stock: float) -> str:
    """The picture's title, from its numbers."""
    relation = "less" if ours <= stock else "more"
    percent = abs(1 - ours / stock)
    return f"Move the photo by one pixel: these features change {percent:.0%} {relation} than under max pooling"
