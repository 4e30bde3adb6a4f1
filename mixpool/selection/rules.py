"""Which channels take the modulus: from their filters alone, or also from how they pool real images.

The thresholds below come from `python -m benchmarks.selection`; its records and its page say how.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mixpool.selection.calibrate import Fits, has_seen_data, measure, typical_pictures
from mixpool.selection.plan import KINDS, ChannelPlan
from mixpool.selection.stats import FilterStats, analyze

if TYPE_CHECKING:
    from mixpool.stem.module import MixPoolStem

Select = str | Sequence[bool] | Callable[[FilterStats], Sequence[bool]]

MAX_DC_SHARE = 0.05  # a filter that sees the mean brightness is no band-pass filter
# Correlation of the modulus (blur=3) with max pooling, as predicted from the weights alone.
MIN_PREDICTED_CORRELATION = 0.85
# With images their own correlation decides, among all channels for which it is not hopeless.
MIN_CANDIDATE_CORRELATION = 0.70
MIN_FIDELITY = 0.84


def make_plan(
    select: Select, stem: MixPoolStem, images: Tensor | Iterable[Tensor] | None = None
) -> tuple[ChannelPlan, Fits | None]:
    """Decide the kind of every channel of a stem; with images, also measure the channels that may be swapped.

    Args:
        select: "auto", "all", "none", a sequence of C_out booleans (or kinds, as in `plan.kinds`), or a function of
            FilterStats that returns one.
        stem: the stem, with its parts in place and no plan yet.
        images: batches of the stem's input; see MixPoolStem.
    Returns:
        The plan, and the fits of the swapped channels for `calibrate`: on the images, or, for "auto" without images
        on a trained stem, on synthetic pictures; None if there is nothing to fold in.
    Raises:
        ValueError: `select` or `images` is none of the above; the message shows what came.
    """
    stats = analyze(stem.weight, stem.stride, window=stem.window)
    if isinstance(select, str) and select == "auto":
        if stem.dilation != (1, 1):  # between its taps lie zeros, which mirror every frequency band
            return _plan(torch.zeros(len(stats), dtype=torch.bool), ["dilated convolution"] * len(stats), stats), None
        if images is None:
            mask, reasons = select_by_filter(stats)
            fits = None
            if mask.any() and has_seen_data(stem):
                index = mask.nonzero()[:, 0]
                fits = measure(stem, index, stats, typical_pictures(stem, index))
            return _plan(mask, reasons, stats), fits
        candidates, reasons = select_by_filter(stats, MIN_CANDIDATE_CORRELATION)
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


def select_by_filter(
    stats: FilterStats, min_correlation: float = MIN_PREDICTED_CORRELATION
) -> tuple[Tensor, list[str]]:
    """The automatic rule on weights alone: (C,) bool mask and a reason per channel.

    A channel takes the modulus if it is a band-pass filter whose modulus is expected to follow its max pooling on
    photographs. That leaves out low frequencies, waves that stand still under the stride, and broad bands: there the
    modulus is another feature. The decision is the same for every blur.
    """
    correlation = stats.predicted_correlation_blur3
    mask, reasons = torch.zeros(len(stats), dtype=torch.bool), []
    for channel, (share, value) in enumerate(zip(stats.dc_share.tolist(), correlation.tolist(), strict=True)):
        if share > MAX_DC_SHARE:
            reasons.append(f"low-pass, dc share {share:.3f} > {MAX_DC_SHARE}")
        elif math.isnan(value):
            reasons.append("empty filter")
        else:
            mask[channel] = value >= min_correlation
            relation = ">=" if value >= min_correlation else "<"
            reasons.append(f"predicted correlation with max pooling {value:.3f} {relation} {min_correlation:.2f}")
    return mask, reasons


def select_by_fidelity(candidates: Tensor, reasons: list[str], fits: Fits) -> tuple[Tensor, list[str]]:
    """Keep the candidates whose modulus, after its affine fit, correlates with max pooling on the images."""
    mask, reasons = candidates.clone(), list(reasons)
    for channel, fidelity in zip(fits.index.tolist(), fits.fidelity.tolist(), strict=True):
        mask[channel] = fidelity >= MIN_FIDELITY
        relation = ">=" if mask[channel] else "<"
        reasons[channel] = f"measured correlation with max pooling {fidelity:.3f} {relation} {MIN_FIDELITY}"
    return mask, reasons


# --- small helpers ----------------------------------------------------------------------------------------------------


def _explicit_mask(select: Select, stats: FilterStats) -> tuple[Tensor, list[str]]:
    count = len(stats)
    if isinstance(select, str):
        if select not in ("all", "none"):
            raise ValueError(f'expected select to be "auto", "all", "none", booleans or a function, got {select!r}')
        return torch.full((count,), select == "all"), [f'select="{select}"'] * count
    origin = "select(stats)" if callable(select) else "given"
    values = select(stats) if callable(select) else select
    if not isinstance(values, Iterable):
        what = f"a function that returned {values!r}" if callable(select) else repr(select)
        raise ValueError(f'expected select to be "auto", "all", "none", booleans or a function of them, got {what}')
    values = values.tolist() if isinstance(values, Tensor) else list(values)
    values = [KINDS.index(value) if isinstance(value, str) and value in KINDS else value for value in values]
    if len(values) != count or any(value not in (0, 1) for value in values):
        raise ValueError(
            f"expected {count} booleans from select, one per output channel, got {len(values)}: {values!r:.200}"
        )
    return torch.tensor(values, dtype=torch.bool), [origin] * count


def _plan(mask: Tensor, reasons: Sequence[str], stats: FilterStats, fidelity: Tensor | None = None) -> ChannelPlan:
    kinds = tuple("modulus" if flag else "max" for flag in mask.tolist())
    return ChannelPlan(kinds, tuple(reasons), stats, fidelity)
