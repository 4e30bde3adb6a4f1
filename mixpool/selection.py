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
from mixpool.plan import ChannelPlan

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
