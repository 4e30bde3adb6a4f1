"""How far two poolings of the same complex maps are from each other, and how far each moves with the image.

z = conv(x; W + iV) at stride m is pooled over windows at stride 2 (total stride 2 m) in three ways:

    max      R = max of Re z over the window                          RMax
    modulus  M = |z| at the window's centre                           CMod, the paper's (blur=1)
    blurred  B = mean of |z| over the window, [1 2 1] x [1 2 1] / 16  CMod as mixpool pools it (blur=3)

Over all images and output positions of a channel, ||.|| the root of the sum of squares:

    gap               ||R - M|| / ||M||
    correlation       Pearson's of R with M (blur1) and of R with B (blur3)
    instability of X  ||X(T_u x) - X(x)|| / ||X(x)||, X one of R, M, B, and T_u x the image moved by u

Each norm runs over the whole set, so bright and busy images count for more; no mean is subtracted but in the
correlation. (`evaluation.shifts` divides by the standard deviation instead.) Cut the maps to positions that no border
has touched before pooling them: zero padding is no part of these definitions.

Legend: N images, C channels, (H, W) of the maps, (h, w) after pooling, S shifts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mixpool.ops.geometry import PoolGeometry
from mixpool.ops.reference import lowpass_pool, max_pool

# A map whose standard deviation is below a thousandth of its root mean square counts as constant: float32 sums of
# squares tell no more.
CONSTANT = 1e-6


class Poolings(NamedTuple):
    """Three poolings of the same complex maps, (N, C, h, w) each; see the top of this file."""

    max: Tensor
    modulus: Tensor
    blurred: Tensor


class PoolingStats(NamedTuple):
    """What `Comparison` measured; float64 on the CPU. NaN where a norm or a variance is zero.

    Attributes:
        gap: (C,) ||R - M|| / ||M||.
        correlation_blur1, correlation_blur3: (C,) of R with M, and of R with B.
        instability_max, instability_blur1, instability_blur3: (S, C) of R, M and B, a row for each shift.
    """

    gap: Tensor
    correlation_blur1: Tensor
    correlation_blur3: Tensor
    instability_max: Tensor
    instability_blur1: Tensor
    instability_blur3: Tensor


def pool_both(real: Tensor, imag: Tensor, window: int = 3) -> Poolings:
    """Pool complex maps by the maximum of the real part and by the modulus, at stride 2 and without padding.

    Args:
        real, imag: (N, C, H, W), any float dtype; on the CPU channels_last maps pool several times faster.
        window: 3, or 2, where the centre is the upper left position and the mean has equal weights.
    Returns:
        Poolings; h = (H - window) // 2 + 1.
    """
    if window not in (2, 3):
        raise ValueError(f"expected a window of 2 or 3, got {window=}")
    if real.shape != imag.shape or real.ndim != 4:
        raise ValueError(f"expected two maps (N, C, H, W) of one shape, got {real.shape=} and {imag.shape=}")
    if min(real.shape[-2:]) < window:
        raise ValueError(f"expected maps of at least {window} x {window} positions, got {tuple(real.shape)}")
    if real.dtype in (torch.float16, torch.bfloat16):
        real, imag = real.float(), imag.float()  # whose squares would overflow, and whose sums are too coarse
    pool = PoolGeometry((window, window))
    envelope = torch.hypot(real, imag)  # a measurement: nobody needs its derivative where both are 0
    height, width = pool.output_size(*real.shape[-2:])
    (top, left), (step_y, step_x) = pool.center, pool.stride
    return Poolings(
        max=max_pool(real, pool),
        modulus=envelope[..., top::step_y, left::step_x][..., :height, :width],
        blurred=lowpass_pool(envelope, pool),
    )


class Comparison:
    """Accumulates what the definitions sum up, batch by batch, so that a set of images need not fit into memory.

    Example:
        >>> import torch
        >>> from mixpool.selection.compare import Comparison, pool_both
        >>> comparison = Comparison()
        >>> for _ in range(2):
        ...     z = torch.randn(4, 8, 21, 21, dtype=torch.complex64)
        ...     comparison.add(pool_both(z.real, z.imag), after=[pool_both(z.real, -z.imag)])
        >>> comparison.result().instability_max.shape
        torch.Size([1, 8])
    """

    def __init__(self) -> None:
        self._sums: Tensor | None = None  # (9, C): the moments, in the order of `_moments`
        self._changes: Tensor | None = None  # (S, 3, C): sums of squares of X(T_u x) - X(x)
        self._count = 0  # values per channel

    @torch.no_grad()
    def add(self, before: Poolings, after: Sequence[Poolings] = ()) -> None:
        """Take one batch in.

        Args:
            before: of the images as they are.
            after: of the same images under each shift, S of them, in the same order at each call.
        Raises:
            ValueError: S or the number of channels differs from earlier calls, or shapes differ within this one.
        """
        for maps in (before, *after):
            if any(map_.shape != before.max.shape for map_ in maps) or before.max.ndim != 4:
                shapes = ", ".join(str(tuple(map_.shape)) for map_ in maps)
                raise ValueError(f"expected all poolings of shape {tuple(before.max.shape)}, got {shapes}")
        sums = _moments(before)
        changes = [[_total((b - a).square()) for a, b in zip(before, moved)] for moved in after]
        changes = torch.stack([torch.stack(row) for row in changes]) if changes else sums.new_zeros(0, 3, sums.shape[1])
        self._take(sums, changes, before.max.numel() // before.max.shape[1])

    def update(self, other: Comparison) -> None:
        """Take in what another comparison has seen; ValueError if that is nothing, or of other shifts or channels."""
        if other._count == 0:
            raise ValueError("expected a comparison that maps were added to, got an empty one")
        self._take(other._sums, other._changes, other._count)

    def _take(self, sums: Tensor, changes: Tensor, count: int) -> None:
        if self._sums is None:
            self._sums, self._changes = torch.zeros_like(sums), torch.zeros_like(changes)
        if changes.shape != self._changes.shape:
            before, got = ((len(rows), rows.shape[2]) for rows in (self._changes, changes))
            raise ValueError(f"expected (shifts, channels) = {before} as before, got {got}")
        self._sums += sums
        self._changes += changes
        self._count += count

    def result(self) -> PoolingStats:
        """The definitions, over everything that was added; ValueError if nothing was."""
        if self._count == 0:
            raise ValueError("expected maps to compare, got none: call add() first")
        mean_r, mean_m, mean_b, rr, mm, bb, rm, rb, difference = self._sums / self._count
        changes = (self._changes / self._count).unbind(dim=1)

        def correlation(product: Tensor, mean: Tensor, square: Tensor) -> Tensor:
            covariance = product - mean_r * mean
            variances = rr - mean_r.square(), square - mean.square()
            varies = (variances[0] > CONSTANT * rr) & (variances[1] > CONSTANT * square)
            return torch.where(varies, covariance / (variances[0] * variances[1]).sqrt(), torch.nan).clamp(-1, 1)

        return PoolingStats(
            _ratio(difference, mm),
            correlation(rm, mean_m, mm),
            correlation(rb, mean_b, bb),
            *(_ratio(change, square) for change, square in zip(changes, (rr, mm, bb), strict=True)),
        )


def _moments(maps: Poolings) -> Tensor:
    """(9, C) sums: R, M, B, their squares, R M, R B, (R - M)^2."""
    r, m, b = maps
    terms = (r, m, b, r.square(), m.square(), b.square(), r * m, r * b, (r - m).square())
    return torch.stack([_total(term) for term in terms])


def _total(values: Tensor) -> Tensor:
    """(C,) float64 sum of (N, C, h, w): pairwise in the maps' dtype over one image, in float64 over all of them.

    A float64 sum from the start would first copy the maps to float64.
    """
    return values.sum(dim=(2, 3)).sum(dim=0, dtype=torch.float64).cpu()


def _ratio(change: Tensor, reference: Tensor) -> Tensor:
    """Root of a ratio of sums of squares; NaN where nothing is there to change."""
    return torch.where(reference > 0, (change / reference).sqrt(), torch.nan)
