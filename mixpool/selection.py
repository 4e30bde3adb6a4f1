"""Which channels take the modulus: from their filters alone, or also from how they pool real images.

The thresholds below come from `python -m benchmarks.selection`; its records and its page say how.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mixpool.calibration import Fits, measure
from mixpool.filters import FilterStats, analyze
from mixpool.plan import KINDS, ChannelPlan

if TYPE_CHECKING:
    from mixpool.layers import MixPoolStem

Select = str | Sequence[bool] | Callable[[FilterStats], Sequence[bool]]

# From the weights alone, in units of the convolution's stride.
MAX_DC_SHARE = 0.05  # a filter that sees the mean brightness is no band-pass filter
MIN_PHASE_STEP = 2.0  # radians of the centre frequency's wave per step of the convolution
MAX_SLOW_SHARE = 0.30  # of the response, what turns less than a quarter wave per step
MAX_RELATIVE_BANDWIDTH = 1.5  # rms width over pi / (2 stride): above, the envelope varies inside the window
MIN_CONCENTRATION = 0.5  # share of the energy in the theory's square of side pi / stride
# With images the measured correlation with max pooling decides, among channels that need not be so clear a case.
MAX_CANDIDATE_SLOW_SHARE = 0.50
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
        The plan, and the fits of the swapped channels for `calibrate` (None without images or swapped channels).
    Raises:
        ValueError: `select` or `images` is none of the above; the message shows what came.
    """
    stats = analyze(stem.weight, stem.stride)
    if isinstance(select, str) and select == "auto":
        mask, reasons = select_by_filter(stats)
        if images is None:
            return _plan(mask, reasons, stats), None
        candidates, reasons = select_by_filter(stats, MAX_CANDIDATE_SLOW_SHARE)
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


def select_by_filter(stats: FilterStats, max_slow_share: float = MAX_SLOW_SHARE) -> tuple[Tensor, list[str]]:
    """The automatic rule on weights alone: (C,) bool mask and a reason per channel.

    A channel takes the modulus if it is a band-pass filter whose wave turns fast enough from one step of the
    convolution to the next, whichever way it is oriented, and whose energy lies close enough to its centre frequency.
    Low frequencies stay on max pooling: there the modulus is another feature.
    """
    tests = [
        ("low-pass, dc share", stats.dc_share, ">", MAX_DC_SHARE),
        ("low frequency, rad/step", stats.phase_step, "<", MIN_PHASE_STEP),
        ("slow wave, share", stats.slow_share, ">", max_slow_share),
        ("broad band, width", stats.relative_bandwidth, ">", MAX_RELATIVE_BANDWIDTH),
        ("scattered, concentration", stats.concentration, "<", MIN_CONCENTRATION),
    ]
    mask = torch.ones(len(stats), dtype=torch.bool)
    reasons = [f"fast wave, slow share {share:.2f} <= {max_slow_share:.2f}" for share in stats.slow_share.tolist()]
    for name, values, relation, limit in tests:
        fails = values > limit if relation == ">" else values < limit
        for channel in (fails & mask).nonzero()[:, 0].tolist():
            reasons[channel] = f"{name} {values[channel]:.3f} {relation} {limit:.2f}"
        mask &= ~fails
    return mask, reasons


def select_by_fidelity(candidates: Tensor, reasons: list[str], fits: Fits) -> tuple[Tensor, list[str]]:
    """Keep the candidates whose modulus, after its affine fit, correlates with max pooling on the images."""
    mask, reasons = candidates.clone(), list(reasons)
    for channel, fidelity in zip(fits.index.tolist(), fits.fidelity.tolist(), strict=True):
        mask[channel] = fidelity >= MIN_FIDELITY
        relation = ">=" if mask[channel] else "<"
        reasons[channel] = f"correlation with max pooling {fidelity:.3f} {relation} {MIN_FIDELITY}"
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
