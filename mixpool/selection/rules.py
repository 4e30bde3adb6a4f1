"""Which channels pool by the complex convolution: from their filters alone, or also from how they pool real images.

The thresholds below come from `python -m benchmarks.selecting.selection`; its records and its page say how.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from mixpool.ops.modes import of_nobody
from mixpool.ops.reference import POOLINGS
from mixpool.selection.calibrate import Fits, has_seen_data, measure, typical_pictures
from mixpool.selection.plan import ChannelPlan
from mixpool.selection.stats import FilterStats, analyze
from mixpool.stem.module import MixPoolStem

Select = str | Sequence[bool] | Sequence[str] | Callable[[FilterStats], Sequence[bool]]

MAX_DC_SHARE = 0.05  # a filter that sees the mean brightness is no band-pass filter
# Correlation of the modulus with max pooling, as predicted from the weights alone.
MIN_PREDICTED_CORRELATION = 0.85
# With images their own correlation decides, among all channels for which it is not hopeless.
MIN_CANDIDATE_CORRELATION = 0.70
MIN_FIDELITY = 0.84


@of_nobody()
def choose(
    stem: MixPoolStem,
    select: Select,
    images: Tensor | Iterable[Tensor] | None = None,
    *,
    pooling: str = "modulus",
    rest: str = "max",
) -> tuple[ChannelPlan, Fits | None]:
    """Decide the pooling of every channel of a stem; with images, also measure the channels that may be swapped.

    Args:
        stem: the stem; it stays as it is.
        select: "auto", "all", "none", a sequence of C_out booleans or names of poolings, or a function of FilterStats
            that returns one.
        images: batches of the stem's input.
        pooling: of the chosen channels, a complex one.
        rest: of the others, a real one.
    Returns:
        The plan, and the fits of the swapped channels for `calibrate`: on the images, or, for "auto" without images
        on a trained stem, on synthetic pictures; None if there is nothing to fold in.
    """
    check_words(pooling, rest)
    if stem.weight.is_meta:
        raise ValueError("expected the convolution's weights to exist, got a meta tensor: load weights first")
    stats = analyze(stem.weight, stem.stride, window=stem.window)
    if isinstance(select, str) and select == "auto":
        mask, reasons, fits = _automatic(stem, stats, images, pooling)
        poolings = _named(mask, pooling, rest)
    else:
        poolings, reasons = _explicit(select, stats, pooling, rest)
        mask = torch.tensor([POOLINGS[name].is_complex for name in poolings], device="cpu")
        fits = None
        if images is not None and mask.any():
            fits = measure(stem, mask.nonzero()[:, 0], stats, images, poolings)
    if fits is None or images is None:
        return ChannelPlan(poolings, tuple(reasons), stats), fits
    fidelity = torch.full((len(stats),), math.nan, dtype=torch.float64, device="cpu")
    fidelity[fits.index] = fits.fidelity.double()
    swapped = mask[fits.index]
    fits = Fits(*(values[swapped] for values in fits)) if swapped.any() else None
    return ChannelPlan(poolings, tuple(reasons), stats, fidelity), fits


def check_words(pooling: str, rest: str) -> None:
    """Raise ValueError unless `pooling` is a complex pooling and `rest` a real one."""
    for word, name, is_complex in (("pooling", pooling, True), ("rest", rest, False)):
        names = tuple(own for own, entry in POOLINGS.items() if entry.is_complex == is_complex)
        if name not in names:
            raise ValueError(f"expected {word} to be one of {names}, got {name!r}")


def _automatic(
    stem: MixPoolStem, stats: FilterStats, images: Tensor | Iterable[Tensor] | None, pooling: str
) -> tuple[Tensor, list[str], Fits | None]:
    if stem.dilation != (1, 1):  # between its taps lie zeros, which mirror every frequency band
        none = torch.zeros(len(stats), dtype=torch.bool, device="cpu")
        return none, ["dilated convolution"] * len(stats), None
    poolings = (pooling,) * len(stats)
    if images is None:
        mask, reasons = select_by_filter(stats)
        fits = None
        if mask.any() and has_seen_data(stem):
            index = mask.nonzero()[:, 0]
            fits = measure(stem, index, stats, typical_pictures(stem, index), poolings)
        return mask, reasons, fits
    candidates, reasons = select_by_filter(stats, MIN_CANDIDATE_CORRELATION)
    fits = measure(stem, candidates.nonzero()[:, 0], stats, images, poolings)
    mask, reasons = select_by_fidelity(candidates, reasons, fits)
    return mask, reasons, fits


def select_by_filter(
    stats: FilterStats, min_correlation: float = MIN_PREDICTED_CORRELATION
) -> tuple[Tensor, list[str]]:
    """The automatic rule on weights alone: (C,) bool mask and a reason per channel.

    A channel takes the modulus if it is a band-pass filter whose modulus is expected to follow its max pooling on
    photographs. That leaves out low frequencies, waves that stand still under the stride, and broad bands: there the
    modulus is another feature. The decision is the same for every complex pooling.
    """
    correlation = stats.predicted_correlation_blur3
    mask, reasons = torch.zeros(len(stats), dtype=torch.bool, device="cpu"), []
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


def _explicit(select: Select, stats: FilterStats, pooling: str, rest: str) -> tuple[tuple[str, ...], list[str]]:
    count = len(stats)
    if isinstance(select, str):
        if select not in ("all", "none"):
            raise ValueError(f'expected select to be "auto", "all", "none", booleans or a function, got {select!r}')
        return (pooling if select == "all" else rest,) * count, [f'select="{select}"'] * count
    origin = "select(stats)" if callable(select) else "given"
    values = select(stats) if callable(select) else select
    if not isinstance(values, Iterable):
        what = f"a function that returned {values!r}" if callable(select) else repr(select)
        raise ValueError(f'expected select to be "auto", "all", "none", booleans or a function of them, got {what}')
    values = values.tolist() if isinstance(values, Tensor) else list(values)
    if len(values) == count and all(isinstance(value, str) and value in POOLINGS for value in values):
        return tuple(values), [origin] * count
    if len(values) != count or any(value not in (0, 1) for value in values):
        raise ValueError(
            f"expected {count} booleans from select, one per output channel, got {len(values)}: {values!r:.200}"
        )
    return _named(values, pooling, rest), [origin] * count


def _named(mask: Iterable[bool], pooling: str, rest: str) -> tuple[str, ...]:
    return tuple(pooling if flag else rest for flag in mask)
