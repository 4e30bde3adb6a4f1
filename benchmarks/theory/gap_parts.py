"""What the theory's gamma leaves over: the gap between both poolings, with one assumption of the theory made true.

`theory` assumes that inside a window the modulus is constant and the phase turns as that of a wave of the centre
frequency. Neither holds for a filter whose band is as wide as the stride allows. So the real part is pooled once more
with one half of the complex map z replaced by what the theory assumes of it; n is the window's centre, n + p are its
positions:

    flat_envelope   R' = max over p of |z(n)| cos(arg z(n + p))
    theory_phases   R' = max over p of |z(n + p)| cos(arg z(n) - <m theta, p>)

and ||R' - M|| / ||M|| is taken, M = |z(n)|. The first tells how much of the gap is left with the photograph's phases
alone, the second how much with its envelope alone.

Legend: n packets, (H, W) of the maps, (h, w) after pooling over 3 x 3 windows at stride 2.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from mixpool.selection.compare import Poolings


class GapParts(NamedTuple):
    """(n,) float64 each; see the top of this file.

    Attributes:
        flat_envelope: gap of the phases as they are, under a constant modulus.
        theory_phases: gap of the modulus as it is, under the theory's phases.
        blurred: no part, but the gap to the mean of the modulus in place of its centre, ||R - B|| / ||B||.
    """

    flat_envelope: Tensor
    theory_phases: Tensor
    blurred: Tensor


def gap_sums(real: Tensor, imag: Tensor, pooled: Poolings, turn: Tensor) -> Tensor:
    """Sums to be added up over photographs for `gap_parts`.

    Args:
        real, imag: (N, n, H, W) the maps.
        pooled: `comparison.pool_both` of these maps, window 3.
        turn: (n, 2) phase per position of the map, m theta, radians; a coefficient turns as exp(-i <m theta, n>).
    Returns:
        (5, n) float64: squares of R' - M for both parts, of R - B, of M and of B.
    """
    modulus, blurred = pooled.modulus, pooled.blurred
    height, width = modulus.shape[-2:]

    def at(maps: Tensor, dy: int, dx: int) -> Tensor:
        return maps[..., 1 + dy :: 2, 1 + dx :: 2][..., :height, :width]

    center_re, center_im = at(real, 0, 0), at(imag, 0, 0)
    flat, turning = torch.full_like(modulus, -torch.inf), torch.full_like(modulus, -torch.inf)
    for dy, dx in itertools.product((-1, 0, 1), repeat=2):
        re, im = at(real, dy, dx), at(imag, dy, dx)
        relative = torch.hypot(re, im) / modulus
        angle = (turn * turn.new_tensor([dy, dx])).sum(dim=1).to(re)[:, None, None]
        flat = torch.maximum(flat, re / relative)
        turning = torch.maximum(turning, (center_re * angle.cos() + center_im * angle.sin()) * relative)
    terms = flat - modulus, turning - modulus, pooled.max - blurred, modulus, blurred
    # Where a modulus is 0 there is no phase, and the square is no number: it does not count.
    return torch.stack([term.square().nan_to_num(0, 0, 0).sum(dim=(0, 2, 3)).double() for term in terms])


def gap_parts(sums: Tensor) -> GapParts:
    """From the sums of `gap_sums` over all photographs; NaN for a packet that nothing excites."""
    return GapParts(*(sums[:3] / sums[[3, 3, 4]]).sqrt())
