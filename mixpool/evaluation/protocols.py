"""The protocols of an evaluation: which crops of an image a model sees, and what is taken from its outputs.

A protocol knows a view, which turns a photo into one square of bytes in the loader's workers; its frames, which are
cut from the view on the model's device; and what it measures, one value per image. It never runs a model.

Sizes are in pixels of the model's input, s x s (224 usually). The papers' margins are added to s, whatever it is: a
model of 227 sees crops of a 235 square where one of 224 sees crops of 232, so that a shift by k pixels is one by k.

    protocol            view                      frames
    accuracy            the model's own           1
    accuracy-wcnn       Resize s, crop s          1
    consistency         Resize s+32, crop s+32    2 crops at offsets 0 .. 31 per axis, drawn for each image
    consistency-shared  the same                  the same, drawn for each 8 successive images
    circular            the same                  the centre crop rolled twice by -32 .. 31 per axis
    flips (-raw)        Resize s+8, crop s+8      25 crops: offsets 0 .. 8 to the side, down and along the diagonal
    kl (-raw)           Resize 2s+16, crop 2s+16  49 crops of 2s at offsets 0 .. 16, each halved: shifts of half a pixel

Resize is of the shorter side, bilinear with antialiasing (torchvision's on PIL images, as the papers have it); every
crop but those is of the centre. All models see the same pixels, but for "accuracy", which follows the model's own
configuration. Frames are normalised with the model's mean and std; "-raw" ones stay in [0, 1], as in the released code
of Leterme et al. (github.com/hubert-leterme/wcnn), whose transform of the shifts ends without Normalize.

Legend: N images of a batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixpool.data import IMAGENET_MEAN, IMAGENET_STD
from mixpool.metrics import flip_curve, kl_divergence, shift_consistency, top_k
from mixpool.stability import DIRECTIONS

if TYPE_CHECKING:
    from PIL import Image

MARGIN = 32  # Zhang's and the circular shifts', pixels
MAX_SHIFT = 8  # of flips and KL, pixels
GROUP = 8  # images that share their offsets in Zhang's own evaluation, which runs with batches of 8
MIN_CLASSES_TOP5 = 6  # with fewer, top-5 is 100 % for any model

# What a protocol draws from (seed, this, image): each has numbers of its own.
_CONSISTENCY, _SHARED, _CIRCULAR = 1, 2, 3


class Place(NamedTuple):
    """Where an image stands: its number in the whole dataset, and its rank among those that are evaluated."""

    index: int
    rank: int


# --- views: from a photo to a square of bytes -------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelInput:
    """What a model wants for its input, and how its own evaluation crops it (timm's names).

    Attributes:
        size: side of the square, pixels.
        crop_ratio: side of the crop over the resized shorter side, before the crop.
        interpolation, crop_mode: as timm's evaluation transform takes them.
        mean, std: of each channel, of images in [0, 1].
    """

    size: int = 224
    crop_ratio: float = 0.875
    interpolation: str = "bilinear"
    crop_mode: str = "center"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self) -> None:
        if self.size < 1 or not 0 < self.crop_ratio <= 1:
            raise ValueError(f"expected a size of at least 1 and a crop_ratio in (0, 1], got {self}")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError(f"expected three means and positive stds of RGB images, got {self}")


def find_model_input(model: nn.Module) -> ModelInput:
    """What timm's configuration of the model says; ImageNet's usual settings (256/224) for any other model.

    Raises:
        ValueError: the model's input is no RGB square.
    """
    if not hasattr(model, "pretrained_cfg") and not hasattr(model, "default_cfg"):
        return ModelInput()
    from timm.data import resolve_model_data_config

    config = resolve_model_data_config(model)
    channels, height, width = config["input_size"]
    if channels != 3 or height != width:
        raise ValueError(f"expected a model of square RGB images, got one of {channels} x {height} x {width}")
    names = ("crop_pct", "interpolation", "crop_mode", "mean", "std")
    ratio, interpolation, crop_mode, mean, std = (config[name] for name in names)
    return ModelInput(height, ratio, interpolation, crop_mode, tuple(mean), tuple(std))


@dataclass(frozen=True)
class SquareView:
    """Resize(side), bilinear, then CenterCrop(side): (side, side, 3) uint8."""

    side: int

    def __call__(self, image: Image.Image) -> np.ndarray:
        from torchvision.transforms import functional

        return np.array(functional.center_crop(functional.resize(image, self.side), [self.side, self.side]))


@dataclass(frozen=True)
class OwnView:
    """The evaluation transform of timm for a model's own configuration, up to the bytes: (size, size, 3) uint8."""

    input: ModelInput

    def __call__(self, image: Image.Image) -> np.ndarray:
        return np.asarray(_timm_transform(self.input)(image)).transpose(1, 2, 0)  # an array in older versions of timm


@functools.lru_cache(maxsize=16)
def _timm_transform(model: ModelInput) -> Callable[[Image.Image], np.ndarray]:
    from timm.data.transforms_factory import transforms_imagenet_eval

    return transforms_imagenet_eval(
        img_size=model.size,
        crop_pct=model.crop_ratio,
        crop_mode=model.crop_mode,
        interpolation=model.interpolation,
        mean=model.mean,
        use_prefetcher=True,  # stops at (3, size, size) bytes
    )


# --- protocols --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Accuracy:
    """Top-1 and top-5 accuracy of one crop: the model's own evaluation crop, or wcnn's "onecrop" (Resize s, crop s)."""

    view: OwnView | SquareView
    suffix: str = ""
    num_frames = 1
    is_normalized = True

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
        draws: pairs of crops per image, 5 in his runs; the values are their means.
    """

    size: int
    group: int = 1
    draws: int = 1
    is_normalized = True

    @property
    def view(self) -> SquareView:
        return SquareView(self.size + MARGIN)

    @property
    def num_frames(self) -> int:
        return 2 * self.draws

    def offsets(self, place: Place, seed: int) -> np.ndarray:
        """(frames, 2) offsets (y, x) of an image's crops, 0 to 31."""
        stream, number = (_CONSISTENCY, place.index) if self.group == 1 else (_SHARED, place.rank // self.group)
        return _draw((seed, stream, number), 2 * self.num_frames, MARGIN).reshape(-1, 2)

    def frames(self, images: Tensor, places: Sequence[Place], seed: int) -> Iterator[Tensor]:
        offsets = [self.offsets(place, seed) for place in places]
        for frame in range(self.num_frames):
            corners = [tuple(own[frame]) for own in offsets]
            yield torch.stack([_crop(image, *corner, self.size) for image, corner in zip(images, corners, strict=True)])

    def measure(self, outputs: Iterator[Tensor], labels: Tensor) -> dict[str, Tensor]:
        """shift_consistency or shift_consistency_shared: (N,) shares."""
        classes = [logits.argmax(dim=1) for logits in outputs]
        same = [shift_consistency(*pair).double() for pair in zip(classes[::2], classes[1::2], strict=True)]
        return {"shift_consistency" + ("" if self.group == 1 else "_shared"): torch.stack(same).mean(dim=0)}


@dataclass(frozen=True)
class Circular:
    """How often two circular shifts of an image get the same class: Chaman and Dokmanic 2021, arXiv 2011.14214.

    The centre crop is rolled, so nothing enters and nothing leaves, but an edge runs through the picture. Shifts of
    -32 .. 31 pixels along each axis, drawn for each image by the seed and its number.
    """

    size: int
    num_frames = 2
    is_normalized = True

    @property
    def view(self) -> SquareView:
        return SquareView(self.size + MARGIN)

    def frames(self, images: Tensor, places: Sequence[Place], seed: int) -> Iterator[Tensor]:
        start = MARGIN // 2
        images = _crop(images, start, start, self.size)
        drawn = [_draw((seed, _CIRCULAR, place.index), 4, 2 * MARGIN).reshape(2, 2) - MARGIN for place in places]
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
    is_normalized: bool = True

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
        curves = [flip_curve(classes[:, frames]) for frames in _frames_of_directions(MAX_SHIFT)]
        return {"flip_probability" + ("" if self.is_normalized else "_raw"): torch.stack(curves, dim=1)}


@dataclass(frozen=True)
class KL:
    """KL divergence in nats from the first crop to crops moved by half pixels: wcnn's geometry, Leterme et al.

    Crops of twice the input's side, at offsets of whole pixels, each reduced to half by PIL's bilinear filter: to the
    model the picture moves by 0.5 .. 8 pixels. The first crop, which is p_0, is shared by all directions.
    """

    size: int
    is_normalized: bool = True

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
        return {"kl" + ("" if self.is_normalized else "_raw"): moved.unflatten(1, (len(DIRECTIONS), -1))}


Protocol = Accuracy | Consistency | Circular | Flips | KL

PROTOCOLS: dict[str, Callable[[ModelInput], Protocol]] = {
    "accuracy": lambda model: Accuracy(OwnView(model)),
    "accuracy-wcnn": lambda model: Accuracy(SquareView(model.size), "_wcnn"),
    "consistency": lambda model: Consistency(model.size),
    "consistency-shared": lambda model: Consistency(model.size, group=GROUP),
    "circular": lambda model: Circular(model.size),
    "flips": lambda model: Flips(model.size),
    "flips-raw": lambda model: Flips(model.size, is_normalized=False),
    "kl": lambda model: KL(model.size),
    "kl-raw": lambda model: KL(model.size, is_normalized=False),
}
NEED_LABELS = ("accuracy", "accuracy-wcnn")


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


def _frames_of_directions(last: int) -> list[list[int]]:
    """Numbers of the frames of each direction, the common first one included."""
    return [[0, *range(1 + i * last, 1 + (i + 1) * last)] for i in range(len(DIRECTIONS))]


def _crop(images: Tensor, y: int, x: int, size: int) -> Tensor:
    return images[..., y : y + size, x : x + size]


def _draw(key: tuple[int, ...], count: int, stop: int) -> np.ndarray:
    """`count` numbers from 0 to stop - 1, a power of two, by the key alone."""
    return np.random.SeedSequence(key).generate_state(count).astype(np.int64) % stop
