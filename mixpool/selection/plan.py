"""ChannelPlan: for each channel of a stem its pooling, and why."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from mixpool.ops.reference import POOLINGS
from mixpool.selection.stats import FilterStats


@dataclass(frozen=True, eq=False)
class ChannelPlan:
    """What was decided for each channel, with the numbers that decided it.

    Attributes:
        poolings: a name of `ops.reference.POOLINGS` per channel.
        reasons: a few words per channel.
        stats: the filters as they were measured.
        fidelity: (C,) correlation over the images between the channel's complex pooling and max pooling, NaN where it
            was not measured; None without images.
    """

    poolings: tuple[str, ...]
    reasons: tuple[str, ...]
    stats: FilterStats
    fidelity: Tensor | None = None

    @property
    def is_complex(self) -> tuple[bool, ...]:
        """Whether a channel pools by the complex convolution."""
        return tuple(POOLINGS[name].is_complex for name in self.poolings)

    @property
    def num_complex(self) -> int:
        return sum(self.is_complex)

    def count(self) -> str:
        """How many channels have which pooling, in words."""
        return ", ".join(f"{self.poolings.count(name)} {name}" for name in POOLINGS if name in self.poolings)

    def __str__(self) -> str:
        """A table: phase step (rad/step), orientation (degrees), relative bandwidth, concentration, dc share, then the
        correlation of the modulus with max pooling as predicted, and its fidelity as measured on images."""
        lines = [" ch  pooling    step  angle  width  conc   dc  pred   fid  reason"]
        stats = self.stats
        for channel, (pooling, reason) in enumerate(zip(self.poolings, self.reasons, strict=True)):
            fidelity = (
                "" if self.fidelity is None or self.fidelity[channel].isnan() else f"{self.fidelity[channel]:.2f}"
            )
            numbers = (
                f"{stats.phase_step[channel]:4.2f}  {math.degrees(stats.orientation[channel]):5.1f}"
                f"  {stats.relative_bandwidth[channel]:5.2f}  {stats.concentration[channel]:4.2f}"
                f"  {stats.dc_share[channel]:4.2f}  {stats.predicted_correlation_blur3[channel]:4.2f}"
            )
            lines.append(f"{channel:3d}  {pooling:<9}  {numbers}  {fidelity:>4}  {reason}")
        return "\n".join(lines)
