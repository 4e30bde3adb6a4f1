"""Batches of training images that depend on the seed, the epoch and the position alone.

Not on the number of workers or of processes, nor on what was drawn before: so a run that was cut goes on at the batch
at which it stopped, and N processes see in each step what one would see with N times the batch.

Legend: N images, C channels, (H, W) their size.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler


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


class SeededImages(Dataset):
    """A data set whose random transform is seeded by (seed, epoch, position) for each image."""

    def __init__(self, dataset: Dataset, seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> Any:
        epoch, position = key
        (state,) = np.random.SeedSequence((self.seed, epoch, position)).generate_state(1)
        if torch.utils.data.get_worker_info() is not None:
            seed_all(int(state))
            return self.dataset[position]
        with _kept_generators():  # in the training process itself they also drive dropout
            seed_all(int(state))
            return self.dataset[position]


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


def open_datasets(options, class_map: str) -> tuple[Dataset, Dataset]:
    """The training and the validation set, as timm opens them, without transforms.

    Raises:
        FileNotFoundError: `data_dir` is missing.
        ValueError: timm cannot read it; the message has what it said.
    """
    from pathlib import Path

    from timm.data import create_dataset

    kind = options.dataset.partition("/")[0].lower()
    if options.data_dir is None and kind not in ("hfds", "hfids", "torch", "tfds"):
        raise ValueError("expected data_dir, the folder of the data set: give --data-dir DIR")
    if options.data_dir is not None and kind not in ("hfds", "hfids", "wds") and not Path(options.data_dir).exists():
        if not options.dataset_download:
            raise FileNotFoundError(f"data_dir {options.data_dir} does not exist: give --data-dir DIR")
    found = []
    for split, is_training in ((options.train_split, True), (options.val_split, False)):
        try:
            dataset = create_dataset(
                options.dataset,
                root=options.data_dir,
                split=split,
                class_map=class_map,
                is_training=is_training,
                download=options.dataset_download,
                batch_size=options.batch_size,
                seed=options.seed,
            )
        except ImportError as error:
            raise ValueError(f"data set {options.dataset!r} needs a package that is not installed: {error}") from error
        except Exception as error:  # each reader has its own way to say that it found nothing
            text = " ".join(str(error).split())
            raise ValueError(
                f"cannot open the split {split!r} of {options.data_dir or options.dataset}: "
                f"{type(error).__name__}: {text}"
            ) from error
        found.append(dataset)
    return found[0], found[1]


def train_loader(dataset: Dataset, options, data_config: dict[str, Any], rank: int, world_size: int) -> DataLoader:
    """Shuffled, augmented batches: (N, C, H, W) images and (N,) labels; `set_position` chooses epoch and batch.

    Raises:
        ValueError: fewer images than one update of all processes needs.
    """
    from timm.data import create_transform

    transform = create_transform(
        data_config["input_size"],
        is_training=True,
        no_aug=options.no_aug,
        train_crop_mode=options.train_crop_mode,
        scale=options.scale,
        ratio=options.ratio,
        hflip=options.hflip,
        vflip=options.vflip,
        color_jitter=options.color_jitter,
        color_jitter_prob=options.color_jitter_prob,
        grayscale_prob=options.grayscale_prob,
        gaussian_blur_prob=options.gaussian_blur_prob,
        auto_augment=options.aa,
        interpolation=options.train_interpolation,
        mean=data_config["mean"],
        std=data_config["std"],
        use_prefetcher=_prefetches(options),
    )  # random erasing is done by the training loop, on whole batches
    dataset.transform = transform
    if isinstance(dataset, IterableDataset):
        dataset.set_loader_cfg(num_workers=options.workers)
        return _loader(dataset, options, data_config, batch_size=options.batch_size, drop_last=True)
    order = BatchOrder(len(dataset), options.batch_size, options.seed, rank, world_size)
    if len(order) == 0:
        raise ValueError(
            f"expected at least {options.batch_size * world_size} training images for one step of "
            f"{world_size} x {options.batch_size}, found {len(dataset)} in {options.data_dir}"
        )
    return _loader(SeededImages(dataset, options.seed), options, data_config, batch_sampler=order)


def val_loader(dataset: Dataset, options, data_config: dict[str, Any], rank: int, world_size: int) -> DataLoader:
    """Each validation image once over all processes, in order, under the evaluation's transform."""
    from timm.data import create_transform

    dataset.transform = create_transform(
        data_config["input_size"],
        is_training=False,
        interpolation=data_config["interpolation"],
        mean=data_config["mean"],
        std=data_config["std"],
        crop_pct=data_config["crop_pct"],
        crop_mode=data_config["crop_mode"],
        use_prefetcher=_prefetches(options),
    )
    size = options.batch_size if options.validation_batch_size is None else options.validation_batch_size
    if isinstance(dataset, IterableDataset):
        dataset.set_loader_cfg(num_workers=options.workers)
    elif world_size > 1:
        dataset = torch.utils.data.Subset(dataset, range(rank, len(dataset), world_size))
    return _loader(dataset, options, data_config, batch_size=size)


def set_position(loader, epoch: int, batch: int) -> None:
    """The next pass over the loader is that epoch, from that batch on.

    Raises:
        ValueError: a stream (an iterable data set) cannot start within an epoch.
    """
    order = loader.batch_sampler
    if isinstance(order, BatchOrder):
        order.epoch, order.start = epoch, batch
        return
    if batch:
        raise ValueError("a data set that is a stream cannot be continued within an epoch")
    loader.dataset.set_epoch(epoch)


def _prefetches(options) -> bool:
    return options.device.startswith("cuda") and not options.no_prefetcher


def _loader(dataset: Dataset, options, data_config: dict[str, Any], **arguments) -> DataLoader:
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
