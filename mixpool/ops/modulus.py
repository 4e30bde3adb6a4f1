"""Modulus and energy of a complex map, whose two parts lie side by side in one tensor, with their derivatives.

All take squares, which in float32 hold values from 1e-19 to 1e19: below, the modulus and its derivative go to 0, which
they are at 0; above, it is infinite. (hypot has no such limits, and takes three times the time on a CPU.) So nothing is
ever divided by a tiny number, and a filter that has decayed to 1e-40 has a finite gradient. (A plain sqrt or hypot
gives NaN at 0.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from mixpool.ops.modes import is_batched, is_eager, needs_gradient, widened

PART_BYTES = 8 * 2**20  # of a map at a time, on a CPU: what stays in its cache from one step to the next


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
        out = _energy_in_parts(z, with_root=True)
        ctx.save_for_backward(z, out)
        ctx.save_for_forward(z, out)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        z, out = ctx.saved_tensors
        return _scaled(z, lambda images: grad[images] / _not_tiny(out[images]), grad)

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
        return _energy_in_parts(z, with_root=False)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors
        return _scaled(z, lambda images: 2 * grad[images], grad)

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


def _energy_in_parts(z: Tensor, with_root: bool) -> Tensor:
    """`_energy` without a graph, and maybe its root, while each part is in the cache."""
    re, im = z.chunk(2, dim=1)
    out = torch.empty_like(re, dtype=widened(z[:0]).dtype)
    for images in _parts_of(z):
        part, part_re, part_im = out[images], widened(re[images]), widened(im[images])
        torch.mul(part_re, part_re, out=part).addcmul_(part_im, part_im)
        if with_root:
            part.sqrt_()
    return out


def _parts_of(z: Tensor) -> Iterator[slice]:
    """Images that are computed at a time; all of them on a GPU, whose cache holds none."""
    total = len(z)
    count = total
    if z.device.type == "cpu" and z.numel() > 0:
        count = max(1, PART_BYTES * total // (z.numel() * z.element_size()))
    for first in range(0, total, max(1, count)):
        yield slice(first, first + count)


def _scaled(z: Tensor, factor: Callable[[slice], Tensor], grad: Tensor) -> Tensor:
    """Both parts of z times a factor of some images; with a graph where there will be second derivatives."""
    if needs_gradient(z, grad) or is_batched(grad):
        whole = factor(slice(None))
        return torch.cat([part * whole for part in z.chunk(2, dim=1)], dim=1).to(z.dtype)
    result = torch.empty_like(z)
    for images in _parts_of(z):
        own_factor = factor(images)
        for own, part in zip(result[images].chunk(2, dim=1), z[images].chunk(2, dim=1), strict=True):
            torch.mul(part, own_factor, out=own)
    return result


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
