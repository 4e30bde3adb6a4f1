"""The plan of a stem as numbers in a checkpoint, and what follows from it.

A plan is a buffer (C, 3), float32 of small integers. Column 0 is the pooling, by its place in POOLINGS; columns 1 and 2
are the direction of the filter's frequency vector in units of 0.01 degree, as 200 * (-90 .. 90) + (0 .. 199), on which
the imaginary filter depends. Integers up to 256 as floats, decoded by rounding, survive .half() and .bfloat16(), every
moving average (which truncates integer buffers) and DDP.

What follows from it (channel lists, the map from W to V) is no buffer, so that no tool averages, copies or resets it;
it is made in nobody's mode, and made anew where the buffer says something else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mixpool.filters.partner import analytic_partner_map
from mixpool.ops.geometry import Pair
from mixpool.ops.modes import of_nobody
from mixpool.ops.reference import POOLINGS, Group, groups_of

_UNITS = 18000 / math.pi  # 0.01 degree


def encode(poolings: Sequence[str], direction: Tensor) -> Tensor:
    """The buffer, on the CPU, from a pooling per channel and (C, 2) frequency vectors (fy, fx)."""
    code = torch.tensor([list(POOLINGS).index(name) for name in poolings], dtype=torch.float64, device="cpu")
    units = (torch.atan2(direction[:, 0], direction[:, 1]).double().cpu() * _UNITS).round()
    coarse = (units / 200).floor()
    return torch.stack([code, coarse, units - 200 * coarse], dim=1).float()


def decode_poolings(plan: Tensor) -> tuple[str, ...]:
    """The pooling of each channel; ValueError if the numbers are damaged."""
    names = tuple(POOLINGS)
    codes = plan[:, 0].double().round().tolist()
    if not torch.isfinite(plan).all() or not all(0 <= code < len(names) for code in codes):
        raise ValueError(f"expected the plan to hold poolings 0 to {len(names) - 1} and directions, got {plan!r:.200}")
    return tuple(names[int(code)] for code in codes)


def decode_direction(plan: Tensor) -> Tensor:
    """(C, 2) float64 unit vectors (fy, fx)."""
    coarse, fine = plan[:, 1:].double().round().unbind(dim=1)
    angle = (200 * coarse + fine) / _UNITS
    return torch.stack([angle.sin(), angle.cos()], dim=1)


class Structure(NamedTuple):
    """What a plan means on one device.

    plan: the buffer's values, on the CPU; numbers: the same on this device; poolings: per channel; groups: the channels
    of each pooling; partner_map: (n, k*k, k*k) of the complex channels, group after group, None if there are none.
    """

    plan: Tensor
    numbers: Tensor
    poolings: tuple[str, ...]
    groups: tuple[Group, ...]
    partner_map: Tensor | None

    @property
    def complex_index(self) -> Tensor:
        """(n,) the complex channels, group after group."""
        return torch.cat([group.index for group in self.groups if POOLINGS[group.pooling].is_complex])

    def is_on(self, device: torch.device, dtype: torch.dtype) -> bool:
        is_map_there = self.partner_map is None or self.partner_map.dtype == dtype
        return is_map_there and all(group.index.device == device for group in self.groups)


def structure_of(plan: Tensor, kernel_size: Pair, device: torch.device, dtype: torch.dtype) -> Structure:
    """What a plan means for filters of this size on this device; `dtype` is that of the map from W to V."""
    with of_nobody():
        plan = plan.detach().cpu().float().clone()
        poolings = decode_poolings(plan)
        groups = groups_of(poolings)
        complex_groups = [group.index for group in groups if POOLINGS[group.pooling].is_complex]
        partner_map = None
        if complex_groups:
            direction = decode_direction(plan)[torch.cat(complex_groups)]
            partner_map = analytic_partner_map(direction, kernel_size).to(device, dtype)
        groups = tuple(Group(name, index.to(device)) for name, index in groups)
        return Structure(plan, plan.to(device), poolings, groups, partner_map)


def is_readable(plan: Tensor) -> bool:
    """Whether the numbers can be looked at here: not of meta and fake tensors, nor while a graph is made."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    return type(plan) in (Tensor, torch.nn.Parameter, torch.nn.Buffer) and not plan.is_meta and not _is_batched(plan)


def _is_batched(plan: Tensor) -> bool:
    return torch._C._functorch.is_functorch_wrapped_tensor(plan)


def structure_of_batch(plan: Tensor, kernel_size: Pair, device: torch.device, dtype: torch.dtype) -> Structure:
    """The same inside torch.func.vmap over models: their directions may differ, their poolings may not."""
    values = plan
    while _is_batched(values):
        values = torch._C._functorch.get_unwrapped(values)
    every = values.reshape(-1, *values.shape[-2:])
    poolings = {decode_poolings(one) for one in every.detach().cpu()}
    if len(poolings) > 1:
        raise ValueError("expected models with the same poolings under torch.func.vmap, got several plans")
    (names,) = poolings
    groups = groups_of(names, device)
    found = Structure(every[0], every[0], names, groups, None)
    if not any(POOLINGS[group.pooling].is_complex for group in groups):
        return found
    direction = decode_direction(plan).index_select(0, found.complex_index)
    return found._replace(partner_map=analytic_partner_map(direction, kernel_size).to(dtype))
