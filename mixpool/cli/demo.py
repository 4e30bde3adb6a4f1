"""The command `mixpool demo`."""

from __future__ import annotations

import argparse

from mixpool.cli.common import add_output_folder, progress, writable_folder

HELP = "show on photos how much less a stem's output moves; needs no download"
DESCRIPTION = """Move photos pixel by pixel under a stem with max pooling, BlurPool, plain CMod and mixpool;
print how much its output changes, and draw one picture. About 20 seconds; needs no download."""
EXAMPLES = """examples:
  mixpool demo
  mixpool demo --output docs
  mixpool demo --model resnet50.a1_in1k --pretrained"""


def add_options(parser: argparse.ArgumentParser) -> None:
    add_output_folder(parser, "demo.png")
    parser.add_argument("--model", metavar="NAME", help="a timm or torchvision model instead of the resnet18")
    parser.add_argument("--pretrained", action="store_true", help="with --model: its trained weights, downloaded")


def run(options: argparse.Namespace) -> None:
    if options.pretrained and options.model is None:
        raise ValueError(
            "--pretrained needs --model NAME: the demo's own model holds a filter bank, not trained weights"
        )
    folder = writable_folder(options.output)

    from mixpool.evaluation.demo import SIZE, run_demo
    from mixpool.evaluation.demo_plot import plot_demo
    from mixpool.evaluation.photos import demo_photos
    from mixpool.figures import save_figure
    from mixpool.timm_models.loading import create_model

    demo_photos(8)  # before anything slow: are they there?
    name = options.model or "resnet18"
    weights = "pretrained weights" if options.pretrained else "a Gabor filter bank"
    model = create_model(name, pretrained=options.pretrained)
    result = run_demo(model, gabor=not options.pretrained, track=progress("moving the photos"))
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


def _headline(ours: float, stock: float) -> str:
    """The picture's title, from its numbers."""
    relation = "less" if ours <= stock else "more"
    percent = abs(1 - ours / stock)
    return f"Move the photo by one pixel: these features change {percent:.0%} {relation} than under max pooling"
