"""The loader of an evaluation: its workers read images and make the bytes of each view; what fails comes by name."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from mixpool.evaluation.dataset import Failure, Images, Stream
from mixpool.evaluation.photos import UnreadableImage, short
from mixpool.evaluation.protocols import Place
from mixpool.evaluation.views import OwnView, SquareView

if TYPE_CHECKING:
    from PIL import Image

View = OwnView | SquareView


@dataclass
class Batch:
    """What the workers send: bytes of each view, (N, 3, side, side), stored channels last, and what failed.

    `checksums` are of the whole pictures: they tell whether two evaluations saw the same ones.
    """

    places: list[Place]
    names: list[str]
    labels: Tensor
    checksums: Tensor
    views: dict[View, Tensor]
    failed: list[Failure]

    def pin_memory(self) -> Batch:
        self.views = {view: images.pin_memory() for view, images in self.views.items()}
        return self


def batches(
    images: Images | Stream, views: Sequence[View], batch_size: int, workers: int, pin_memory: bool
) -> DataLoader:
    """A loader of Batches in the order of the images; a Batch is smaller where images failed."""
    is_stream = isinstance(images, Stream)
    return DataLoader(
        _PreparedStream(images, views) if is_stream else _Prepared(images, views),
        batch_size=batch_size,
        num_workers=min(workers, 1) if is_stream else workers,  # two readers would each get a part, in no fixed order
        collate_fn=_Collate(views),
        pin_memory=pin_memory,
    )


class _Prepared(Dataset):
    """Rank -> (place, name, label, checksum, view by view the bytes), or a Failure."""

    def __init__(self, images: Images, views: Sequence[View]) -> None:
        self.images, self.views = images, views

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, rank: int) -> tuple:
        index = self.images.indices[rank]
        name = self.images.name(index)
        try:
            image, label = self.images.read(index)
        except UnreadableImage as error:
            return name, str(error).replace(f"'{name}'", name)
        return _sample(Place(index, rank), name, image, label, self.views)


class _PreparedStream(IterableDataset):
    def __init__(self, images: Stream, views: Sequence[View]) -> None:
        self.images, self.views = images, views

    def __iter__(self) -> Iterator[tuple]:
        for rank, (name, image, label) in enumerate(self.images):
            is_failure = isinstance(image, str)
            yield (name, image) if is_failure else _sample(Place(rank, rank), name, image, label, self.views)


def _sample(place: Place, name: str, image: Image.Image, label: int, views: Sequence[View]) -> tuple:
    try:
        return place, name, label, zlib.crc32(np.asarray(image)), [view(image) for view in views]
    except Exception as error:  # of one picture among thousands, whatever it is: it should be known by its name
        return name, f"cannot be cropped: {type(error).__name__}: {short(error)}"


class _Collate:
    def __init__(self, views: Sequence[View]) -> None:
        self.views = views

    def __call__(self, samples: list[tuple]) -> Batch:
        read = [sample for sample in samples if isinstance(sample[0], Place)]
        columns = {}
        for number, view in enumerate(self.views):
            if read:
                columns[view] = torch.from_numpy(np.stack([sample[4][number] for sample in read])).permute(0, 3, 1, 2)
        return Batch(
            places=[sample[0] for sample in read],
            names=[sample[1] for sample in read],
            labels=torch.tensor([sample[2] for sample in read], dtype=torch.long),
            checksums=torch.tensor([sample[3] for sample in read], dtype=torch.long),
            views=columns,
            failed=[sample for sample in samples if not isinstance(sample[0], Place)],
        )
