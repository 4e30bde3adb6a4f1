"""The training and the validation images of a run, opened and compared with each other and with the model."""

from __future__ import annotations

import hashlib
from typing import Any

from torch.utils.data import IterableDataset

from mixpool.evaluation.dataset import STREAMS, Images, open_images, read_class_map
from mixpool.evaluation.photos import short

FEW = 3  # names that a message shows


def open_splits(options) -> tuple[Images | IterableDataset, Images | IterableDataset]:
    """Both splits, as timm reads them, without transforms; the error says what is missing, or if both are the same."""
    kind = options.dataset.partition("/")[0].lower() if "/" in options.dataset else ""
    if options.data_dir is None and kind not in ("hfds", "hfids", "torch", "tfds"):
        raise ValueError("expected data_dir, the folder of the data set: give --data-dir DIR")
    if kind in STREAMS:
        if options.recovery_interval:
            raise ValueError("a stream cannot be continued within an epoch: leave out recovery_interval")
        return _stream(options, options.train_split, True), _stream(options, options.val_split, False)
    found = []
    for split in (options.train_split, options.val_split):
        images = open_images(
            options.data_dir or "",
            dataset=options.dataset,
            split=split,
            class_map=options.class_map or None,
            download=options.dataset_download,
        )
        if images.left_out and options.on_error == "raise":
            name, reason = images.left_out[0]
            raise ValueError(
                f"{len(images.left_out)} image(s) of the split {split!r} of {images.origin} would be left out, first "
                f"{name}: {reason}; --on-error skip trains without them"
            )
        found.append(images)
    roots = [getattr(getattr(images.dataset, "reader", None), "root", None) for images in found]
    if roots[0] is not None and str(roots[0]) == str(roots[1]):
        raise ValueError(
            f"the splits {options.train_split!r} and {options.val_split!r} are the same images, those of {roots[0]}: "
            "expected a folder (or .tar) for each split in data_dir"
        )
    return found[0], found[1]


def _stream(options, split: str, is_training: bool) -> IterableDataset:
    from timm.data import create_dataset

    try:
        return create_dataset(
            options.dataset,
            root=options.data_dir,
            split=split,
            class_map=read_class_map(options.class_map) if options.class_map else None,
            is_training=is_training,
            download=options.dataset_download,
            batch_size=options.batch_size,
            seed=options.seed,
        )
    except (Exception, SystemExit) as error:  # each reader has its own way to say that it found nothing
        raise ValueError(f"cannot open the split {split!r} of {options.dataset}: {short(error)}") from error


def classes_of(images: Any) -> dict[str, int] | None:
    """The names and labels of a data set of folders or tars; None for those that do not tell."""
    return getattr(getattr(getattr(images, "dataset", images), "reader", None), "class_to_idx", None) or None


def check_classes(train: Any, val: Any, num_outputs: int, has_class_map: bool) -> None:
    """Raise ValueError, with what to change, if both splits' classes do not fit each other or the model's outputs."""
    names, val_names = classes_of(train), classes_of(val)
    if names is None:
        return
    if val_names is not None and val_names != names and not has_class_map:
        only = sorted(set(names) ^ set(val_names))
        raise ValueError(
            f"the labels of the training and the validation split differ ({len(names)} and {len(val_names)} classes; "
            f"in one of them only: {', '.join(only[:FEW])}{', ...' if len(only) > FEW else ''}): labels are numbered "
            "by folder name, so both splits need the same folders, or a class_map"
        )
    num_classes = max(names.values(), default=-1) + 1
    if num_classes > num_outputs or (num_classes != num_outputs and not has_class_map):
        raise ValueError(
            f"the data set has {num_classes} classes and the model {num_outputs} outputs: set num_classes: "
            f"{num_classes}, or give a class_map (the names of all {num_outputs} classes in order)"
        )


def fingerprint(train: Any, val: Any) -> dict[str, Any]:
    """What tells one data set from another without reading it, so that a run cannot go on with other images."""
    text = repr([sorted((classes_of(images) or {}).items()) for images in (train, val)])
    # A stream only estimates its length, and that from the number of workers.
    lengths = [None if isinstance(images, IterableDataset) else len(images) for images in (train, val)]
    return {
        "num_train": lengths[0],
        "num_val": lengths[1],
        "classes": hashlib.sha256(text.encode()).hexdigest()[:16],
    }
