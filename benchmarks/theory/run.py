"""What the theory says of both poolings, measured on photos: dual-tree wavelet packets, pooled and moved by pixels.

    python -m benchmarks.theory                            the 500 shared photos, 4 minutes; records/theory.jsonl alone
    python -m benchmarks.theory --images skimage           scikit-image's photos, a quarter of a minute; into outputs/
    python -m benchmarks.theory --images DIR --limit 100   yours

With any option, theory.jsonl and four figures per depth go into the folder --output. The figures of docs/theory.md are
drawn from the records by `python -m benchmarks.kit.figures`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from torch import Tensor

from benchmarks.kit.store import RECORDS
from benchmarks.theory.experiment import run_experiment, smallest_photo
from benchmarks.theory.plots import write_figures
from benchmarks.theory.tables import summary_text
from mixpool import records
from mixpool.evaluation.photos import demo_photos, load_images
from mixpool.selection.predict import predict

SAMPLE, SKIMAGE = "sample", "skimage"  # for --images, beside a folder


def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    is_for_the_page = options == parser.parse_args([])
    try:
        path, figures = measure(options, RECORDS if is_for_the_page else Path(options.output), not is_for_the_page)
    except (ValueError, OSError) as error:  # what the user can mend
        parser.error(str(error))
    print("\n".join([f"\nrecords: {path}", *(f"picture: {figure}" for figure in figures)]))
    return 0


def measure(options: argparse.Namespace, folder: Path, is_drawn: bool) -> tuple[Path, list[Path]]:
    """Run the experiment at every depth, and print its summary; the file of records, and those of the figures."""
    depths = tuple(dict.fromkeys(options.depth))
    for depth in depths:
        least = smallest_photo(depth, options.wavelet)
        if options.size < least:
            raise ValueError(
                f"expected --size {least} or more at depth {depth} of {options.wavelet}, got {options.size}"
            )
    if options.limit < 0:
        raise ValueError(f"expected --limit of at least 0, got {options.limit}")
    source, images = photos_of(options.images, options.size, options.limit)
    _prepare(folder)  # before anything slow, and not before everything else is known to fit
    found = []
    for depth in depths:
        track = _progress(f"moving {len(images)} photos, depth {depth}")
        experiment = run_experiment(images, depth, wavelet=options.wavelet, predict=predict, track=track)
        found.append(experiment.as_record(source))
    path = folder / "theory.jsonl"
    records.write(path, found)
    print("Means and correlations over the analytic packets; in brackets 95 % intervals over photos:\n")
    print(summary_text(found))
    return path, [figure for record in found for figure in write_figures(record, folder)] if is_drawn else []


def photos_of(images: str, size: int, limit: int) -> tuple[str, Tensor]:
    """What the records call the photos, and the photos, (N, 3, size, size); says on stderr which cannot be read."""
    if images == SKIMAGE:
        return "those of scikit-image", demo_photos(size)[1][: limit or None]
    folder = images
    if images == SAMPLE:
        from benchmarks.kit.sample import shared_folder

        images, folder = "imagenet_sample", shared_folder() / "data/imagenet_sample/val"
    photos = load_images(folder, size, limit or None)
    print(f"{len(photos.names)} of {photos.num_found} images in {folder}", file=sys.stderr)
    for name, reason in photos.failed:
        print(f"warning: cannot read {name}: {reason}", file=sys.stderr)
    if photos.enlarged:
        print(f"warning: {len(photos.enlarged)} image(s) enlarged, first {photos.enlarged[0]}", file=sys.stderr)
    return images, photos.images


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--images", metavar="DIR", default=SAMPLE, help=f"folder of photos, {SKIMAGE!r} or {SAMPLE!r} (default)"
    )
    parser.add_argument(
        "--limit", type=int, default=0, metavar="N", help="how many, evenly spread over the sorted list; 0: all"
    )
    parser.add_argument(
        "--size", type=int, default=256, metavar="PX", help="of the photos, resized and cropped (default: %(default)s)"
    )
    parser.add_argument(
        "--depth",
        type=int,
        nargs="+",
        choices=(2, 3, 4),
        default=(2, 3),
        metavar="J",
        help="depths of the packets, 2 to 4; the convolution's stride is 2^(J-1) (default: 2 3)",
    )
    parser.add_argument("--wavelet", metavar="NAME", default="qshift_a", help="taps of the packets (%(default)s)")
    parser.add_argument("--output", metavar="DIR", default="outputs", help="folder for the results (%(default)s)")
    return parser


def _prepare(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise ValueError(f"expected --output to be a folder, {folder} is a file") from None
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"cannot write into {folder}")


def _progress(description: str) -> Callable[[Iterable, int], Iterator]:
    """A progress bar on stderr; silent where that is no terminal."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)

    def wrap(steps: Iterable, total: int) -> Iterator:
        return track(steps, description, total, console=console, transient=True, disable=not console.is_terminal)

    return wrap
