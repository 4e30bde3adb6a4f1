"""Batches of training images that depend on the seed, the epoch and the position alone.

Not on the number of workers or of processes, nor on what was drawn before: so a run that was cut goes on at the batch
at which it stopped, and N processes see in each step what one would see with N times the batch.

Legend: N images, C channels, (H, W) their size.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from mixpool.evaluation.dataset import Images
from mixpool.evaluation.photos import UnreadableImage

# Of the options, those that timm's transform has by the same names.
AUGMENTATIONS = ("no_aug", "train_crop_mode", "scale", "ratio", "hflip", "vflip")
AUGMENTATIONS += ("color_jitter", "color_jitter_prob", "grayscale_prob", "gaussian_blur_prob")
MODES = {1: "L", 3: "RGB"}  # Pillow's names of images with so many channels


class BatchOrder(Sampler):
    """The positions of each batch of one process, as (epoch, position) pairs.

    The images are permuted by (seed, epoch). Batch b of all processes together is the b-th stretch of
    `world_size * batch_size` of them, of which process `rank` has its share; the rest, too small for a batch, is left
    out of this epoch.
    """

    def __init__(self, num_images: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        self.num_images, self.batch_size, self.seed = num_images, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.epoch = 0
        self.start = 0  # the first batch to give, for a run that goes on within an epoch

    def __len__(self) -> int:
        return self.num_images // (self.batch_size * self.world_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = np.random.default_rng((self.seed, self.epoch))
        order = generator.permutation(self.num_images).tolist()
        for batch in range(self.start, len(self)):
            first = (batch * self.world_size + self.rank) * self.batch_size
            yield [(self.epoch, position) for position in order[first : first + self.batch_size]]


class Prepared(Dataset):
    """Images under a transform, and what to do with those that cannot be read.

    With on_error "raise", an image that cannot be read is an error that names it. With "skip" it is marked in `failed`,
    which all workers share, and `__getitem__` returns None for it.
    """

    def __init__(self, images: Images, transform: Callable, channels: int, on_error: str) -> None:
        if channels not in MODES:
            raise ValueError(f"expected a model of gray or colour images (1 or 3 channels), got one of {channels}")
        self.images, self.transform, self.mode, self.on_error = images, transform, MODES[channels], on_error
        self.failed = torch.zeros(len(images), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.images)

    def read(self, position: int) -> tuple[Any, int] | None:
        name = self.images.name(position)
        try:
            image, label = self.images.read(position)
        except UnreadableImage as error:
            if self.on_error == "raise":
                raise ValueError(
                    f"cannot read {name} ({error}): repair or remove it, or give --on-error skip"
                ) from None
            self.failed[position] = True
            return None
        if label < 0:
            raise ValueError(f"expected a class number for {name}, got {label}")
        return self.transform(image.convert(self.mode)), label


class TrainingImages(Prepared):
    """Images by (epoch, position), whose random transform is seeded by (seed, epoch, position) for each of them.

    In the place of one that is skipped comes the next one that can be read, with its own label.
    """

    def __init__(self, images: Images, transform: Callable, channels: int, on_error: str, seed: int) -> None:
        super().__init__(images, transform, channels, on_error)
        self.seed = seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Any, int]:
        epoch, position = key
        (state,) = np.random.SeedSequence((self.seed, epoch, position)).generate_state(1)
        if torch.utils.data.get_worker_info() is not None:
            seed_all(int(state))
            return self._first_readable(position)
        with _kept_generators():  # in the training process itself they also drive dropout
            seed_all(int(state))
            return self._first_readable(position)

    def _first_readable(self, position: int) -> tuple[Any, int]:
        for step in range(len(self)):
            found = self.read((position + step) % len(self))
            if found is not None:
                return found
        raise ValueError(f"none of the {len(self)} images of {self.images.origin} can be read")


class ValidationImages(Prepared):
    """Every `world_size`-th image from `rank` on; one that is skipped comes as zeros with the label -1."""

    def __init__(self, images: Images, transform: Callable, channels: int, on_error: str, rank: int, world_size: int):
        super().__init__(images, transform, channels, on_error)
        self.positions = range(rank, len(images), world_size)

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, number: int) -> tuple[Any, int]:
        found = self.read(self.positions[number])
        if found is not None:
            return found
        from PIL import Image

        return self.transform(Image.new(self.mode, (64, 64))), -1


def seed_all(seed: int) -> None:
    """Seed the generators that transforms draw from: Python's, NumPy's and PyTorch's."""
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # that of the CPU alone: torch.manual_seed would also seed CUDA's


@contextmanager
def _kept_generators() -> Iterator[None]:
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


# --- loaders ----------------------------------------------------------------------------------------------------------


def train_loader(images: Images | IterableDataset, options, data_config: dict[str, Any], rank: int, world_size: int):
    """Shuffled, augmented batches: (N, C, H, W) images and (N,) labels; `set_position` chooses epoch and batch.

    Raises:
        ValueError: fewer images than one update of all processes needs, or an augmentation that timm does not know.
    """
    transform = _transform(
        data_config,
        options,
        is_training=True,
        **{name: getattr(options, name) for name in AUGMENTATIONS},
        auto_augment=options.aa,
        interpolation=options.train_interpolation,
    )  # random erasing is done by the training loop, on whole batches
    if isinstance(images, IterableDataset):
        images.transform = transform
        images.set_loader_cfg(num_workers=options.workers)
        return _loader(images, options, data_config, batch_size=options.batch_size, drop_last=True)
    order = BatchOrder(len(images), options.batch_size, options.seed, rank, world_size)
    if len(order) == 0:
        raise ValueError(
            f"expected at least {options.batch_size * world_size} training images for one step of "
            f"{world_size} x {options.batch_size}, found {len(images)} in {images.origin}"
        )
    prepared = TrainingImages(images, transform, data_config["input_size"][0], options.on_error, options.seed)
    return _loader(prepared, options, data_config, batch_sampler=order)


def val_loader(images: Images | IterableDataset, options, data_config: dict[str, Any], rank: int, world_size: int):
    """Each validation image once over all processes, in order, under the evaluation's transform."""
    transform = _transform(
        data_config,
        options,
        is_training=False,
        interpolation=data_config["interpolation"],
        crop_pct=data_config["crop_pct"],
        crop_mode=data_config["crop_mode"],
    )
    size = options.batch_size if options.validation_batch_size is None else options.validation_batch_size
    if isinstance(images, IterableDataset):
        images.transform = transform
        images.set_loader_cfg(num_workers=options.workers)
        return _loader(images, options, data_config, batch_size=size)
    channels = data_config["input_size"][0]
    prepared = ValidationImages(images, transform, channels, options.on_error, rank, world_size)
    return _loader(prepared, options, data_config, batch_size=size)


def set_position(loader, epoch: int, batch: int) -> None:
    """The next pass over the loader is that epoch, from that batch on; a stream always starts at 0."""
    order = loader.batch_sampler
    if isinstance(order, BatchOrder):
        order.epoch, order.start = epoch, batch
        return
    assert batch == 0, "a stream has no positions; open_splits refuses checkpoints within an epoch"
    loader.dataset.set_epoch(epoch)


def unreadable(loader) -> list[str]:
    """Names of the images of a loader that were skipped so far, by any of its workers."""
    dataset = loader.dataset
    if not isinstance(dataset, Prepared):
        return []
    return [dataset.images.name(position) for position in dataset.failed.nonzero()[:, 0].tolist()]


def first_images(loader, data_config: dict[str, Any], count: int) -> Tensor:
    """(count, C, H, W) images as the model gets them, to try it on; zeros if the data set is a stream."""
    dataset = loader.dataset
    if isinstance(dataset, IterableDataset):
        return torch.zeros(count, *data_config["input_size"])
    stack = torch.stack([torch.as_tensor(dataset[(0, position % len(dataset))][0]) for position in range(count)])
    if stack.dtype == torch.uint8:  # with the prefetcher, which normalises on the GPU
        mean, std = (torch.tensor(data_config[name]).view(-1, 1, 1) for name in ("mean", "std"))
        stack = (stack.float() / 255 - mean) / std
    return stack


def evaluation_images(images: Images, data_config: dict[str, Any], count: int) -> Tensor:
    """(count, C, H, W) images, evenly spread over a data set, as in an evaluation; ValueError if it has fewer."""
    from timm.data import create_transform

    if isinstance(images, IterableDataset):
        raise ValueError("convert_images needs a data set with positions, not a stream")
    if len(images) < count:
        raise ValueError(f"expected {count} training images (convert_images), found {len(images)}")
    names = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
    transform = create_transform(**{name: data_config[name] for name in names})
    prepared = ValidationImages(images, transform, data_config["input_size"][0], "raise", 0, 1)
    return torch.stack([prepared[(2 * i + 1) * len(images) // (2 * count)][0] for i in range(count)])


def _transform(data_config: dict[str, Any], options, **arguments) -> Callable:
    from timm.data import create_transform

    try:
        return create_transform(
            data_config["input_size"],
            mean=data_config["mean"],
            std=data_config["std"],
            use_prefetcher=_prefetches(options),
            **arguments,
        )
    except (AssertionError, ValueError, TypeError, KeyError, IndexError) as error:  # timm has no one kind of its own
        raise ValueError(f"cannot build the transform of the images: {type(error).__name__} {error}") from error


def _prefetches(options) -> bool:
    return options.device.startswith("cuda") and not options.no_prefetcher


def _loader(dataset: Dataset, options, data_config: dict[str, Any], **arguments):
    from timm.data.loader import PrefetchLoader, fast_collate

    prefetches = _prefetches(options)
    loader = DataLoader(
        dataset,
        num_workers=options.workers,
        collate_fn=fast_collate if prefetches else None,
        pin_memory=options.pin_mem and options.device.startswith("cuda"),  # else torch warns that it does nothing
        persistent_workers=options.workers > 0,
        generator=torch.Generator(),  # else each pass would draw the workers' seed from the generator of the training
        **arguments,
    )
    if not prefetches:
        return loader
    return PrefetchLoader(
        loader,
        mean=data_config["mean"],
        std=data_config["std"],
        channels=data_config["input_size"][0],
        device=torch.device(options.device),
    )
