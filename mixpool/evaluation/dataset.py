"""The images of an evaluation: timm's readers, and every image that cannot be read named with its reason.

timm's own dataset replaces an image that it cannot read by the next one, and its folder reader passes over folders that
the class map lacks and over formats that it does not know. A number that is to be compared cannot stand on that, so the
readers are asked here image by image, and what is left out is listed with its reason.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor
from torch.utils.data import IterableDataset

from mixpool.evaluation.photos import SUFFIXES, UnreadableImage, damage_named, short, with_eight_bits

if TYPE_CHECKING:
    from PIL import Image

STREAMS = ("wds", "hfids", "tfds")
# What means a folder or a .tar. timm takes any other word for that too, one with a typing error for one.
FOLDER_NAMES = ("", "folder", "imagefolder", "image_folder")
KINDS = ("torch", "hfds", *STREAMS)
_PACKAGES = {"wds": "webdataset", "hfds": "datasets", "hfids": "datasets", "tfds": "tensorflow_datasets"}
_SPLITS = (("train", "training"), ("val", "valid", "validation", "eval", "evaluation"))  # what timm takes for one
Failure = tuple[str, str]  # name of an image, and why it cannot be used


# --- sources ----------------------------------------------------------------------------------------------------------


class Images:
    """Labelled images that can be asked for by number.

    Args:
        dataset: one of timm's, or any dataset of (PIL image, class number).
        num_classes: how many classes the labels are out of; None if not known.
        may_have_fewer: whether the labels may be out of fewer classes than the model's, numbered as the model's.
        left_out: what the reader will not show.
        limit: how many, evenly spread over the dataset; None for all.
        origin: where the images come from, for messages and records.
    Attributes:
        indices: numbers in the dataset of the images to evaluate, in this order; may be set to choose others.
    Raises:
        ValueError: there are none.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        num_classes: int | None = None,
        may_have_fewer: bool = False,
        left_out: Sequence[Failure] = (),
        limit: int | None = None,
        origin: str = "the dataset",
    ) -> None:
        self.dataset, self.num_classes, self.may_have_fewer = dataset, num_classes, may_have_fewer
        self.left_out, self.origin = tuple(left_out), origin
        self.num_found = len(dataset)
        if self.num_found == 0:
            raise ValueError(f"expected images in {origin}, found none")
        count = self.num_found if limit is None else min(limit, self.num_found)
        if count < 1:
            raise ValueError(f"expected a limit of at least 1 image, got {limit}")
        self.indices = [(2 * i + 1) * self.num_found // (2 * count) for i in range(count)]

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        """What the reader calls an image, or its number."""
        if not hasattr(self.dataset, "filename"):
            return f"image {index}"
        return str(self.dataset.filename(index) or f"image {index}")

    def read(self, index: int) -> tuple[Image.Image, int]:
        """An image as RGB and its class; UnreadableImage if it is missing, damaged or of a depth beyond 8 bits."""
        with damage_named():
            reader = getattr(self.dataset, "reader", None)
            if reader is None:
                image, label = self.dataset[index]
                return _as_rgb(image), _class_number(label)
            file, label = _open(reader, index)
            with file:
                return _decode(file), _class_number(label)


class Stream(IterableDataset):
    """Labelled images that come one after another (webdataset, Hugging Face streams); one worker reads them.

    Args:
        dataset: an iterable dataset of (PIL image, class number).
        limit: how many, the first ones; None for all.
        others: as for `Images`.
    """

    left_out: tuple[Failure, ...] = ()

    def __init__(
        self,
        dataset: Iterable,
        *,
        num_classes: int | None = None,
        may_have_fewer: bool = False,
        limit: int | None = None,
        origin: str = "the stream",
    ) -> None:
        self.dataset, self.num_classes, self.may_have_fewer = dataset, num_classes, may_have_fewer
        self.limit, self.origin = limit, origin
        self.num_found: int | None = None  # not known before the end

    def __iter__(self) -> Iterator[tuple[str, Image.Image | str, int]]:
        """(name, image, label), or (name, why it cannot be used, -1)."""
        count = 0
        with _swallowed_errors() as errors:
            stream = iter(self.dataset)
            while self.limit is None or count < self.limit:
                item = next(stream, None)
                for error in errors:
                    yield f"image {count} of the stream", error, -1
                    count += 1
                errors.clear()
                if item is None:
                    return
                try:
                    with damage_named():
                        entry = (_as_rgb(item[0]), _class_number(item[1]))
                except UnreadableImage as error:
                    entry = (str(error), -1)
                yield f"image {count} of the stream", *entry
                count += 1


@contextlib.contextmanager
def _swallowed_errors() -> Iterator[list[str]]:
    """Collects what timm's webdataset reader would only log, and go on: the samples that cannot be decoded."""
    import logging

    errors: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "Handling webdataset error" in record.getMessage():
                errors.append(record.getMessage().removeprefix("Handling webdataset error ").removesuffix(" Ignoring."))

    logger = logging.getLogger("timm.data.readers.reader_wds")
    handler, propagate = Collect(logging.WARNING), logger.propagate
    logger.addHandler(handler)
    try:
        yield errors
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate


def open_images(
    root: str | Path,
    *,
    dataset: str = "",
    split: str = "validation",
    class_map: str | Path | Mapping[str, int] | None = None,
    limit: int | None = None,
    download: bool = False,
) -> Images | Stream:
    """Images through timm's readers.

    Args:
        root: a folder with a folder per class (or with such a folder per split), a .tar of one, or what the named
            dataset takes for its root.
        dataset: "" for folders and .tar files; else a timm name: "hfds/NAME", "hfids/NAME", "tfds/NAME", "wds/NAME",
            "torch/NAME".
        split: a folder in root, or what the named dataset calls its splits.
        class_map: name of a class -> its number among the model's outputs, or a .txt of one name per line in their
            order. Without it the sorted names are numbered.
        limit: how many images; None for all.
        download: whether a torch/, hfids/ or tfds/ dataset that is not there may be downloaded.
    Raises:
        FileNotFoundError: there is no such folder or file.
        ValueError: the dataset cannot be opened; the message says why.
    """
    kind = dataset.partition("/")[0].lower() if "/" in dataset else ""
    if kind not in KINDS and dataset.lower() not in FOLDER_NAMES:
        names = ", ".join(f"{name}/NAME" for name in KINDS)
        raise ValueError(f'expected the dataset to be "" for a folder or a .tar, or one of {names}, got {dataset!r}')
    package = _PACKAGES.get(kind)
    if package is not None and importlib.util.find_spec(package) is None:
        raise ValueError(f"the dataset {dataset!r} needs the package {package}: pip install {package}")
    if kind in ("", "wds") and not Path(root).exists():
        raise FileNotFoundError(f"expected a folder or a .tar file of images, but {root} does not exist")
    if kind == "":
        _check_folder(Path(root), split)
    names = None if class_map is None else read_class_map(class_map)

    from timm.data import create_dataset

    # That reader wants to know a length, for training schedules; an evaluation reads to the end all the same.
    length = {"num_samples": limit or 1} if kind == "hfids" else {}
    try:
        found = create_dataset(dataset, root=str(root), split=split, class_map=names, download=download, **length)
    except (Exception, SystemExit) as error:  # assertions, import errors, the hubs' own kinds
        raise ValueError(f"cannot open {dataset or root} ({type(error).__name__}: {short(error)})") from error
    reader = getattr(found, "reader", None)
    classes = getattr(reader, "class_to_idx", None) or getattr(reader, "class_name_to_idx", None)
    classes = classes or getattr(found, "class_to_idx", None) or {}
    common = {
        "num_classes": max(classes.values()) + 1 if classes else None,
        "may_have_fewer": isinstance(class_map, Mapping),
        "limit": limit,
        "origin": f"{dataset} ({root})" if dataset else str(root),
    }
    if kind in STREAMS:
        return Stream(found, **common)
    return Images(found, left_out=() if kind else _left_out(reader, names), **common)


def read_class_map(source: str | Path | Mapping[str, int]) -> dict[str, int]:
    """Class name -> number, from a .txt of one name per line; of "n01440764 tench" and its like only the synset counts.

    FileNotFoundError without the file, ValueError if it is empty, is no .txt, or names a class twice.
    """
    if isinstance(source, Mapping):
        return dict(source)
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"expected a class map, but {path} is no file")
    if path.suffix.lower() != ".txt":
        raise ValueError(f"expected the class map to be a .txt with one class name per line, got {path}")
    names = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    if all(re.match(r"n\d{8}\b", name) for name in names):
        names = [name.split()[0] for name in names]
    twice = {name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else set()
    if not names or twice:
        raise ValueError(f"expected one class name per line in {path}, " + (f"got {min(twice)} twice" if twice else ""))
    return {name: number for number, name in enumerate(names)}


def check_classes(images: Images | Stream, num_outputs: int) -> None:
    """Raise ValueError, with what to do, if the labels cannot be those of a model with so many classes."""
    classes = images.num_classes
    if classes is None or classes == num_outputs or images.may_have_fewer and classes < num_outputs:
        return
    raise ValueError(
        f"the classes of {images.origin} are numbered from 0 to {classes - 1} and the model has {num_outputs} outputs: "
        "they are not the same classes. Give a class map (--class-map FILE, class_map=): a .txt with the "
        f"{num_outputs} names of the class folders, one per line, in the order of the model's outputs"
    )


# --- reading one image ------------------------------------------------------------------------------------------------


def _open(reader: Any, index: int) -> tuple[Any, Any]:
    """An open file and the label of an image."""
    from timm.data.readers.reader_image_in_tar import ReaderImageInTar

    if not isinstance(reader, ReaderImageInTar):
        return reader[index]
    # Its cache of open archives would be shared with forked workers, who would then move one file position.
    member, part, child = reader.samples[index]
    path = os.path.join(reader.root, part) if part else reader.root
    with open(path, "rb") as archive:
        archive.seek(member.offset_data + (0 if child is None else child.offset_data))
        return io.BytesIO(archive.read(member.size)), reader.targets[index]


def _decode(file: Any) -> Image.Image:
    from PIL import Image

    with Image.open(file) as image:
        return _as_rgb(image)


def _as_rgb(image: Image.Image) -> Image.Image:
    if not hasattr(image, "convert"):
        raise UnreadableImage(f"expected a PIL image, got {type(image).__name__}")
    return with_eight_bits(image).convert("RGB")


def _class_number(label: Any) -> int:
    if label is None:
        return -1
    if not isinstance(label, (int, np.integer)) and not (isinstance(label, Tensor) and label.ndim == 0):
        raise ValueError(f"expected one class number as the label of an image, got {label!r:.80}")
    return int(label)


# --- what timm's folder and tar readers pass over ---------------------------------------------------------------------


def _check_folder(root: Path, split: str) -> None:
    """Refuse a folder of splits whose split does not exist: timm would take all splits together."""
    if root.is_file() and root.suffix != ".tar":
        raise ValueError(f"expected a folder or a .tar file of images, got the file {root}")
    folders = [entry.name for entry in root.iterdir() if entry.is_dir()] if root.is_dir() else []
    accepted = next((names for names in _SPLITS if split in names), (split,))
    named = [name for name in folders if name in (*_SPLITS[0], *_SPLITS[1], "test")]
    # A class may be called "train" too; what holds folders itself is no class.
    are_splits = named and (
        len(named) == len(folders) or any(entry.is_dir() for name in named for entry in (root / name).iterdir())
    )
    if are_splits and not set(accepted) & set(folders):
        raise ValueError(
            f"expected a folder {split!r} in {root}, found {', '.join(sorted(folders))}: give another split"
        )


def _left_out(reader: Any, names: Mapping[str, int] | None) -> list[Failure]:
    """Images that the reader does not list: of formats that timm does not know, or of no class of the map."""
    from timm.data.readers.img_extensions import get_img_extensions

    root = Path(reader.root)
    if root.is_file():
        with tarfile.open(root, "r:") as archive:
            paths = [member.name for member in archive if member.isfile()]
    else:
        walk = os.walk(root, followlinks=True)
        paths = [os.path.relpath(os.path.join(folder, file), root) for folder, _, files in walk for file in files]
    known, failures = get_img_extensions(as_set=True), []
    for path in sorted(paths):
        suffix, folder = Path(path).suffix.lower(), Path(path).parent.name
        if Path(path).name.startswith("."):
            continue
        if root.is_file() and suffix == ".tar":  # a .tar in the .tar is a class, too
            suffix, folder = min(known), Path(path).stem
        if suffix in known and names is not None and folder not in names:
            failures.append((path, f"its folder {folder!r} is not in the class map"))
        elif suffix not in known and suffix in SUFFIXES:
            failures.append((path, f"timm's readers take no {suffix} files"))
    return failures
