"""ChannelPlan: for each channel of a stem the kind of its pooling, and why."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mixpool.selection.stats import FilterStats

KINDS = ("max", "modulus")


@dataclass(frozen=True, eq=False)
class ChannelPlan:
    """What was decided for each channel, with the numbers that decided it.

    Attributes:
        kinds: "max" or "modulus" per channel.
        reasons: a few words per channel.
        stats: the filters as they were measured.
        fidelity: (C,) correlation over the images between both poolings of the channel, NaN where it was not
            measured; None without images.
    """

    kinds: tuple[str, ...]
    reasons: tuple[str, ...]
    stats: FilterStats
    fidelity: Tensor | None = None

    @property
    def is_modulus(self) -> tuple[bool, ...]:
        return tuple(kind == "modulus" for kind in self.kinds)

    @property
    def num_modulus(self) -> int:
        return sum(self.is_modulus)

    def encode(self, blur: int, max_blur: int) -> Tensor:
        """(C, 3) float32 of small integers, the form in which a checkpoint keeps the plan.

        Column 0: 0 max, 1 modulus, plus 2 if that kind is blurred. Columns 1 and 2: direction of the frequency vector
        in units of 0.01 degree, as 200 * (-90 .. 90) + (0 .. 199). Integers up to 256 as floats, decoded by rounding,
        survive .half() and .bfloat16(), every moving average (which truncates integer buffers) and DDP.
        """
        blurred = {"max": max_blur == 3, "modulus": blur == 3}
        code = [KINDS.index(kind) + 2 * blurred[kind] for kind in self.kinds]
        angle = torch.atan2(self.stats.center_frequency[:, 0], self.stats.center_frequency[:, 1])
        units = (angle * (18000 / math.pi)).round()
        coarse = (units / 200).floor()
        return torch.stack([torch.tensor(code, dtype=torch.float64), coarse, units - 200 * coarse], dim=1).float()

    @staticmethod
    def decode_codes(encoded: Tensor) -> tuple[int, ...]:
        """Column 0 of `encode`; ValueError if it is damaged."""
        codes = encoded[:, 0].double().round().tolist()
        if not all(code in (0, 1, 2, 3) for code in codes) or not torch.isfinite(encoded).all():
            raise ValueError(
                f"expected the checkpoint's plan to hold kinds 0 to 3 and directions, got {encoded!r:.200}"
            )
        return tuple(int(code) for code in codes)

    @staticmethod
    def decode_direction(encoded: Tensor) -> Tensor:
        """(C, 2) float64 unit vectors (fy, fx) from `encode`."""
        coarse, fine = encoded[:, 1:].double().round().unbind(dim=1)
        angle = (200 * coarse + fine) * (math.pi / 18000)
        return torch.stack([angle.sin(), angle.cos()], dim=1)

    @staticmethod
    def decode_blurs(codes: Sequence[int]) -> tuple[int | None, int | None]:
        """(max_blur, blur) from `decode_codes`; None for a kind that no channel has."""
        blurs = [{3 if code & 2 else 1 for code in codes if code & 1 == kind} for kind in (0, 1)]
        if any(len(values) > 1 for values in blurs):
            raise ValueError("expected one blur for all channels of a kind in the checkpoint's plan, got several")
        return tuple(next(iter(values), None) for values in blurs)

    def __str__(self) -> str:
        """A table: phase step (rad/step), orientation (degrees), relative bandwidth, concentration, dc share, then the
        correlation of CMod (blur=3) with max pooling as predicted, and its fidelity as measured on images."""
        lines = [" ch  kind     step  angle  width  conc   dc  pred   fid  reason"]
        stats = self.stats
        for channel, (kind, reason) in enumerate(zip(self.kinds, self.reasons, strict=True)):
            fidelity = (
                "" if self.fidelity is None or self.fidelity[channel].isnan() else f"{self.fidelity[channel]:.2f}"
            )
            numbers = (
                f"{stats.phase_step[channel]:4.2f}  {math.degrees(stats.orientation[channel]):5.1f}"
                f"  {stats.relative_bandwidth[channel]:5.2f}  {stats.concentration[channel]:4.2f}"
                f"  {stats.dc_share[channel]:4.2f}  {stats.predicted_correlation_blur3[channel]:4.2f}"
            )
            lines.append(f"{channel:3d}  {kind:<8} {numbers}  {fidelity:>4}  {reason}")
        return "\n".join(lines)
