"""Images for a repair: squares with a margin, from which shifted crops are cut; a user's own or synthetic ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixpool.evaluation.model_input import find_model_input
from mixpool.evaluation.photos import load_images, normalize
from mixpool.ops.norm import is_supported_norm
from mixpool.selection.images import batches_of, evaluating
from mixpool.selection.pictures import dead_leaves

MARGIN = 8  # pixels by which a square is larger than the crops
FEW, MOST = 16, 4096  # images: fewer are not to be trusted, more are not taken
NUM_SYNTHETIC = 128
BATCH = 4  # of crops: on a CPU, larger batches leave its cache


class Squares(NamedTuple):
    """Normalised images (N, C, size + margin, size + margin), the side of the crops, and what a user should know."""

    images: Tensor
    size: int
    notes: tuple[str, ...] = ()


class Split(NamedTuple):
    """Squares to fit on, to choose by, and to report on; no image is in two of them, if there are enough."""

    fit: Squares
    choose: Squares
    report: Squares


def squares_for(
    model: nn.Module, images: Tensor | Iterable[Any] | str | Path | None, *, size: int | None = None, seed: int = 0
) -> Squares:
    """The user's images, or synthetic ones.

    Args:
        images: a folder of photos; normalised images (N, C, H, W), or an iterable of images or batches (a data loader's
            (images, labels) too); or None for synthetic pictures. Tensors larger than `size` by 8 pixels are cut at
            several places; smaller ones are continued by reflection at the border.
        size: side of the model's input, pixels; default what its configuration says, or the side of the tensors.
    Raises:
        ValueError: no image, images of several sizes, or not finite ones.
    """
    has_config = hasattr(model, "pretrained_cfg") or hasattr(model, "default_cfg")
    wanted = find_model_input(model) if has_config or images is None or isinstance(images, (str, Path)) else None
    if images is None:
        size = size or wanted.size
        pictures = _as_strong_as_trained(model, dead_leaves(NUM_SYNTHETIC, size + MARGIN, seed), size)
        return Squares(pictures, size, ("no images given: repaired on synthetic pictures; photos repair better",))
    if isinstance(images, (str, Path)):
        size = size or wanted.size
        ratio = min(1.0, wanted.crop_ratio * (size + MARGIN) / size)
        photos = load_images(images, size + MARGIN, MOST, crop_ratio=ratio)
        notes = [f"left out {name}: {reason}" for name, reason in photos.failed]
        return _checked(model, normalize(photos.images, wanted.mean, wanted.std), size, notes)
    batches, count = [], 0
    for batch in batches_of(images):
        batches.append(batch[: MOST - count])
        count += len(batches[-1])
        if count >= MOST:
            break
    if not count:
        raise ValueError("expected at least one image, got none")
    shapes = {tuple(batch.shape[1:]) for batch in batches}
    if len(shapes) > 1:
        raise ValueError(f"expected images of one size, got {sorted(shapes)[0]} and {sorted(shapes)[1]}")
    found = torch.cat([batch.detach().cpu().float() for batch in batches])
    side = min(found.shape[-2:])
    size = size or (wanted.size if wanted is not None and wanted.size <= side else side)
    if side < size:
        raise ValueError(f"expected images of at least {size} pixels, got {tuple(found.shape[-2:])}")
    notes = []
    lacking = [max(0, size + MARGIN - length) for length in found.shape[-2:]]
    if max(lacking):
        (top, bottom), (left, right) = ((n // 2, n - n // 2) for n in lacking)
        found = F.pad(found, (left, right, top, bottom), mode="reflect" if side > max(bottom, right) else "replicate")
        notes.append(
            "the images are hardly larger than the input: shifted ones are continued by reflection "
            f"({max(bottom, right)} px)"
        )
    top, left = ((length - min(length, size + MARGIN)) // 2 for length in found.shape[-2:])
    return _checked(model, found[..., top : top + size + MARGIN, left : left + size + MARGIN], size, notes)


def split(squares: Squares, seed: int = 0) -> Split:
    """70 % of the images to fit on, 15 % to choose by, 15 % (at most 128) to report on; of fewer than 8 all for all."""
    count = len(squares.images)
    if count < 8:
        return Split(squares, squares, squares)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    held = min(128, max(2, round(0.15 * count)))
    parts = order[2 * held :], order[:held], order[held : 2 * held]
    return Split(*(squares._replace(images=squares.images[part.sort().values]) for part in parts))


def crops(squares: Squares, rounds: int, seed: int, batch: int = BATCH) -> Iterator[Tensor]:
    """Batches of crops at random offsets, `rounds` of each image; equal arguments give equal crops."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(rounds):
        for images in squares.images.split(batch):
            spare = [length - squares.size for length in images.shape[-2:]]
            y, x = (int(torch.randint(most + 1, (), generator=generator)) for most in spare)
            yield crop(images, y, x, squares.size)


def crop(images: Tensor, y: int, x: int, size: int) -> Tensor:
    return images[..., y : y + size, x : x + size].contiguous(memory_format=torch.channels_last)


# --- what may be wrong with images ------------------------------------------------------------------------------------


def _checked(model: nn.Module, images: Tensor, size: int, notes: list[str]) -> Squares:
    if len(images) < FEW:
        notes.append(f"only {len(images)} image(s): give {FEW} or more, better 250, to trust the repair")
    low, high = images.min().item(), images.max().item()
    if high > 20:
        notes.append(f"WARNING: the images reach {high:.0f}: they look like bytes that nobody normalised")
    elif low >= 0 and high <= 1:
        notes.append("WARNING: the images lie in 0 to 1: they look as if nobody normalised them")
    else:
        strength = _strength(model, crop(images[:32], 0, 0, size))
        if strength is not None and not 0.25 < strength < 4:
            notes.append(
                f"WARNING: behind the first norm layer the images vary {strength:.2g} times as much as those of the "
                "training: are they normalised as the model wants them?"
            )
    return Squares(images, size, tuple(notes))


def _as_strong_as_trained(model: nn.Module, pictures: Tensor, size: int) -> Tensor:
    """Scaled so that what reaches the first norm layer varies as its running statistics say."""
    strength = _strength(model, crop(pictures[:32], 0, 0, size))
    return pictures if strength is None or not strength > 0 else pictures / strength**0.5


def _strength(model: nn.Module, images: Tensor) -> float | None:
    """Variance that reaches the first norm layer, over its running variance (median over channels); None without."""
    found: list[float] = []

    class Reached(Exception):
        pass

    def look(module: nn.Module, args: tuple) -> None:
        if isinstance(args[0], Tensor) and args[0].ndim == 4 and getattr(module, "running_var", None) is not None:
            found.append((args[0].float().var(dim=(0, 2, 3)) / module.running_var.clamp_min(1e-12)).median().item())
            raise Reached

    handles = [m.register_forward_pre_hook(look) for m in model.modules() if is_supported_norm(m)]
    if not handles:
        return None
    parameter = next(model.parameters(), torch.empty(0))
    try:
        with evaluating(model):
            model(images.to(parameter.device, parameter.dtype))
    except Reached:
        pass
    except RuntimeError:  # the images do not fit the model, which whoever runs it for their sake says better
        return None
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None
