"""Modulus and energy of a complex map, whose two parts lie side by side in one tensor, with their derivatives.

Below 1e-19 in float32, where squares have lost their digits, derivatives go to 0, which they are at 0. So nothing is
ever divided by a tiny number, and a filter that has decayed to 1e-40 has a finite gradient. (A plain sqrt or hypot
gives NaN at 0.) Squares, which `energy` and compiled graphs take, also want values up to 1e19.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixpool.ops.modes import is_eager, widened


def modulus(z: Tensor) -> Tensor:
    """|z| = sqrt(re^2 + im^2) in float32 or better; `z` has (N, 2n, ...), n real parts and then n imaginary parts."""
    return _Modulus.apply(z) if is_eager() else _safe_root(_energy(z))


def energy(z: Tensor) -> Tensor:
    """|z|^2 = re^2 + im^2 in float32 or better; `z` as for `modulus`."""
    return _Energy.apply(z) if is_eager() else _energy(z)


def root(energies: Tensor) -> Tensor:
    """The square root, with derivative 0 where it is 0."""
    return _Root.apply(energies) if is_eager() else _safe_root(energies)


class _Modulus(torch.autograd.Function):
    """In half of the passes over memory that single operators take."""

    @staticmethod
    def forward(ctx, z: Tensor) -> Tensor:
        out = torch.hypot(*widened(z).chunk(2, dim=1))
        ctx.save_for_backward(z, out)
        ctx.save_for_forward(z, out)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        z, out = ctx.saved_tensors
        return _scaled(z, grad / _not_tiny(out))

    @staticmethod
    def jvp(ctx, tangent: Tensor) -> Tensor:
        z, out = ctx.saved_tensors
        re, im = (z * tangent).chunk(2, dim=1)
        return (re + im) / _not_tiny(out)


class _Energy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        ctx.save_for_forward(z)
        return _energy(z)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors
        return _scaled(z, 2 * grad)

    @staticmethod
    def jvp(ctx, tangent: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors
        re, im = (widened(z) * tangent).chunk(2, dim=1)
        return 2 * (re + im)


class _Root(torch.autograd.Function):
    @staticmethod
    def forward(ctx, energies: Tensor) -> Tensor:
        out = energies.sqrt()
        ctx.save_for_backward(out)
        ctx.save_for_forward(out)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (out,) = ctx.saved_tensors
        return grad * _half_reciprocal(out)

    @staticmethod
    def jvp(ctx, tangent: Tensor) -> Tensor:
        (out,) = ctx.saved_tensors
        return tangent * _half_reciprocal(out)


def _energy(z: Tensor) -> Tensor:
    re, im = widened(z).chunk(2, dim=1)
    return torch.addcmul(re * re, im, im)


def _scaled(z: Tensor, factor: Tensor) -> Tensor:
    """Both parts times a factor, at once, so that autograd has none to join."""
    parts = z.unflatten(1, (2, factor.shape[1]))
    return (parts * factor.unsqueeze(1)).flatten(1, 2).to(z.dtype)


def _safe_root(energies: Tensor) -> Tensor:
    """For what follows single operators (compilers, exporters, torch.func)."""
    is_lost = energies < torch.finfo(energies.dtype).tiny
    return energies.masked_fill(is_lost, 1).sqrt().masked_fill(is_lost, 0)


def _not_tiny(out: Tensor) -> Tensor:
    """What z is divided by: |z| itself down to 1e-19, so that the quotient goes to 0 with z from there on."""
    return out.clamp_min(torch.finfo(out.dtype).tiny ** 0.5)


def _half_reciprocal(out: Tensor) -> Tensor:
    """1 / (2 out), and 0 where the square of `out` has lost its digits."""
    is_lost = out < torch.finfo(out.dtype).tiny ** 0.5
    return out.masked_fill(is_lost, 1).reciprocal().masked_fill(is_lost, 0) / 2
