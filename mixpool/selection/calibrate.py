"""How well a modulus stands in for max pooling on images, and folding the best affine map into existing parameters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mixpool.filters.partner import analytic_partner
from mixpool.ops.modes import of_nobody
from mixpool.ops.reference import Group, groups_of
from mixpool.selection.images import MAX_IMAGES, batches_of
from mixpool.selection.predict import pictures_for
from mixpool.selection.stats import FilterStats
from mixpool.stem.module import MixPoolStem

POSITIONS_PER_IMAGE = 1024
NEGLIGIBLE = 1e-6  # share of the largest variance below which a channel is dead


class Fits(NamedTuple):
    """How well a * modulus + b, before the activation, reproduces max pooling for some channels, on images.

    index: (n,) the channels; gain, offset: (n,) least-squares a and b; fidelity: (n,) correlation after the activation.
    """

    index: Tensor
    gain: Tensor
    offset: Tensor
    fidelity: Tensor


@torch.no_grad()
def measure(
    stem: MixPoolStem,
    index: Tensor,
    stats: FilterStats,
    images: Tensor | Iterable[Tensor],
    poolings: Sequence[str],
) -> Fits:
    """Fit each channel's complex pooling to its max pooling on images, before the activation, and correlate after it.

    Least squares over at most 1024 positions of each of at most 512 images, drawn with a fixed seed; the norm layer
    is used as in evaluation. `poolings` names one for each channel of the stem.
    """
    device, dtype = stem.weight.device, stem.weight.dtype
    wanted = set(index.tolist())
    groups = groups_of([name if i in wanted else "" for i, name in enumerate(poolings)], device)
    if not groups:
        nothing = torch.empty(0, device="cpu")
        return Fits(index.cpu(), nothing, nothing, nothing)
    on_device = torch.cat([group.index for group in groups])
    index = on_device.cpu()
    direction = stats.center_frequency[index].to(device)
    weight_imag = analytic_partner(stem.weight.index_select(0, on_device), direction)
    samples: tuple[list[Tensor], list[Tensor]] = ([], [])
    generator = torch.Generator(device="cpu").manual_seed(0)
    was_training = stem.bn is not None and stem.bn.training
    count = 0
    if was_training:
        stem.bn.training = False
    try:
        for batch in batches_of(images, stem.in_channels):
            batch = batch[: MAX_IMAGES - count].to(device, dtype)
            count += len(batch)
            (by_max,) = stem.pool_and_normalize(batch, [Group("max", on_device)])
            by_modulus = torch.cat(stem.pool_and_normalize(batch, groups, weight_imag), dim=1)
            positions = by_max.shape[-2] * by_max.shape[-1]
            drawn = torch.randperm(positions, generator=generator, device="cpu")[:POSITIONS_PER_IMAGE].to(device)
            for kept, pooled in zip(samples, (by_max, by_modulus), strict=True):
                kept.append(pooled.flatten(2)[:, :, drawn].transpose(0, 1).flatten(1).float().cpu())
            if count >= MAX_IMAGES:
                break
    finally:
        if was_training:
            stem.bn.training = True
    if count == 0:
        raise ValueError("expected at least one image, got none")
    by_max, by_modulus = (torch.cat(kept, dim=1) for kept in samples)
    bias = stem.bias if stem.bn is None else stem.bn.bias
    gain, offset = _least_squares(by_modulus, by_max, with_offset=bias is not None)
    fitted = stem.act(by_modulus * gain[:, None] + offset[:, None])
    return Fits(index, gain, offset, _correlation(fitted, stem.act(by_max)))


# --- without images ---------------------------------------------------------------------------------------------------


def has_seen_data(stem: MixPoolStem) -> bool:
    """Whether the norm layer's statistics are those of a training, so that its scales and shifts mean something.

    True without a norm layer, where nothing tells; False for a batch norm as it is created, or without statistics.
    """
    if stem.bn is None:
        return True
    mean, var = stem.bn.running_mean, stem.bn.running_var
    if mean is None or var is None or not (torch.isfinite(mean).all() and torch.isfinite(var).all()):
        return False
    return not bool((mean == 0).all() and (var == 1).all())


@torch.no_grad()
def typical_pictures(stem: MixPoolStem, index: Tensor) -> Tensor:
    """Synthetic pictures as strong as what the stem was trained on, (N, C_in, S, S).

    The running variances of its norm layer tell how strong that was, in the median over the channels `index` (others
    may be dead); without a norm layer the input is taken to be normalised as ImageNet's.
    """
    pictures = pictures_for(stem.weight, stem.stride)
    if stem.bn is None:
        return pictures
    index = index.to(stem.weight.device)
    weight = stem.weight.detach().index_select(0, index).to("cpu", torch.float32)
    expected = stem.bn.running_var.index_select(0, index).float().cpu()
    var = F.conv2d(pictures, weight, stride=stem.stride).var(dim=(0, 2, 3))
    is_alive = (var > NEGLIGIBLE * var.max()) & (expected > NEGLIGIBLE * expected.max())
    ratio = (expected / var)[is_alive]
    return pictures * ratio.median().sqrt() if len(ratio) > 0 else pictures


# --- folding the fits into the parameters -----------------------------------------------------------------------------


@of_nobody()
def calibrate(stem: MixPoolStem, fits: Fits) -> bool:
    """Fold a * modulus + b of the swapped channels into the norm layer, or into the filters where there is none.

    Returns whether anything was folded in. The values before are kept, so that `stock_values` gives them back bit by
    bit; the gain and the offset go to the buffer `calibration`, from which a reloaded model gets them back within
    rounding.
    """
    if stem.bn is not None and stem.bn.weight is None:  # nothing there to scale
        return False
    usable = (fits.gain > 0.05) & torch.isfinite(fits.gain) & torch.isfinite(fits.offset)
    index = fits.index[usable].to(stem.weight.device)
    gain, offset = (v[usable].to(stem.weight.device, torch.float32) for v in (fits.gain, fits.offset))
    stem.calibration[index] = torch.stack([gain, offset], dim=1).to(stem.calibration.dtype)
    before = {name: tensor.clone() for name, tensor in _calibrated_tensors(stem).items()}
    gain, offset = stem.calibration.float().unbind(dim=1)
    after = {name: _apply(name, tensor, gain, offset).to(tensor.dtype) for name, tensor in before.items()}
    for name, tensor in _calibrated_tensors(stem).items():
        tensor.copy_(after[name])
    stem.before_calibration = {name: (after[name], before[name]) for name in before}
    return bool((stem.calibration[:, 0] != 1).any())


@torch.no_grad()
def stock_values(stem: MixPoolStem) -> dict[str, Tensor]:
    """The calibrated parameters with the calibration undone, by their name in the stem.

    Values that have not changed since `calibrate` come back bit by bit, others within rounding.
    """
    gain, offset = stem.calibration.float().unbind(dim=1)
    if bool((gain == 1).all()) and bool((offset == 0).all()):
        return {}
    values = {}
    for name, tensor in _calibrated_tensors(stem).items():
        undone = _undo(name, tensor, gain, offset)
        if stem.before_calibration is not None:
            after, before = (t.to(tensor) for t in stem.before_calibration[name])
            undone = torch.where(tensor == after, before, undone)
        values[name] = undone
    return values


def _calibrated_tensors(stem: MixPoolStem) -> dict[str, Tensor]:
    if stem.bn is not None:
        tensors = {"bn.weight": stem.bn.weight, "bn.bias": stem.bn.bias}
    else:
        tensors = {"weight": stem.weight, "bias": stem.bias}
    return {name: tensor.data for name, tensor in tensors.items() if tensor is not None}


def _apply(name: str, tensor: Tensor, gain: Tensor, offset: Tensor) -> Tensor:
    scaled = tensor * gain.reshape(-1, *[1] * (tensor.ndim - 1))
    return scaled + offset if name.endswith("bias") else scaled


def _undo(name: str, tensor: Tensor, gain: Tensor, offset: Tensor) -> Tensor:
    shifted = tensor - offset if name.endswith("bias") else tensor
    return (shifted / gain.reshape(-1, *[1] * (tensor.ndim - 1))).to(tensor.dtype)


def _least_squares(x: Tensor, y: Tensor, with_offset: bool) -> tuple[Tensor, Tensor]:
    """Per row, a and b that minimise |a x + b - y|^2 (b = 0 if there is no offset)."""
    mean_x, mean_y = (v.mean(dim=1, keepdim=True) * with_offset for v in (x, y))
    x, y = x - mean_x, y - mean_y
    gain = (x * y).sum(dim=1) / x.square().sum(dim=1).clamp_min(torch.finfo(x.dtype).tiny)
    return gain, (mean_y[:, 0] - gain * mean_x[:, 0])


def _correlation(x: Tensor, y: Tensor) -> Tensor:
    """Pearson correlation per row; 0 where a row is constant."""
    x, y = x - x.mean(dim=1, keepdim=True), y - y.mean(dim=1, keepdim=True)
    scale = (x.square().sum(dim=1) * y.square().sum(dim=1)).sqrt()
    return torch.where(scale > 0, (x * y).sum(dim=1) / scale.clamp_min(torch.finfo(x.dtype).tiny), 0.0)
