"""The norm layer of a stem, applied after pooling, by running or by batch statistics.

    real poolings     mean and variance of the real convolution, as nn.BatchNorm2d has them
    complex poolings  variance = mean(|z|^2) / 2 of the positions computed; the mean stays at running_mean, in
                      training as in evaluation, so that converting a pretrained model changes nothing between modes

Reference: the non-centred rule is that of Leterme et al., arXiv 2212.00394.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from mixpool.ops.merge import affine
from mixpool.ops.moments import Moments
from mixpool.ops.reference import POOLINGS, Group, Pooled

# Norm layers that are an affine map per channel. Subclasses with other arithmetic must not slip through, hence names.
_NORM_NAMES = {
    "BatchNorm2d",
    "SyncBatchNorm",
    "FrozenBatchNorm2d",
    "BatchNormAct2d",
    "SyncBatchNormAct",
    "FrozenBatchNormAct2d",
}


def is_supported_norm(module: nn.Module) -> bool:
    """Whether the module is a batch norm of torch, torchvision or timm (with or without its activation)."""
    root = type(module).__module__.split(".")[0]
    return type(module).__name__ in _NORM_NAMES and root in {"torch", "torchvision", "timm"}


def sign_of_scale(norm: nn.Module | None) -> Tensor | None:
    """(C,) of +1 and -1: the sign that moves from the norm's weight into the filters; None where there is none."""
    weight = getattr(norm, "weight", None)
    return None if weight is None else torch.where(weight.detach() < 0, -1.0, 1.0).to(weight.dtype)


def uses_batch_statistics(norm: nn.Module | None) -> bool:
    """Whether this forward pass normalises by the batch, by torch's own rule (a frozen norm never does)."""
    if not isinstance(norm, nn.modules.batchnorm._BatchNorm):
        return False
    return norm.training or norm.running_mean is None


def normalize(
    parts: Sequence[Pooled],
    groups: Sequence[Group],
    norm: nn.Module | None,
    bias: Tensor | None,
    sign: Tensor | None,
) -> list[Tensor]:
    """Apply the norm layer (or the bias alone) to pooled channels, before their activation; update running statistics.

    Args:
        parts: from `convolve_and_pool`, with moments exactly if `uses_batch_statistics(norm)`.
        groups: which channels they are.
        norm: the stem's norm layer, or None.
        bias: (C_out,) of the convolution, without the sign, or None; real channels already hold it.
        sign: `sign_of_scale(norm)`.
    """
    moments = [part.moments for part in parts]
    if _spans_processes(norm):
        moments = [across_processes(own, norm.process_group) for own in moments]
    out = []
    for part, own, group in zip(parts, moments, groups, strict=True):
        is_complex = POOLINGS[group.pooling].is_complex
        values = part.values
        if is_complex and bias is not None and (norm is None or norm.running_mean is not None):
            # The running mean holds the convolution's bias, so a modulus gets it too (without one, neither has it).
            values = affine(values, None, _of(bias if sign is None else bias * sign, group))
        out.append(values if norm is None else _normalized(values, own, group, norm, sign))
    if uses_batch_statistics(norm) and norm.track_running_stats and norm.running_mean is not None:
        _update_running_statistics(norm, moments, groups, sign)
    return out


def _normalized(values: Tensor, moments: Moments | None, group: Group, norm: nn.Module, sign: Tensor | None) -> Tensor:
    """One group by its statistics; with running ones in torch's own order of steps: equal to the bit."""
    weight, shift, signs, mean = (_of(v, group) for v in (norm.weight, norm.bias, sign, norm.running_mean))
    weight = weight if signs is None else weight * signs
    mean = mean if mean is None or signs is None else mean * signs
    if moments is None and isinstance(norm, nn.modules.batchnorm._BatchNorm):
        return F.batch_norm(values, mean, _of(norm.running_var, group), weight, shift, False, 0.0, norm.eps)
    if moments is None:  # FrozenBatchNorm2d
        scale = weight * (_of(norm.running_var, group) + norm.eps).rsqrt()
        return (values * scale[:, None, None] + (shift - mean * scale)[:, None, None]).to(values.dtype)
    mean = mean if POOLINGS[group.pooling].is_complex else moments.mean
    scale = (moments.var + norm.eps).rsqrt()
    scale = scale if weight is None else scale * weight
    offset = shift if mean is None else (-mean * scale if shift is None else shift - mean * scale)
    return affine(values, scale, offset)


def _of(vector: Tensor | None, group: Group) -> Tensor | None:
    return None if vector is None else vector.index_select(0, group.index)


@torch.no_grad()
def _update_running_statistics(
    norm: nn.Module, moments: Sequence[Moments], groups: Sequence[Group], sign: Tensor | None
) -> None:
    if all(isinstance(m.count, int) and m.count == 0 for m in moments):
        return  # an empty batch teaches nothing
    if any(isinstance(m.count, int) and m.count == 1 for m in moments):
        raise ValueError("expected more than 1 value per channel in training, got 1 (as nn.BatchNorm2d)")
    norm.num_batches_tracked.add_(1)
    # momentum=None is torch's cumulative average
    momentum = 1.0 / norm.num_batches_tracked.to(norm.running_var.dtype) if norm.momentum is None else norm.momentum
    for (mean, var, count), group in zip(moments, groups, strict=True):
        if not POOLINGS[group.pooling].is_complex:
            mean = mean if sign is None else mean * _of(sign, group)
            _blend(norm.running_mean, group.index, mean, momentum)
            var = var * (count / (count - 1))  # unbiased, as torch
        _blend(norm.running_var, group.index, var, momentum)


def _blend(running: Tensor, index: Tensor, value: Tensor, momentum: float | Tensor) -> None:
    old = running.index_select(0, index)
    running.index_copy_(0, index, old + momentum * (value.to(old.dtype) - old))


def _spans_processes(norm: nn.Module | None) -> bool:
    return (
        isinstance(norm, nn.SyncBatchNorm)
        and norm.training
        and dist.is_available()
        and dist.is_initialized()
        and dist.get_world_size(norm.process_group) > 1
    )


def across_processes(moments: Moments, group: dist.ProcessGroup | None) -> Moments:
    """The moments of all processes' values together (differentiable), from each process's own.

    mean = sum n_i m_i / sum n_i and var = sum n_i (v_i + (m_i - mean)^2) / sum n_i: no cancellation.
    """
    count = moments.mean.new_full((1,), float(moments.count))
    total = _SumOverProcesses.apply(torch.cat([moments.mean * count, count]), group)
    count_of_all = total[-1]
    mean = total[:-1] / count_of_all
    spread = moments.var + (moments.mean - mean).square()
    var = _SumOverProcesses.apply(spread * count, group) / count_of_all
    return Moments(mean, var, count_of_all.detach())


class _SumOverProcesses(torch.autograd.Function):
    """all_reduce with its gradient, the sum of all processes' gradients: each of them uses this one's value."""

    @staticmethod
    def forward(ctx, values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        total = values.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None
