"""Which channels take the modulus: from their filters alone, or also from how they pool real images.

The thresholds below come from `python -m benchmarks.selection`; its records and its page say how.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from mixpool.filters import FilterStats, analytic_partner, analyze
from mixpool.plan import ChannelPlan
from mixpool.reference import Channels

if TYPE_CHECKING:
    from mixpool.layers import MixPoolStem

Select = str | Sequence[bool] | Callable[[FilterStats], Sequence[bool]]

# From the weights alone, in units of the convolution's stride.
MIN_PHASE_STEP = 2.4  # radians of the filter's wave per step of the convolution: below, a window sees no whole wave
MAX_RELATIVE_BANDWIDTH = 1.4  # rms width over pi / (2 stride): above, the envelope varies inside the window
MIN_CONCENTRATION = 0.55  # share of the energy in the theory's square of side pi / stride
MAX_DC_SHARE = 0.05  # a filter that sees the mean brightness is no band-pass filter
# With images: candidates may be slower waves, and the measured correlation with max pooling decides.
MIN_CANDIDATE_PHASE_STEP = 1.9
MIN_FIDELITY = 0.84

MAX_IMAGES = 512
POSITIONS_PER_IMAGE = 1024


class Fits(NamedTuple):
    """How well a * modulus + b, before the activation, reproduces max pooling for some channels, on images.

    index: (n,) the channels; gain, offset: (n,) least-squares a and b; fidelity: (n,) correlation after the activation.
    """

    index: Tensor
    gain: Tensor
    offset: Tensor
    fidelity: Tensor


def make_plan(
    select: Select, stem: MixPoolStem, images: Tensor | Iterable[Tensor] | None = None
) -> tuple[ChannelPlan, Fits | None]:
    """Decide the kind of every channel of a stem; with images, also measure the channels that may be swapped.

    Args:
        select: "auto", "all", "none", a sequence of C_out booleans, or a function of FilterStats that returns one.
        stem: the stem, with its parts in place and no plan yet.
        images: batches of the stem's input; see MixPoolStem.
    Returns:
        The plan, and the fits of the swapped channels for `calibrate` (None without images or swapped channels).
    Raises:
        ValueError: `select` or `images` is none of the above; the message shows what came.
    """
    stats = analyze(stem.weight, stem.stride)
    if isinstance(select, str) and select == "auto":
        mask, reasons = select_by_filter(stats)
        if images is None:
            return _plan(mask, reasons, stats), None
        candidates, reasons = select_by_filter(stats, MIN_CANDIDATE_PHASE_STEP)
        fits = measure(stem, candidates.nonzero()[:, 0], stats, images)
        mask, reasons = select_by_fidelity(candidates, reasons, fits)
    else:
        mask, reasons = _explicit_mask(select, stats)
        fits = measure(stem, mask.nonzero()[:, 0], stats, images) if images is not None and mask.any() else None
    if fits is None:
        return _plan(mask, reasons, stats), None
    fidelity = torch.full((len(stats),), math.nan, dtype=torch.float64)
    fidelity[fits.index] = fits.fidelity.double()
    swapped = mask[fits.index]
    fits = Fits(*(values[swapped] for values in fits)) if swapped.any() else None
    return _plan(mask, reasons, stats, fidelity), fits


def select_by_filter(stats: FilterStats, min_phase_step: float = MIN_PHASE_STEP) -> tuple[Tensor, list[str]]:
    """The automatic rule on weights alone: (C,) bool mask and a reason per channel.

    A channel takes the modulus if it is a band-pass filter whose wave turns fast enough from one step of the
    convolution to the next, and whose energy lies close enough to its centre frequency. Low frequencies stay on max
    pooling: there the modulus is another feature (spec: correlation with max pooling falls from 0.85 to 0.66).
    """
    tests = [
        (stats.dc_share > MAX_DC_SHARE, stats.dc_share, f"low-pass: dc share {{:.2f}} > {MAX_DC_SHARE}"),
        (
            effective_phase_step(stats) < min_phase_step,
            effective_phase_step(stats),
            f"low frequency: {{:.2f}} rad/step < {min_phase_step}",
        ),
        (
            stats.relative_bandwidth > MAX_RELATIVE_BANDWIDTH,
            stats.relative_bandwidth,
            f"broad band: {{:.2f}} > {MAX_RELATIVE_BANDWIDTH}",
        ),
        (stats.concentration < MIN_CONCENTRATION, stats.concentration, f"spread out: {{:.2f}} < {MIN_CONCENTRATION}"),
    ]
    mask = torch.ones(len(stats), dtype=torch.bool)
    reasons = [f"band-pass, {step:.2f} rad/step" for step in effective_phase_step(stats).tolist()]
    for fails, values, message in tests:
        for channel in (fails & mask).nonzero()[:, 0].tolist():
            reasons[channel] = message.format(values[channel].item())
        mask &= ~fails
    return mask, reasons


def effective_phase_step(stats: FilterStats) -> Tensor:
    return stats.phase_step


def select_by_fidelity(candidates: Tensor, reasons: list[str], fits: Fits) -> tuple[Tensor, list[str]]:
    """Keep the candidates whose modulus, after its affine fit, correlates with max pooling on the images."""
    mask, reasons = candidates.clone(), list(reasons)
    for channel, fidelity in zip(fits.index.tolist(), fits.fidelity.tolist(), strict=True):
        mask[channel] = fidelity >= MIN_FIDELITY
        relation = ">=" if mask[channel] else "<"
        reasons[channel] = f"correlation with max pooling {fidelity:.3f} {relation} {MIN_FIDELITY}"
    return mask, reasons


@torch.no_grad()
def measure(stem: MixPoolStem, index: Tensor, stats: FilterStats, images: Tensor | Iterable[Tensor]) -> Fits:
    """Fit each channel's modulus to its max pooling on images, before the activation, and correlate them after it.

    Least squares over at most 1024 positions of each of at most 512 images, drawn with a fixed seed; the norm layer
    is used as in evaluation.
    """
    index = index.cpu()
    if len(index) == 0:
        return Fits(index, torch.empty(0), torch.empty(0), torch.empty(0))
    device, dtype = stem.weight.device, stem.weight.dtype
    direction = stats.center_frequency[index].to(device)
    on_device = index.to(device)
    weight_imag = analytic_partner(stem.weight.index_select(0, on_device), direction)
    nothing = on_device[:0]
    samples: tuple[list[Tensor], list[Tensor]] = ([], [])
    generator = torch.Generator().manual_seed(0)
    was_training = stem.bn is not None and stem.bn.training
    count = 0
    if was_training:
        stem.bn.training = False
    try:
        for batch in batches_of(images, stem.in_channels):
            batch = batch[: MAX_IMAGES - count].to(device, dtype)
            count += len(batch)
            by_max, _ = stem.pool_and_normalize(batch, Channels(on_device, nothing), None, max_blur=1)
            _, by_modulus = stem.pool_and_normalize(batch, Channels(nothing, on_device), weight_imag)
            positions = by_max.shape[-2] * by_max.shape[-1]
            drawn = torch.randperm(positions, generator=generator)[:POSITIONS_PER_IMAGE].to(device)
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
    gain, offset = _least_squares(by_modulus, by_max, with_offset=_can_shift(stem))
    fitted = stem.act(by_modulus * gain[:, None] + offset[:, None])
    return Fits(index, gain, offset, _correlation(fitted, stem.act(by_max)))


def batches_of(images: Tensor | Iterable[Tensor], channels: int | None = None) -> Iterable[Tensor]:
    """Yield (N, C, H, W) float batches of at most 32 from a tensor, a list of images or batches, or a data loader."""
    if isinstance(images, Tensor):
        images = images.split(32) if images.ndim == 4 else [images]
    for item in images:
        batch = item[0] if isinstance(item, (tuple, list)) and len(item) > 0 else item
        if isinstance(batch, Tensor) and batch.ndim == 3:
            batch = batch[None]
        good = isinstance(batch, Tensor) and batch.ndim == 4 and batch.is_floating_point()
        if not good or (channels is not None and batch.shape[1] != channels):
            got = f"{batch.dtype} {tuple(batch.shape)}" if isinstance(batch, Tensor) else type(item).__name__
            wanted = "C" if channels is None else channels
            raise ValueError(
                f"expected normalised images as float tensors (N, {wanted}, H, W), or an iterable of such, got {got}"
            )
        yield from batch.split(32)


# --- folding the fits into the parameters -----------------------------------------------------------------------------


@torch.no_grad()
def calibrate(stem: MixPoolStem, fits: Fits) -> None:
    """Fold a * modulus + b of the swapped channels into the norm layer, or into the filters where there is none.

    The values before are kept, so that `stock_values` gives them back bit by bit; the gain and the offset go to the
    buffer `calibration`, from which a reloaded model gets them back within rounding.
    """
    usable = (fits.gain > 0.05) & torch.isfinite(fits.gain) & torch.isfinite(fits.offset)
    if not _can_scale(stem):
        return
    index = fits.index[usable].to(stem.weight.device)
    gain, offset = (v[usable].to(stem.weight.device, torch.float32) for v in (fits.gain, fits.offset))
    stem.calibration[index] = torch.stack([gain, offset], dim=1).to(stem.calibration.dtype)
    before = {name: tensor.clone() for name, tensor in _calibrated_tensors(stem).items()}
    gain, offset = stem.calibration.float().unbind(dim=1)
    for name, tensor in _calibrated_tensors(stem).items():
        tensor.copy_(_apply(name, tensor, gain, offset))
    after = {name: tensor.clone() for name, tensor in _calibrated_tensors(stem).items()}
    stem.before_calibration = {name: (after[name], before[name]) for name in before}


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
        if name == "weight_imag":
            continue
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
        tensors = {"weight": stem.weight, "bias": stem.bias, "weight_imag": getattr(stem, "weight_imag", None)}
    return {name: tensor.data for name, tensor in tensors.items() if tensor is not None}


def _apply(name: str, tensor: Tensor, gain: Tensor, offset: Tensor) -> Tensor:
    scaled = tensor * gain.reshape(-1, *[1] * (tensor.ndim - 1))
    return scaled + offset if name.endswith("bias") else scaled


def _undo(name: str, tensor: Tensor, gain: Tensor, offset: Tensor) -> Tensor:
    shifted = tensor - offset if name.endswith("bias") else tensor
    return (shifted / gain.reshape(-1, *[1] * (tensor.ndim - 1))).to(tensor.dtype)


def _can_scale(stem: MixPoolStem) -> bool:
    return stem.bn is None or stem.bn.weight is not None


def _can_shift(stem: MixPoolStem) -> bool:
    return (stem.bias if stem.bn is None else stem.bn.bias) is not None


# --- small helpers ----------------------------------------------------------------------------------------------------


def _explicit_mask(select: Select, stats: FilterStats) -> tuple[Tensor, list[str]]:
    count = len(stats)
    if isinstance(select, str):
        if select not in ("all", "none"):
            raise ValueError(f'expected select to be "auto", "all", "none", booleans or a function, got {select!r}')
        return torch.full((count,), select == "all"), [f'select="{select}"'] * count
    origin = "select(stats)" if callable(select) else "given"
    values = select(stats) if callable(select) else select
    values = values.tolist() if isinstance(values, Tensor) else list(values)
    if len(values) != count or any(value not in (0, 1) for value in values):
        raise ValueError(
            f"expected {count} booleans from select, one per output channel, got {len(values)}: {values!r:.200}"
        )
    return torch.tensor(values, dtype=torch.bool), [origin] * count


def _plan(mask: Tensor, reasons: Sequence[str], stats: FilterStats, fidelity: Tensor | None = None) -> ChannelPlan:
    kinds = tuple("modulus" if flag else "max" for flag in mask.tolist())
    return ChannelPlan(kinds, tuple(reasons), stats, fidelity)


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
