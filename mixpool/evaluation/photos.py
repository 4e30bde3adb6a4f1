"""Images as tensors: the photos that scikit-image ships, and a folder of the user's own."""

from __future__ import annotations

import struct
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
# Files inside scikit-image's wheel. Its own loaders would try to download what is missing; these are only opened.
DEMO_FILES = (
    "chelsea.png",
    "astronaut.png",
    "camera.png",
    "coffee.png",
    "motorcycle_left.png",
    "rocket.jpg",
    "coins.png",
    "clock_motion.png",
    "hubble_deep_field.jpg",
    "retina.jpg",
    "moon.png",
    "grass.png",
)
# What Pillow's decoders and the archives raise on damaged files, SyntaxError included (broken PNG chunks).
DAMAGED = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, ZeroDivisionError, MemoryError)
DAMAGED += (struct.error, tarfile.TarError, zlib.error)


@dataclass(frozen=True)
class Photos:
    """Photos of a folder.

    Attributes:
        names: paths relative to the folder, one per image.
        images: (N, 3, size, size) float32 in [0, 1].
        failed: (path, reason) of each file that could not be read.
        num_found: image files in the folder, before `limit`.
        enlarged: names of the images whose shorter side was below the size asked for.
    """

    names: tuple[str, ...]
    images: Tensor
    failed: tuple[tuple[str, str], ...]
    num_found: int
    enlarged: tuple[str, ...] = ()


def demo_photos(size: int) -> tuple[list[str], Tensor]:
    """Names and (12, 3, size, size) float32 in [0, 1] of the twelve photos that come with scikit-image: no download.

    The shorter side is resized to `size` pixels. FileNotFoundError if the installed scikit-image lacks one of them.
    """
    from importlib.util import find_spec

    folder = Path(find_spec("skimage").origin).parent / "data"
    images = []
    for file in DEMO_FILES:
        if not (folder / file).is_file():
            raise FileNotFoundError(f"expected scikit-image to ship {file} in {folder}: install scikit-image>=0.22")
        images.append(_load(folder / file, size, size)[0])
    return [Path(file).stem for file in DEMO_FILES], torch.stack(images)


def load_images(directory: str | Path, size: int, limit: int | None = None, *, crop_ratio: float = 1.0) -> Photos:
    """Load the photos of a folder and its subfolders as RGB, in the order of their paths.

    The shorter side is resized to size / crop_ratio and the centre cropped. With `limit`, that many files are taken,
    evenly spread over the sorted list, so that a folder of classes gives some of each. A file that cannot be read is
    left out and named in `failed`.

    Args:
        directory: the folder; hidden files and files without an image's suffix are not looked at.
        size: side of the square crop, pixels.
        limit: number of files to take at most; None for all (memory: 12 size^2 bytes each).
        crop_ratio: side of the crop over the shorter side of the resized photo, in (0, 1].
    Raises:
        FileNotFoundError: no such folder, or it holds no image file.
        ValueError: none of the chosen files can be read, or an argument is out of its range.
    """
    directory = Path(directory)
    if size < 1 or (limit is not None and limit < 1) or not 0 < crop_ratio <= 1:
        raise ValueError(
            f"expected size >= 1, limit >= 1 and 0 < crop_ratio <= 1, got {size=}, {limit=}, {crop_ratio=}"
        )
    if not directory.is_dir():
        what = "is a file" if directory.exists() else "does not exist"
        raise FileNotFoundError(f"expected a folder of photos, but {directory} {what}")
    paths = _image_files(directory)
    if not paths:
        suffixes = " ".join("*" + suffix for suffix in SUFFIXES)
        raise FileNotFoundError(f"expected photos in {directory} or its subfolders, found no file named {suffixes}")
    names, images, failed, enlarged = [], [], [], []
    for path in _evenly_spread(paths, limit):
        name = path.relative_to(directory).as_posix()
        try:
            image, is_enlarged = _load(path, round(size / crop_ratio), size)
            images.append(image)
            names.append(name)
            enlarged += [name] * is_enlarged
        except UnreadableImage as error:
            failed.append((name, str(error).replace(str(path), path.name)))
    if not images:
        name, reason = failed[0]
        raise ValueError(f"none of the {len(failed)} files in {directory} can be read as an image; {name}: {reason}")
    return Photos(tuple(names), torch.stack(images), tuple(failed), len(paths), tuple(enlarged))


def normalize(images: Tensor, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD) -> Tensor:
    """(images - mean) / std per channel, for images (..., C, H, W) in [0, 1]; ImageNet's numbers by default."""
    if images.ndim < 3 or images.shape[-3] != len(mean) or len(mean) != len(std):
        raise ValueError(f"expected images (..., {len(mean)}, H, W), got {tuple(images.shape)}")
    mean, std = (images.new_tensor(values)[:, None, None] for values in (mean, std))
    return (images - mean) / std


class UnreadableImage(ValueError):
    """A file is no image, or is damaged."""


@contextmanager
def damage_named() -> Iterator[None]:
    """What goes wrong with an image comes out as UnreadableImage."""
    from PIL import Image

    try:
        yield
    except UnreadableImage:
        raise
    except (*DAMAGED, Image.DecompressionBombError) as error:
        raise UnreadableImage(f"{type(error).__name__}: {short(error)}") from error


def with_eight_bits(image: Image.Image) -> Image.Image:
    """The picture itself; UnreadableImage if it has more than 8 bits per pixel."""
    if image.mode.startswith(("I", "F")):  # Pillow would clip these to white instead of scaling them
        raise UnreadableImage(f"more than 8 bits per pixel (mode {image.mode}): convert it to 8 bits first")
    return image


def short(error: BaseException) -> str:
    """What an error says, as part of a message: on one line, and not without end."""
    return " ".join(str(error).split())[:300]


def _load(path: Path, short_side: int, size: int) -> tuple[Tensor, bool]:
    """(3, size, size) in [0, 1]: upright, RGB, shorter side resized, centre cropped; and whether it was enlarged."""
    import numpy as np
    from PIL import Image, ImageOps

    with damage_named(), Image.open(path) as file:
        image = ImageOps.exif_transpose(with_eight_bits(file)).convert("RGB")
    pixels = torch.from_numpy(np.array(_resize_and_crop(image, short_side, size)))  # (H, W, 3) uint8, a copy
    return pixels.permute(2, 0, 1).float() / 255, min(image.size) < short_side


def _resize_and_crop(image: Image.Image, short_side: int, size: int) -> Image.Image:
    from PIL import Image

    scale = short_side / min(image.size)
    width, height = (max(short_side, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _image_files(directory: Path) -> list[Path]:
    """Image files below a folder, sorted by path; hidden files and folders are not looked at."""
    return sorted(
        path
        for path in directory.rglob("*")
        if path.suffix.lower() in SUFFIXES
        and (path.is_file() or path.is_symlink())  # a broken link is found, and then named as unreadable
        and not any(part.startswith(".") for part in path.relative_to(directory).parts)
    )


def _evenly_spread(paths: list[Path], limit: int | None) -> list[Path]:
    if limit is None or limit >= len(paths):
        return paths
    return [paths[(2 * i + 1) * len(paths) // (2 * limit)] for i in range(limit)]
