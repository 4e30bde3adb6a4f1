"""The norm layer of a stem, applied after pooling: running or batch statistics, one rule per kind of channel.

    max channels      mean and variance of the real convolution, as nn.BatchNorm2d has them
    modulus channels  variance = mean(|z|^2) / 2 of the positions computed; the mean stays at running_mean, in
                      training as in evaluation, so that converting a pretrained model changes nothing between modes

Reference: the non-centred rule is that of Leterme et al., arXiv 2212.00394.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from mixpool.ops.moments import Moments
from mixpool.ops.reference import Channels, Pooled, affine

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


def normalize_pooled(
    pooled: Pooled, norm: nn.Module | None, bias: Tensor | None, sign: Tensor | None, channels: Channels
) -> tuple[Tensor | None, Tensor | None]:
    """Apply the norm layer (or the bias alone) to both kinds of pooled channels; update the running statistics.

    Args:
        pooled: from `convolve_and_pool`, with moments exactly if `uses_batch_statistics(norm)`.
        norm: the stem's norm layer, or None.
        bias: (C_out,) of the convolution, without the sign, or None; the max channels already hold it.
        sign: `sign_of_scale(norm)`.
        channels: which channel is which.
    Returns:
        (max part, modulus part), before the activation; None as in `pooled`.
    """
    if norm is None:
        if pooled.modulus is None or bias is None:
            return pooled.max, pooled.modulus
        return pooled.max, affine(pooled.modulus, None, bias.index_select(0, channels.modulus))

    max_moments, modulus_moments = pooled.max_moments, pooled.modulus_moments
    if _spans_processes(norm):
        max_moments = max_moments and across_processes(max_moments, norm.process_group)
        modulus_moments = modulus_moments and across_processes(modulus_moments, norm.process_group)

    def of_kind(vector: Tensor | None, index: Tensor) -> Tensor | None:
        return None if vector is None else vector.index_select(0, index)

    parts = []
    for part, moments, index, is_modulus in (
        (pooled.max, max_moments, channels.max, False),
        (pooled.modulus, modulus_moments, channels.modulus, True),
    ):
        if part is None:
            parts.append(None)
            continue
        weight, shift, signs, mean = (of_kind(v, index) for v in (norm.weight, norm.bias, sign, norm.running_mean))
        weight = weight if signs is None else weight * signs
        if mean is not None and signs is not None:
            mean = mean * signs
        if is_modulus and bias is not None and mean is not None:
            # The running mean holds the convolution's bias, so the modulus gets it too (without one, neither has it).
            part = affine(part, None, of_kind(bias if sign is None else bias * sign, index))
        if moments is None and not isinstance(norm, nn.modules.batchnorm._BatchNorm):
            # FrozenBatchNorm2d, by its own formula, so that it stays equal to the bit
            scale = weight * (norm.running_var.index_select(0, index) + norm.eps).rsqrt()
            out = part * scale[:, None, None] + (shift - mean * scale)[:, None, None]
            parts.append(out.to(part.dtype))
            continue
        if moments is None:
            running_var = norm.running_var.index_select(0, index)
            parts.append(F.batch_norm(part, mean, running_var, weight, shift, False, 0.0, norm.eps))
            continue
        mean = mean if is_modulus else moments.mean
        scale = (moments.var + norm.eps).rsqrt()
        scale = scale if weight is None else scale * weight
        offset = shift if mean is None else (-mean * scale if shift is None else shift - mean * scale)
        parts.append(affine(part, scale, offset))
    if uses_batch_statistics(norm) and norm.track_running_stats and norm.running_mean is not None:
        _update_running_statistics(norm, max_moments, modulus_moments, sign, channels)
    return tuple(parts)


def affine_of_pooled(
    moments: Tensor | None,
    counts: tuple[int, int],
    norm: nn.Module | None,
    bias: Tensor | None,
    sign: Tensor | None,
    channels: Channels,
) -> tuple[Tensor, Tensor]:
    """The norm layer, or the bias alone, as one affine map of pooled channels of both kinds; updates its statistics.

    What `normalize_pooled` does, for pooled channels that hold no bias.

    Args:
        moments: (2, C_out) float32, batch mean and biased variance of the convolution without its bias, 0 and
            mean(|z|^2) / 2 for modulus channels; exactly if `uses_batch_statistics(norm)`, else None.
        counts: values per channel behind the moments of the max and of the modulus channels, on this process.
        norm, bias, sign, channels: as for `normalize_pooled`.
    Returns:
        (scale, shift), (C_out,) float32 each; the scale is not negative, its sign lies in the filters.
    """
    ones = torch.ones(len(channels.max) + len(channels.modulus), dtype=torch.float32, device=channels.max.device)
    zeros = torch.zeros_like(ones)

    def vector(values: Tensor | None, default: Tensor) -> Tensor:
        return default if values is None else values.float()

    bias = vector(bias, zeros)
    if norm is None:
        return ones, bias
    signs = vector(sign, ones)
    offset = bias * signs
    center = zeros if norm.running_mean is None else norm.running_mean.float() * signs - offset
    if moments is None:
        var = norm.running_var.float()
    else:
        max_moments, modulus_moments = _moments_by_kind(moments, offset, counts, norm, channels)
        var = zeros
        if max_moments is not None:
            center = center.index_copy(0, channels.max, max_moments.mean - offset.index_select(0, channels.max))
            var = var.index_copy(0, channels.max, max_moments.var)
        if modulus_moments is not None:
            var = var.index_copy(0, channels.modulus, modulus_moments.var)
        if norm.track_running_stats and norm.running_mean is not None:
            _update_running_statistics(norm, max_moments, modulus_moments, sign, channels)
    scale = (var + norm.eps).rsqrt() * vector(norm.weight, ones) * signs
    return scale, vector(norm.bias, zeros) - center * scale


def _moments_by_kind(
    moments: Tensor, offset: Tensor, counts: tuple[int, int], norm: nn.Module, channels: Channels
) -> tuple[Moments | None, Moments | None]:
    """What `convolve_and_pool` of the reference returns as moments, over all processes; `offset` is the signed bias.

    The same to the last detail, since another process may be on the reference (its part of a batch may be empty): all
    have to sum the same things in the same order, so the mean of the modulus has no gradient here either.
    """
    means = (moments[0] + offset, moments[0].detach())
    kinds = []
    for mean, index, count in zip(means, channels, counts, strict=True):
        kind = None
        if len(index) > 0:
            kind = Moments(mean.index_select(0, index), moments[1].index_select(0, index), count)
            if _spans_processes(norm):
                kind = across_processes(kind, norm.process_group)
        kinds.append(kind)
    return tuple(kinds)


@torch.no_grad()
def _update_running_statistics(
    norm: nn.Module,
    max_moments: Moments | None,
    modulus_moments: Moments | None,
    sign: Tensor | None,
    channels: Channels,
) -> None:
    moments = [m for m in (max_moments, modulus_moments) if m is not None]
    if all(isinstance(m.count, int) and m.count == 0 for m in moments):
        return  # an empty batch teaches nothing
    if any(isinstance(m.count, int) and m.count == 1 for m in moments):
        raise ValueError("expected more than 1 value per channel in training, got 1 (as nn.BatchNorm2d)")
    norm.num_batches_tracked.add_(1)
    # momentum=None is torch's cumulative average
    momentum = 1.0 / norm.num_batches_tracked.to(norm.running_var.dtype) if norm.momentum is None else norm.momentum
    if max_moments is not None:
        mean, var, count = max_moments
        if sign is not None:
            mean = mean * sign.index_select(0, channels.max)
        _blend(norm.running_mean, channels.max, mean, momentum)
        _blend(norm.running_var, channels.max, var * (count / (count - 1)), momentum)  # unbiased, as torch
    if modulus_moments is not None:
        _blend(norm.running_var, channels.modulus, modulus_moments.var, momentum)


def _blend(running: Tensor, index: Tensor, value: Tensor, momentum: float | Tensor) -> None:
    old = running.index_select(0, index)
    running.index_copy_(0, index, old + momentum * (value.to(old.dtype) - old))


def _spans_processes(norm: nn.Module) -> bool:
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
