"""What follows the pooling: the affine step, the activation, and all channels in their places."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mixpool.ops.geometry import PoolGeometry
from mixpool.ops.modes import in_functorch, needs_gradient
from mixpool.ops.reference import POOLINGS, Group


def affine(pooled: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """scale * pooled + shift per channel, in float32 or better, returned in the dtype of `pooled`."""
    if scale is None:  # batch_norm has wrong second derivatives then (torch 2.14)
        return pooled if shift is None else (pooled + shift[:, None, None]).to(pooled.dtype)
    dtype = torch.promote_types(pooled.dtype, torch.float32)
    zeros = torch.zeros(pooled.shape[1], dtype=dtype, device=pooled.device)
    shift = None if shift is None else shift.to(dtype)
    # The batch norm of mean 0 and variance 1: one pass over memory there, and one back.
    return F.batch_norm(pooled, zeros, torch.ones_like(zeros), scale.to(dtype), shift, False, 0.0, 0.0)


def activate_and_merge(
    parts: Sequence[Tensor],
    groups: Sequence[Group],
    act: Callable[[Tensor], Tensor],
    pool: PoolGeometry,
    memory_format: torch.memory_format,
) -> Tensor:
    """act, what a pooling does after it, and all channels in their places."""
    finished = []
    for part, group in zip(parts, groups, strict=True):
        finish = POOLINGS[group.pooling].finish
        part = act(part)
        finished.append(part if finish is None else finish(part, pool))
    if len(finished) == 1:
        return finished[0].contiguous(memory_format=memory_format)
    indices = [group.index for group in groups]
    if in_functorch() or torch.compiler.is_compiling():
        # vmap can neither fill a new tensor in place nor lay one out; the compiler's index_copy loses the layout.
        out = torch.cat(finished, dim=1).index_select(1, torch.cat(indices).argsort())
        return out if in_functorch() else out.contiguous(memory_format=memory_format)
    first = finished[0]
    if first.device.type == "cpu" and memory_format is torch.channels_last and not needs_gradient(*finished):
        # Twice as fast there as index_copy; but its gradient is slower.
        rows = torch.cat(finished, dim=1).permute(0, 2, 3, 1)
        order = torch.cat(indices).argsort()
        return rows.gather(3, order.expand(rows.shape)).permute(0, 3, 1, 2)
    size = (first.shape[0], sum(len(index) for index in indices), *first.shape[-2:])
    out = torch.empty(size, dtype=first.dtype, device=first.device, memory_format=memory_format)
    for part, index in zip(finished, indices, strict=True):
        out = out.index_copy_(1, index, part)
    return out
