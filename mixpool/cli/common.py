"""What the commands share: exit codes, what they say on stderr, the progress bar, integers, folders, photos."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mixpool.evaluation.photos import Photos

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells count
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE
SHOWN_FAILURES = 10


def say(text: str) -> None:
    """Tell the user something that is no result: on stderr, every line after the command's name."""
    print("\n".join(f"mixpool: {line}" for line in text.splitlines()), file=sys.stderr)


def say_failures(failed: Iterable[tuple[str, str]]) -> None:
    """Warn of images that were left out, (name, reason) each."""
    failed = list(failed)
    for name, reason in failed[:SHOWN_FAILURES]:
        say(f"warning: left out {name}: {reason}")
    if failed:
        say(f"warning: {len(failed)} image(s) left out")


def progress(description: str) -> Callable[[Iterable, int | None], Iterable]:
    """A progress bar on stderr, for an iterable and its length; silent where that is no terminal."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)

    def wrap(steps: Iterable, total: int | None) -> Iterable:
        return track(steps, description, total, console=console, transient=True, disable=not console.is_terminal)

    return wrap


def integer(least: int) -> Callable[[str], int]:
    """The type of an option: an integer of at least so much."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected an integer of at least {least}, got {text!r}")
        return int(text)

    return parse


def add_output_folder(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--output", metavar="DIR", default="outputs", help=f"folder for {what} (default: %(default)s)")


def existing(path: str) -> Path:
    if not Path(path).exists():
        raise FileNotFoundError(f"{path} does not exist")
    return Path(path)


def writable_folder(name: str) -> Path:
    """The folder of --output, made if need be."""
    folder = Path(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise ValueError(f"expected --output to be a folder, {folder} is a file") from None
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"cannot write into {folder}")
    return folder


def writable_file(name: str, option: str, suffixes: tuple[str, ...], options: argparse.Namespace) -> Path:
    """The file of an option, in a folder that is there; it must not be the checkpoint, nor be there without --force."""
    path = Path(name)
    if path.suffix not in suffixes:
        named = " or ".join(f"*{suffix}" for suffix in suffixes)
        raise ValueError(f"expected {option} to be named {named}, got {path}")
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(f"expected {option} to be a file in an existing folder, got {path}")
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"cannot write into {path.parent}")
    if path.exists():
        if options.checkpoint is not None and path.samefile(existing(options.checkpoint)):
            raise ValueError(f"{option} is the checkpoint itself: {path}")
        if not options.force:
            raise ValueError(f"{path} exists; give --force to overwrite it")
    return path


def folder_photos(folder: str, limit: int, size: int, crop_ratio: float = 1.0) -> Photos:
    """The user's own photos; says how many there are, which cannot be read and which are too small.

    Args:
        limit: how many at most; 0 for all.
        size, crop_ratio: as for `load_images`, but a ratio above 1, for which photos have no border, counts as 1.
    """
    from mixpool.evaluation.photos import load_images

    photos = load_images(folder, size, limit or None, crop_ratio=min(1.0, crop_ratio))
    say(f"{len(photos.names)} of {photos.num_found} images in {folder}")
    say_failures(photos.failed)
    if photos.enlarged:
        count, first = len(photos.enlarged), photos.enlarged[0]
        say(f"warning: {count} image(s) too small, enlarged and so without fine detail, first {first}")
    return photos
