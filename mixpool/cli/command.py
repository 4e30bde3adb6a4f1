"""The command `mixpool`: demo, inspect, convert, theory, evaluate, train. It parses, calls and prints.

What needs timm, matplotlib or rich is imported inside the commands: `--help` and errors need not wait for them.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mixpool
from mixpool.cli import evaluate as evaluate_command
from mixpool.cli.arguments import EXIT_USER_ERROR, build_parser, parse_select

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mixpool.conversion.report import ConversionReport
    from mixpool.evaluation.photos import Photos

EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells count
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 2 for a user's error (one line on stderr), 130 for Ctrl-C."""
    try:
        options = build_parser(COMMANDS).parse_args(arguments)
        options.run(options)
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt:
        print("mixpool: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader (`| head`) has gone: without this, Python complains once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except (ValueError, OSError) as error:
        if options.traceback:
            raise
        print(f"mixpool: error: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_USER_ERROR


# --- the commands -----------------------------------------------------------------------------------------------------


def run_demo_command(options: argparse.Namespace) -> None:
    if options.pretrained and options.model is None:
        raise ValueError(
            "--pretrained needs --model NAME: the demo's own model holds a filter bank, not trained weights"
        )
    folder = _writable_folder(options.output)

    from mixpool.evaluation.demo import POOLINGS, SHIFTS, SIZE, run_demo
    from mixpool.evaluation.demo_plot import plot_demo
    from mixpool.evaluation.photos import demo_photos
    from mixpool.figures import save_figure
    from mixpool.timm_models.loading import create_model

    demo_photos(8)  # before anything slow: are they there?
    name = options.model or "resnet18"
    weights = "pretrained weights" if options.pretrained else "a Gabor filter bank"
    model = create_model(name, pretrained=options.pretrained)
    result = run_demo(model, gabor=not options.pretrained, track=_progress("moving the photos"))
    print(f"{name}, {weights} in its stem")
    print("\n".join(str(result.report).splitlines()[:2]))
    print()
    print(
        f"Change of the stem's output when {result.num_photos} photos move by some pixels to the side\n"
        f"(rms change / standard deviation, mean over channels, {SIZE} px crops; less is steadier)\n"
    )
    print(result.table())

    curves = {pooling: result.mean_change(pooling) for pooling in POOLINGS}
    figure = plot_demo(
        result.photo,
        result.kernel,
        result.maps,
        curves,
        SHIFTS,
        title=_headline(curves["mixpool"][0], curves["max pooling"][0]),
        subtitle=(
            f"The stem of {name} with {weights}: {result.report.num_modulus} of {len(result.report.kinds)} channels on "
            f"modulus pooling. {result.num_photos} photos. The maps show one ordinary channel."
        ),
        channel=result.channel,
        num_swapped=result.report.num_modulus,
    )
    print(f"\npicture: {save_figure(figure, folder / 'demo.png')}")


def run_inspect_command(options: argparse.Namespace) -> None:
    model, report, photos = _load_and_convert(options, may_be_converted=True)
    if options.plot is not None:
        from mixpool.conversion.stock import converted_stems, stock_state_dict
        from mixpool.figures import save_figure
        from mixpool.selection.plot import plot_filter_bank

        name = next(iter(converted_stems(model)))
        weight = stock_state_dict(model)[f"{name}.weight"]  # as it was before any calibration
        plot = save_figure(plot_filter_bank(weight, report), options.plot)
    if options.json:
        print(json.dumps(report_as_dict(report, options, photos), indent=2, allow_nan=False))
    else:
        print(report)
    if options.plot is not None:
        print(f"picture: {plot}", file=sys.stderr if options.json else sys.stdout)


def run_convert_command(options: argparse.Namespace) -> None:
    output = Path(options.output)
    if output.suffix != ".safetensors":
        raise ValueError(f"expected --output to be named *.safetensors, got {output}")
    if output.is_dir() or not output.parent.is_dir():
        raise ValueError(f"expected --output to be a file in an existing folder, got {output}")
    if not os.access(output.parent, os.W_OK):
        raise PermissionError(f"cannot write into {output.parent}")
    if output.exists():
        if options.checkpoint is not None and output.samefile(_existing(options.checkpoint)):
            raise ValueError(f"--output is the checkpoint itself: {output}")
        if not options.force:
            raise ValueError(f"{output} exists; give --force to overwrite it")
    model, report, _ = _load_and_convert(options)
    print(report)
    metadata = {
        "model": options.model,
        "blur": str(report.blur),
        "max_blur": str(report.max_blur),
        "imag": report.imag,
        "select": options.select,
        "stem": options.stem or "",
        "num_modulus": str(report.num_modulus),
        "mixpool_version": mixpool.__version__,
    }
    write_safetensors(model, output, metadata)
    print(
        f"\nwrote {output}\n"
        "to use it: build the stock model, mixpool.convert(model"
        + (', imag="free"' if report.imag == "free" else "")
        + (f', stem="{options.stem}"' if options.stem else "")
        + f'), model.load_state_dict(safetensors.torch.load_file("{output}"))'
    )


def run_theory_command(options: argparse.Namespace) -> None:
    from benchmarks.theory.experiment import run_experiment, smallest_photo
    from benchmarks.theory.plots import write_figures
    from benchmarks.theory.table import summary_text
    from mixpool import records
    from mixpool.evaluation.photos import demo_photos
    from mixpool.selection.predict import predict

    depths = tuple(dict.fromkeys(options.depth))
    for depth in depths:
        least = smallest_photo(depth, options.wavelet)
        if options.size < least:
            raise ValueError(
                f"expected --size {least} or more at depth {depth} of {options.wavelet}, got {options.size}"
            )
    if options.images is None:
        source, images = "those of scikit-image", demo_photos(options.size)[1][: options.limit or None]
    else:
        source, images = options.images, _folder_photos(options, options.size).images
    folder = _writable_folder(options.output)  # before anything slow, and not before everything else is known to fit
    found = []
    for depth in depths:
        track = _progress(f"moving {len(images)} photos, depth {depth}")
        found.append(
            run_experiment(images, depth, wavelet=options.wavelet, predict=predict, track=track).as_record(source)
        )
    path = folder / "theory.jsonl"
    records.write(path, found)
    figures = [figure for record in found for figure in write_figures(record, folder)]
    print("Means and correlations over the analytic packets; in brackets 95 % intervals over photos:\n")
    print(summary_text(found))
    print(f"\nrecords: {path}")
    print("\n".join(f"picture: {figure}" for figure in figures))


def run_train_command(options: argparse.Namespace) -> None:
    from mixpool.training.configuration import complete
    from mixpool.training.train import train

    train(complete(vars(options)))


COMMANDS = {
    "demo": run_demo_command,
    "inspect": run_inspect_command,
    "convert": run_convert_command,
    "theory": run_theory_command,
    "evaluate": evaluate_command.run,
    "train": run_train_command,
}


# --- steps of the commands --------------------------------------------------------------------------------------------


def _load_and_convert(
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
            _existing(path)

    from mixpool.conversion.convert import convert
    from mixpool.conversion.stock import converted_stems
    from mixpool.evaluation.photos import normalize
    from mixpool.timm_models.loading import input_settings, load_model, read_checkpoint

    checkpoint = None if options.checkpoint is None else read_checkpoint(options.checkpoint)
    model = load_model(options.model, checkpoint, pretrained=options.pretrained, num_classes=options.num_classes)
    if checkpoint is None and not options.pretrained:
        print("mixpool: note: random weights; give --checkpoint FILE or --pretrained for trained ones", file=sys.stderr)
    elif checkpoint is not None and checkpoint.is_average:
        print("mixpool: note: took the moving average of the weights", file=sys.stderr)
    if converted_stems(model):
        if not may_be_converted:
            what = options.checkpoint or options.model
            raise ValueError(f"{what} is a converted model already; give the stock one it was made from")
        return model, _present_report(model, options), None
    photos, images = None, None
    if options.images is not None:
        settings = input_settings(model)
        photos = _folder_photos(options, settings.size, settings.crop_ratio)
        images = _batches(normalize(photos.images, settings.mean, settings.std))
    report = convert(
        model,
        select=select,
        blur=options.blur,
        max_blur=options.max_blur,
        imag=options.imag,
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

    usual = {"select": "auto", "blur": 3, "max_blur": 1, "imag": "tied", "stem": None, "images": None}
    given = [f"--{name.replace('_', '-')}" for name, value in usual.items() if getattr(options, name) != value]
    if given:
        raise ValueError(f"the model is converted already: its plan is shown as it is, without {' and '.join(given)}")
    name, stem = next(iter(converted_stems(model).items()))
    stats, count = analyze(stem.weight.detach(), stem.stride, window=stem.window), len(stem.kinds)
    options.select = None  # for the JSON: nothing was selected here
    plan = ChannelPlan(stem.kinds, ("as the model has it",) * count, stats, torch.full((count,), math.nan))
    parts = name if stem.stock is None else " -> ".join(stem.stock.names.values())
    return ConversionReport(parts, plan, stem.blur, stem.max_blur, stem.imag, None, ())


def _folder_photos(options: argparse.Namespace, size: int, crop_ratio: float = 1.0) -> Photos:
    """The photos of --images and --limit; says on stderr how many there are and which cannot be read."""
    from mixpool.evaluation.photos import load_images

    photos = load_images(options.images, size, options.limit or None, crop_ratio=crop_ratio)
    print(f"mixpool: {len(photos.names)} of {photos.num_found} images in {options.images}", file=sys.stderr)
    for name, reason in photos.failed:
        print(f"mixpool: warning: cannot read {name}: {reason}", file=sys.stderr)
    if photos.enlarged:
        print(
            f"mixpool: warning: {len(photos.enlarged)} image(s) too small, enlarged and so without fine detail, "
            f"first {photos.enlarged[0]}",
            file=sys.stderr,
        )
    if photos.failed:
        print(f"mixpool: warning: {len(photos.failed)} image(s) left out", file=sys.stderr)
    return photos


def report_as_dict(report: ConversionReport, options: argparse.Namespace, photos: Photos | None) -> dict[str, Any]:
    """The report as plain values; what was not measured is None."""
    plan, stats = report.plan, report.plan.stats
    columns = {
        "center_frequency": stats.center_frequency.tolist(),
        "phase_step": stats.phase_step.tolist(),
        "orientation_degrees": (stats.orientation * (180 / math.pi)).tolist(),
        "slow_share": stats.slow_share.tolist(),
        "bandwidth": stats.bandwidth.tolist(),
        "relative_bandwidth": stats.relative_bandwidth.tolist(),
        "concentration": stats.concentration.tolist(),
        "dc_share": stats.dc_share.tolist(),
        **{f"predicted_{name}": _or_none(values.flatten()) for name, values in stats.predicted._asdict().items()},
        "fidelity": [None] * len(plan.kinds) if plan.fidelity is None else _or_none(plan.fidelity),
    }
    channels = [
        {"channel": i, "kind": kind, "reason": reason, **{name: column[i] for name, column in columns.items()}}
        for i, (kind, reason) in enumerate(zip(plan.kinds, plan.reasons, strict=True))
    ]
    agreement = report.agreement
    return {
        "mixpool_version": mixpool.__version__,
        "model": options.model,
        "checkpoint": options.checkpoint,
        "pretrained": options.pretrained,
        "stem": report.stem,
        "select": options.select,
        "blur": report.blur,
        "max_blur": report.max_blur,
        "imag": report.imag,
        "num_channels": len(plan.kinds),
        "num_modulus": report.num_modulus,
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
        if unfinished.exists():
            unfinished.unlink()


def _headline(ours: float, stock: float) -> str:
    """The picture's title, from its numbers."""
    relation = "less" if ours <= stock else "more"
    percent = abs(1 - ours / stock)
    return f"Move the photo by one pixel: these features change {percent:.0%} {relation} than under max pooling"


def _batches(images: Tensor, size: int = 32) -> list[Tensor]:
    return list(images.split(size))


def _existing(path: str) -> Path:
    if not Path(path).exists():
        raise FileNotFoundError(f"{path} does not exist")
    return Path(path)


def _writable_folder(name: str) -> Path:
    folder = Path(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise ValueError(f"expected --output to be a folder, {folder} is a file") from None
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"cannot write into {folder}")
    return folder


def _progress(description: str) -> Callable[[Iterable, int], Iterator]:
    """A progress bar on stderr; silent where that is no terminal."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)

    def wrap(steps: Iterable, total: int) -> Iterator:
        return track(steps, description, total, console=console, transient=True, disable=not console.is_terminal)

    return wrap
