"""The protocols of an evaluation: which crops of an image a model sees, and what is taken from its outputs.

A protocol knows a view, which turns a photo into one square of bytes in the loader's workers; its frames, which are
cut from the view on the model's device; and what it measures, one value per image. It never runs a model.

Sizes are in pixels of the model's input, s x s (224 usually). The papers' margins are added to s, whatever it is: a
model of 227 sees crops of a 235 square where one of 224 sees crops of 232, so that a shift by k pixels is one by k.

    protocol            view                      frames
    accuracy            the model's own           1
    accuracy-wcnn       Resize s, crop s          1
    consistency         Resize s+m, crop s+m      2 crops at offsets 0 .. 31 per axis, drawn for each image
    consistency-shared  the same                  the same, drawn for each 8 successive images
    circular            the same                  the centre crop rolled twice by -m .. m-1 per axis
    flips               Resize s+8, crop s+8      25 crops: offsets 0 .. 8 to the side, down and along the diagonal
    kl                  Resize 2s+16, crop 2s+16  49 crops of 2s at offsets 0 .. 16, each halved: shifts of half a pixel

The margin m is the papers' 32. That is a whole period of a picture of 32 pixels, so below 64 pixels it is s // 7, as 32
of 224, with the offsets 0 .. m: of a CIFAR image, 4. Flips and KL count in pixels, 8 at most, for all sizes.

Resize is of the shorter side, bilinear with antialiasing (torchvision's on PIL images, as the papers have it); every
crop but those is of the centre. All models see the same pixels, but for "accuracy", which follows the model's own
configuration. Frames are normalised with the model's mean and std. (The released code of Leterme et al. leaves those of
the shifts in [0, 1]: github.com/hubert-leterme/wcnn, whose transform ends without Normalize.)

Legend: N images of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mixpool.evaluation.metrics import flip_curve, kl_divergence, shift_consistency, top_k
from mixpool.evaluation.model_input import ModelInput
from mixpool.evaluation.shifts import DIRECTIONS
from mixpool.evaluation.views import OwnView, SquareView

MARGIN, SMALL = 32, 64  # Zhang's and the circular shifts', and the side below which it shrinks; pixels
MAX_SHIFT = 8  # of flips and KL, pixels
GROUP = 8  # images that share their offsets in Zhang's own evaluation, which runs with batches of 8
MIN_CLASSES_TOP5 = 6  # with fewer, top-5 is 100 % for any model

# What a protocol draws from (seed, this, image): each has numbers of its own.
_CONSISTENCY, _SHARED, _CIRCULAR = 1, 2, 3


class Place(NamedTuple):
    """Where an image stands: its number in the whole dataset, and its rank among those that are evaluated."""

    index: int
    rank: int


# --- protocols --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Accuracy:
    """Top-1 and top-5 accuracy of one crop: the model's own evaluation crop, or wcnn's "onecrop" (Resize s, crop s)."""

    view: OwnView | SquareView
    suffix: str = ""
    num_frames = 1

    def frames(self, images: Tensor, places: Sequence[Place], seed: int) -> Iterator[Tensor]:
        yield images

    def measure(self, outputs: Iterator[Tensor], labels: Tensor) -> dict[str, Tensor]:
        """top1 and, for 6 classes or more, top5: (N,) shares."""
        (logits,) = outputs
        names = {"top1": 1, "top5": 5} if logits.shape[1] >= MIN_CLASSES_TOP5 else {"top1": 1}
        return {name + self.suffix: top_k(logits, labels, k) for name, k in names.items()}


@dataclass(frozen=True)
class Consistency:
    """How often two crops of an image, at random offsets, get the same class: Zhang 2019, arXiv 1904.11486.

    His code draws both offsets anew for each batch of 8, for 5 passes, unseeded. Here each image has offsets of its own
    (by the seed and the image's number in the dataset, so the same whatever the batch size, the order and the number
    of workers), or, with `group=8`, each 8 successive images share theirs as in his runs.

    Attributes:
        size: side of the crops, pixels.
        group: images that share their offsets; 1: none do.
    """

    size: int
    group: int = 1
    num_frames = 2

    @property
    def view(self) -> SquareView:
        return SquareView(self.size + margin(self.size))

    def offsets(self, place: Place, seed: int) -> np.ndarray:
        """(frames, 2) offsets (y, x) of an image's crops, 0 to 31; of a small one 0 to its margin."""
        stream, number = (_CONSISTENCY, place.index) if self.group == 1 else (_SHARED, place.rank // self.group)
        count = MARGIN if self.size >= SMALL else margin(self.size) + 1  # Zhang's randint(32) leaves the last one out
        return _draw((seed, stream, number), 4, count).reshape(2, 2)

    def frames(self, images: Tensor, places: Sequence[Place], seed: int) -> Iterator[Tensor]:
        offsets = [self.offsets(place, seed) for place in places]
        for frame in range(self.num_frames):
            corners = [tuple(own[frame]) for own in offsets]
            yield torch.stack([_crop(image, *corner, self.size) for image, corner in zip(images, corners, strict=True)])

    def measure(self, outputs: Iterator[Tensor], labels: Tensor) -> dict[str, Tensor]:
        """shift_consistency or shift_consistency_shared: (N,) shares."""
        same = shift_consistency(*(logits.argmax(dim=1) for logits in outputs))
        return {"shift_consistency" + ("" if self.group == 1 else "_shared"): same}


@dataclass(frozen=True)
class Circular:
    """How often two circular shifts of an image get the same class: Chaman and Dokmanic 2021, arXiv 2011.14214.

    The centre crop is rolled, so nothing enters and nothing leaves, but an edge runs through the picture. Shifts of
    -m .. m - 1 pixels along each axis, m = `margin(size)`, drawn for each image by the seed and its number.
    """

    size: int
    num_frames = 2

    @property
    def view(self) -> SquareView:
        return SquareView(self.size + margin(self.size))

    def frames(self, images: Tensor, places: Sequence[Place], seed: int) -> Iterator[Tensor]:
        most = margin(self.size)
        images = _crop(images, most // 2, most // 2, self.size)
        drawn = [_draw((seed, _CIRCULAR, place.index), 4, 2 * most).reshape(2, 2) - most for place in places]
        for frame in range(self.num_frames):
            shifts = [own[frame].tolist() for own in drawn]
            yield torch.stack([image.roll(shift, (-2, -1)) for image, shift in zip(images, shifts, strict=True)])

    def measure(self, outputs: Iterator[Tensor], labels: Tensor) -> dict[str, Tensor]:
        """circular_consistency: (N,) shares."""
        return {"circular_consistency": shift_consistency(*(logits.argmax(dim=1) for logits in outputs))}


@dataclass(frozen=True)
class Flips:
    """How often the class changes between crops k = 1 .. 8 pixels apart: wcnn's geometry, Leterme et al. 2212.00394.

    Nine crops along each direction, the first of which all directions share; all 9 - k pairs at a distance of k count.
    """

    size: int

    @property
    def view(self) -> SquareView:
        return SquareView(self.size + MAX_SHIFT)

    @property
    def num_frames(self) -> int:
        return len(_offsets(MAX_SHIFT))

    def frames(self, images: Tensor, places: Sequence[Place], seed: int) -> Iterator[Tensor]:
        for y, x in _offsets(MAX_SHIFT):
            yield _crop(images, y, x, self.size)

    def measure(self, outputs: Iterator[Tensor], labels: Tensor) -> dict[str, Tensor]:
        """flip_probability: (N, 3, 8) shares, by direction and distance."""
        classes = torch.stack([logits.argmax(dim=1) for logits in outputs], dim=1)
        curves = [flip_curve(classes[:, frames]) for frames in frames_of_directions(MAX_SHIFT)]
        return {"flip_probability": torch.stack(curves, dim=1)}


@dataclass(frozen=True)
class KL:
    """KL divergence in nats from the first crop to crops moved by half pixels: wcnn's geometry, Leterme et al.

    Crops of twice the input's side, at offsets of whole pixels, each reduced to half by PIL's bilinear filter: to the
    model the picture moves by 0.5 .. 8 pixels. The first crop, which is p_0, is shared by all directions.
    """

    size: int

    @property
    def view(self) -> SquareView:
        return SquareView(2 * (self.size + MAX_SHIFT))

    @property
    def num_frames(self) -> int:
        return len(_offsets(2 * MAX_SHIFT))

    def frames(self, images: Tensor, places: Sequence[Place], seed: int) -> Iterator[Tensor]:
        for y, x in _offsets(2 * MAX_SHIFT):
            yield halved(_crop(images, y, x, 2 * self.size))

    def measure(self, outputs: Iterator[Tensor], labels: Tensor) -> dict[str, Tensor]:
        """kl: (N, 3, 16) nats, by direction and shift."""
        first = next(outputs)
        moved = torch.stack([kl_divergence(first, logits) for logits in outputs], dim=1)
        return {"kl": moved.unflatten(1, (len(DIRECTIONS), -1))}


Protocol = Accuracy | Consistency | Circular | Flips | KL

PROTOCOLS: dict[str, Callable[[ModelInput], Protocol]] = {
    "accuracy": lambda model: Accuracy(OwnView(model)),
    "accuracy-wcnn": lambda model: Accuracy(SquareView(model.size), "_wcnn"),
    "consistency": lambda model: Consistency(model.size),
    "consistency-shared": lambda model: Consistency(model.size, group=GROUP),
    "circular": lambda model: Circular(model.size),
    "flips": lambda model: Flips(model.size),
    "kl": lambda model: KL(model.size),
}
NEED_LABELS = ("accuracy", "accuracy-wcnn")


def margin(size: int) -> int:
    """Pixels beyond an input of this side from which consistency and circular shifts are drawn; at least 1."""
    return MARGIN if size >= SMALL else max(1, size // 7)


# --- frames -----------------------------------------------------------------------------------------------------------


def halved(images: Tensor) -> Tensor:
    """Bytes (N, 3, 2s, 2s) reduced to (N, 3, s, s) by PIL's bilinear filter, to the bit."""
    if images.device.type != "cpu":  # torch has the filter for bytes on CPUs alone
        return halved_in_float(images)
    return F.interpolate(images, [side // 2 for side in images.shape[-2:]], mode="bilinear", antialias=True)


def halved_in_float(images: Tensor) -> Tensor:
    """The same in float32, with PIL's rounding after each axis; no sum lies so close to a tie that float32 turns it."""
    out = images.float()
    height, width = images.shape[-2:]
    for size in ((height, width // 2), (height // 2, width // 2)):
        out = F.interpolate(out, size, mode="bilinear", antialias=True).add_(0.5).floor_()
    return out.to(torch.uint8)


def _offsets(last: int) -> list[tuple[int, int]]:
    """(y, x) of the frames: the first, then 1 .. last along each direction."""
    moved = [(k * y, k * x) for y, x in DIRECTIONS.values() for k in range(1, last + 1)]
    return [(0, 0), *moved]


def frames_of_directions(last: int) -> list[list[int]]:
    """Numbers of the frames of each direction, the common first one included."""
    return [[0, *range(1 + i * last, 1 + (i + 1) * last)] for i in range(len(DIRECTIONS))]


def _crop(images: Tensor, y: int, x: int, size: int) -> Tensor:
    return images[..., y : y + size, x : x + size]


def _draw(key: tuple[int, ...], count: int, stop: int) -> np.ndarray:
    """`count` numbers from 0 to stop - 1, by the key alone; `stop` is far below 2^32, so all are as likely."""
    return np.random.SeedSequence(key).generate_state(count).astype(np.int64) % stop
