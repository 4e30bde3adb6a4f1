"""The result of an evaluation: values per image, their means with intervals, paired differences, and the record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mixpool import records
from mixpool.evaluation.metrics import Interval, bootstrap_interval
from mixpool.evaluation.protocols import MAX_SHIFT
from mixpool.evaluation.shifts import DIRECTIONS
from mixpool.evaluation.stem_change import stem_change, stem_difference

_PIXELS = tuple(str(k) for k in range(1, MAX_SHIFT + 1))
_HALF_PIXELS = tuple(f"{k / 2:g}" for k in range(1, 2 * MAX_SHIFT + 1))


class Metric(NamedTuple):
    """How a number is called, its unit, and what its axes count: directions and shifts in pixels, or none."""

    label: str
    unit: str
    axes: tuple[tuple[str, ...], ...] = ()


_BY_PIXELS, _BY_HALF_PIXELS = (tuple(DIRECTIONS), _PIXELS), (tuple(DIRECTIONS), _HALF_PIXELS)
METRICS = {
    "top1": Metric("top-1", "%"),
    "top5": Metric("top-5", "%"),
    "top1_wcnn": Metric("top-1, resize s crop s", "%"),
    "top5_wcnn": Metric("top-5, resize s crop s", "%"),
    "shift_consistency": Metric("shift consistency", "%"),
    "shift_consistency_shared": Metric("shift consistency, shared offsets", "%"),
    "circular_consistency": Metric("circular consistency", "%"),
    "flip_probability": Metric("flips", "%", _BY_PIXELS),
    "kl": Metric("KL", "nats", _BY_HALF_PIXELS),
    "stem_change": Metric("stem change", "std", _BY_PIXELS),
}


@dataclass(frozen=True)
class Speed:
    """Crops that went through the model, seconds from the first image to the last result, and seconds of them without
    any image to work on."""

    num_frames: int
    seconds: float
    waited: float

    @property
    def frames_per_second(self) -> float:
        return self.num_frames / self.seconds


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What `evaluate` measured.

    Attributes:
        values: metric -> (N, ...) float64 per image, shares in [0, 1] or nats, with the axes of `METRICS`.
        stem_sums: of `stem_change`, or empty.
        indices: (N,) number of each image in the dataset.
        checksums: (N,) of the pictures.
        failed: (image, why it was left out).
        num_found: images that the dataset has, before any limit; None for a stream that was not read to its end.
        notes: what a reader of the numbers should know (no stem found, and why).
        settings: how it was measured.
        speed: of the whole evaluation.
    """

    values: Mapping[str, Tensor]
    stem_sums: Mapping[str, Tensor]
    indices: Tensor
    checksums: Tensor
    failed: tuple[tuple[str, str], ...]
    num_found: int | None
    notes: tuple[str, ...]
    settings: Mapping[str, Any]
    speed: Speed
    _intervals: dict[str, Interval] = field(default_factory=dict, repr=False)

    @property
    def num_images(self) -> int:
        return len(self.indices)

    def intervals(self) -> dict[str, Interval]:
        """Metric -> mean with its 95 % bootstrap interval over images, in the metric's unit (percent for shares)."""
        if not self._intervals:
            for name, values in self.values.items():
                self._intervals[name] = bootstrap_interval(values * _scale(name))
            if self.stem_sums:
                self._intervals["stem_change"] = stem_change(self.stem_sums)
        return self._intervals

    def summary(self) -> dict[str, Any]:
        """Metric -> mean, in percent for shares; with axes a dict by direction and shift."""
        return _summary_of(self.intervals())

    def as_record(self, **fields: Any) -> dict[str, Any]:
        """The record of this evaluation (`mixpool.records`), with further fields such as the model's name."""
        intervals = self.intervals()
        return records.stamp(
            "evaluation",
            **fields,
            num_images=self.num_images,
            num_found=self.num_found,
            failed=[{"image": name, "reason": reason} for name, reason in self.failed],
            summary=_summary_of(intervals),
            ci95=_ends_of(intervals),
            units={name: METRICS[name].unit for name in intervals},
            settings=dict(self.settings),
            notes=list(self.notes),
            speed={
                "frames": self.speed.num_frames,
                "seconds": self.speed.seconds,
                "waited_seconds": self.speed.waited,
                "frames_per_second": self.speed.frames_per_second,
            },
        )


def paired_difference(first: Evaluation, second: Evaluation) -> dict[str, Interval]:
    """second - first for each metric that both have, over the images that both saw: mean and 95 % interval.

    Paired: both models meet the same images in each bootstrap draw, so what is hard about an image cancels. The stem's
    change, which is no mean of values per image, is compared where both saw just the same images.

    Raises:
        ValueError: they have no image in common, or are of different datasets, seeds or sizes of the input.
    """
    for name in ("seed", "size"):
        if first.settings[name] != second.settings[name]:
            raise ValueError(f"expected the same {name}, got {first.settings[name]} and {second.settings[name]}")
    rows = {int(index): row for row, index in enumerate(second.indices)}
    pairs = [(row, rows[int(index)]) for row, index in enumerate(first.indices) if int(index) in rows]
    if not pairs:
        raise ValueError("expected two evaluations of the same images, they have none in common")
    ours, theirs = torch.tensor(pairs).unbind(dim=1)
    differs = (first.checksums[ours] != second.checksums[theirs]).nonzero()[:, 0]
    if len(differs):
        number = int(first.indices[ours][differs[0]])
        raise ValueError(
            f"expected two evaluations of the same dataset, but image {number} and {len(differs) - 1} more of the "
            f"{len(pairs)} with equal numbers are different pictures"
        )
    found = {
        name: bootstrap_interval((second.values[name][theirs] - first.values[name][ours]) * _scale(name))
        for name in first.values
        if name in second.values
    }
    if first.stem_sums and second.stem_sums and torch.equal(first.indices, second.indices):
        found["stem_change"] = stem_difference(first.stem_sums, second.stem_sums)
    return found


def difference_record(first: Evaluation, second: Evaluation) -> dict[str, Any]:
    """`paired_difference` as plain values: summary and ci95, as in the record of an evaluation."""
    difference = paired_difference(first, second)
    return {"summary": _summary_of(difference), "ci95": _ends_of(difference)}


def _scale(name: str) -> float:
    return 100.0 if METRICS[name].unit == "%" else 1.0


def _summary_of(intervals: Mapping[str, Interval]) -> dict[str, Any]:
    return {name: _nested(interval.mean, METRICS[name].axes) for name, interval in intervals.items()}


def _ends_of(intervals: Mapping[str, Interval]) -> dict[str, Any]:
    return {
        name: _nested(torch.stack([interval.low, interval.high], dim=-1), METRICS[name].axes)
        for name, interval in intervals.items()
    }


def _nested(tensor: Tensor, axes: tuple[tuple[str, ...], ...]) -> Any:
    """A tensor whose first axes are these, as plain values under their names."""
    if not axes:
        return tensor.tolist()
    return {label: _nested(part, axes[1:]) for label, part in zip(axes[0], tensor, strict=True)}
