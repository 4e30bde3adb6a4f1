"""The modulus of a complex map, whose two parts lie side by side in one tensor, with its derivatives."""

from __future__ import annotations

import torch
from torch import Tensor

from mixpool.ops.modes import is_eager, widened


def modulus(z: Tensor) -> Tensor:
    """sqrt(re^2 + im^2) in float32 or better, with derivative 0 where both are 0 (a plain sqrt or hypot gives NaN).

    Args:
        z: (N, 2n, ...), the n real parts and then the n imaginary parts.
    """
    if is_eager():
        return _Modulus.apply(z)
    # For what follows single operators. The squares want values between 1e-18 and 1e18 in float32.
    re, im = widened(z).chunk(2, dim=1)
    energy = torch.addcmul(re * re, im, im)
    is_zero = energy == 0
    return energy.masked_fill(is_zero, 1).sqrt().masked_fill(is_zero, 0)


class _Modulus(torch.autograd.Function):
    """hypot in half of the passes over memory, and with its derivative at 0."""

    @staticmethod
    def forward(ctx, z: Tensor) -> Tensor:
        out = torch.hypot(*widened(z).chunk(2, dim=1))
        ctx.save_for_backward(z, out)
        ctx.save_for_forward(z, out)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        z, out = ctx.saved_tensors
        ratio = grad / _without_zeros(out)
        parts = z.unflatten(1, (2, out.shape[1]))  # both at once, so that autograd has none to join
        return (parts * ratio.unsqueeze(1)).flatten(1, 2).to(z.dtype)

    @staticmethod
    def jvp(ctx, tangent: Tensor) -> Tensor:
        z, out = ctx.saved_tensors
        re, im = (z * tangent).chunk(2, dim=1)
        return (re + im) / _without_zeros(out)


def _without_zeros(out: Tensor) -> Tensor:
    """For a quotient whose numerator is 0 there."""
    return torch.where(out == 0, 1, out)
