"""Norm layers that follow a changed network: their statistics moved by what the change did to their inputs.

    running_mean <- running_mean + (mean in the changed network - mean in the stock network)
    running_var  <- running_var * (variance in the changed network / variance in the stock network)

Both are measured on the same images, so that few images, or images of another kind, do not replace what the training
has seen: where nothing has changed, nothing moves. In the order of the data: each layer's input is that of a network
whose earlier layers are corrected already.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from mixpool.stabilization.flow import Flow, is_norm

SMALLEST = 1e-12  # variance, below which a channel is dead


def norms_behind(flow: Flow, names: Iterable[str]) -> list[str]:
    """Norm layers with running statistics that anything of these layers reaches, called once in a pass."""
    found = []
    for call in flow.behind(names):
        has_statistics = is_norm(call.module) and getattr(call.module, "running_var", None) is not None
        if has_statistics and flow.count(call.name) == 1:
            found.append(call.name)
    return found


@torch.no_grad()
def correct_statistics(
    changed: nn.Module, stock: nn.Module, batches: Sequence[Tensor], names: Sequence[str], starts: dict[str, tuple]
) -> None:
    """Correct the statistics of the named layers of `changed`, both networks in evaluation mode.

    Args:
        batches: normalised images.
        starts: name -> (mean, variance) that the correction begins with, the stock network's.
    """
    if not names:
        return
    found = {name: _Moved(changed.get_submodule(name), *starts[name]) for name in names}
    handles = []
    for name, moved in found.items():
        handles.append(stock.get_submodule(name).register_forward_pre_hook(moved.see_stock))
        handles.append(changed.get_submodule(name).register_forward_pre_hook(moved.see_changed))
    try:
        for batch in batches:
            stock(batch)
            changed(batch)
    finally:
        for handle in handles:
            handle.remove()
    for moved in found.values():
        moved.finish()


def statistics_of(module: nn.Module) -> tuple[Tensor, Tensor]:
    """Copies of (mean, variance)."""
    return module.running_mean.detach().clone(), module.running_var.detach().clone()


class _Moved:
    """How far the statistics of one layer's input have moved, batch by batch."""

    def __init__(self, norm: nn.Module, mean: Tensor, var: Tensor) -> None:
        self.norm, self.mean, self.var = norm, mean, var
        self.offset, self.ratio = torch.zeros_like(mean), torch.zeros_like(var)
        self.count = 0

    def see_stock(self, module: nn.Module, args: tuple) -> None:
        self.stock = _moments(args[0])

    def see_changed(self, module: nn.Module, args: tuple) -> None:
        mean, var = _moments(args[0])
        is_dead = (self.stock[1] < SMALLEST) | (var < SMALLEST)
        offset = mean - self.stock[0]
        ratio = torch.where(is_dead, 1.0, var / self.stock[1].clamp_min(SMALLEST))
        self.offset += offset * len(args[0])
        self.ratio += ratio.log() * len(args[0])
        self.count += len(args[0])
        self._set(self.offset / self.count, self.ratio / self.count)

    def finish(self) -> None:
        if self.count:
            self._set(self.offset / self.count, self.ratio / self.count)

    def _set(self, offset: Tensor, log_ratio: Tensor) -> None:
        self.norm.running_mean.copy_(self.mean + offset)
        self.norm.running_var.copy_(self.var * log_ratio.exp())


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    var, mean = torch.var_mean(x.float(), dim=(0, 2, 3), correction=0)
    return mean, var
