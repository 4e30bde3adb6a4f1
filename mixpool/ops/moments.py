"""Batch statistics of both kinds of channels, with their derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mixpool.ops.modes import is_eager


class Moments(NamedTuple):
    """Batch statistics: `mean` and biased `var` per channel, float32 or better, over `count` values each."""

    mean: Tensor
    var: Tensor
    count: int


def real_moments(y: Tensor) -> Moments:
    """Mean and biased variance of each channel over N, H, W, differentiable."""
    y = y if y.dtype == torch.float64 else y.float()
    count = y.shape[0] * y.shape[2] * y.shape[3]
    if isinstance(count, int) and count == 0:
        nothing = y.sum(dim=(0, 2, 3))  # depends on y, so that all processes of a group stay in step in backward
        return Moments(nothing, nothing, 0)
    if is_eager():
        return Moments(*_MeanAndVariance.apply(y), count)
    var, mean = torch.var_mean(y, dim=(0, 2, 3), correction=0)
    return Moments(mean, var, count)


def modulus_moments(envelope: Tensor) -> Moments:
    """Mean 0 and half the mean energy of each channel (the variance of an analytic z's real part), from |z|."""
    return _half_of(_MeanSquare.apply if is_eager() else _mean_square, envelope)


def energy_moments(energies: Tensor) -> Moments:
    """The same from |z|^2."""
    return _half_of(lambda values: values.mean(dim=(0, 2, 3)), energies)


def _half_of(mean: Callable[[Tensor], Tensor], values: Tensor) -> Moments:
    count = values.shape[0] * values.shape[2] * values.shape[3]
    if isinstance(count, int) and count == 0:
        nothing = values.sum(dim=(0, 2, 3))
        return Moments(torch.zeros_like(nothing), nothing, 0)
    var = mean(values) / 2
    return Moments(torch.zeros_like(var), var, count)


def _mean_square(values: Tensor) -> Tensor:
    return values.square().mean(dim=(0, 2, 3))


class _MeanAndVariance(torch.autograd.Function):
    """var_mean, on a CPU several times faster, with one pass over memory on the way back."""

    @staticmethod
    def forward(ctx, y: Tensor) -> tuple[Tensor, Tensor]:
        if y.device.type == "cpu":
            mean = y.mean(dim=(0, 2, 3))
            var = (y - mean[:, None, None]).square_().mean(dim=(0, 2, 3))
        else:
            var, mean = torch.var_mean(y, dim=(0, 2, 3), correction=0)
        ctx.save_for_backward(y, mean)
        ctx.save_for_forward(y, mean)
        return mean, var

    @staticmethod
    def backward(ctx, grad_mean: Tensor, grad_var: Tensor) -> Tensor:
        y, mean = ctx.saved_tensors
        count = y.numel() // len(mean)
        slope = grad_var * (2 / count)
        offset = grad_mean / count - slope * mean
        return torch.addcmul(offset[:, None, None], y, slope[:, None, None])

    @staticmethod
    def jvp(ctx, tangent: Tensor) -> tuple[Tensor, Tensor]:
        y, mean = ctx.saved_tensors
        var = 2 * ((y - mean[:, None, None]) * tangent).mean(dim=(0, 2, 3))
        return tangent.mean(dim=(0, 2, 3)), var


class _MeanSquare(torch.autograd.Function):
    """square().mean() with one pass over memory on the way back."""

    @staticmethod
    def forward(ctx, y: Tensor) -> Tensor:
        ctx.save_for_backward(y)
        ctx.save_for_forward(y)
        return y.square().mean(dim=(0, 2, 3))

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return y * (grad * (2 * len(grad) / y.numel()))[:, None, None]

    @staticmethod
    def jvp(ctx, tangent: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return 2 * (y * tangent).mean(dim=(0, 2, 3))
