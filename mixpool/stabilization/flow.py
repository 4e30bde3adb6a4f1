"""What reads what in a network, seen from one pass of it: any Python, any control flow, shared modules.

Layers are whole; every other operation hands on where its inputs came from.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mixpool.ops.norm import is_supported_norm
from mixpool.stem.module import MixPoolStem

INPUT = ""  # where the image comes from
LINEAR = (nn.Conv2d, nn.Linear)
LAYERS = (*LINEAR, nn.MaxPool2d, nn.AvgPool2d, MixPoolStem)
_POINTWISE = {F.relu, F.relu6, F.silu, F.gelu, F.hardswish, F.leaky_relu, F.elu, torch.relu, torch.relu_}
_POINTWISE |= {Tensor.relu, Tensor.relu_, torch.sigmoid, F.hardsigmoid, F.batch_norm}


@dataclass
class Call:
    """One call of a layer.

    Attributes:
        name, module: of the layer.
        sources: name of each layer that the input comes from with no other layer between (INPUT: the image itself), and
            whether only norms and activations lie between.
        in_shape, out_shape: of the tensors.
    """

    name: str
    module: nn.Module
    sources: dict[str, bool]
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...] = ()


@dataclass
class Flow:
    """The calls of a pass, in order, and the layers that the output comes from."""

    calls: list[Call] = field(default_factory=list)
    outputs: set[str] = field(default_factory=set)
    functional_pools: list[str] = field(default_factory=list)

    def __getitem__(self, name: str) -> Call:
        return next(call for call in self.calls if call.name == name)

    def __contains__(self, name: str) -> bool:
        return any(call.name == name for call in self.calls)

    def readers(self, name: str) -> list[Call]:
        return [call for call in self.calls if name in call.sources]

    def count(self, name: str) -> int:
        return sum(call.name == name for call in self.calls)

    def behind(self, names: Iterable[str]) -> list[Call]:
        """The calls that anything of these layers reaches, in order; of these layers those that read one of them."""
        reached, found = set(names), []
        for call in self.calls:
            if reached & call.sources.keys():
                found.append(call)
                reached.add(call.name)
        return found


@torch.no_grad()
def trace(model: nn.Module, x: Any, whole: Collection[str] = ()) -> Flow:
    """Run the model once on x, in its present mode, and see what reads what.

    Args:
        whole: names of modules that count as layers, whatever they are and hold.
    """

    def stands_alone(name: str, module: nn.Module) -> bool:
        return name in whole or is_layer(module)

    tracker = _Tracker()
    flow = tracker.flow
    tracker.mark(x, {INPUT: True})
    handles = []
    seen: set[int] = set()
    for name, module in model.named_modules():
        if id(module) in seen or not stands_alone(name, module):
            continue
        if any(stands_alone(above, model.get_submodule(above)) for above in _ancestors(name)):
            continue
        seen.add(id(module))
        handles.append(module.register_forward_pre_hook(tracker.enter(name)))
        handles.append(module.register_forward_hook(tracker.leave(name)))
    try:
        with tracker:
            out = model(x)
        for tensor in tensors_of(out):
            flow.outputs |= set(tracker.origins(tensor))
    finally:
        for handle in handles:
            handle.remove()
    return flow


def is_layer(module: nn.Module) -> bool:
    return isinstance(module, LAYERS) or is_norm(module)


def is_norm(module: nn.Module) -> bool:
    return is_supported_norm(module)


def tensors_of(value: Any) -> list[Tensor]:
    """All tensors in nested lists, tuples and dictionaries."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in tensors_of(item)]
    return []


def _ancestors(name: str) -> list[str]:
    parts = name.split(".")[:-1]
    return [".".join(parts[:i]) for i in range(1, len(parts) + 1)]


class _Tracker(TorchFunctionMode):
    """Hands the origins of tensors on from operation to operation, outside of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.flow = Flow()
        self.known: dict[int, tuple[Tensor, dict[str, bool]]] = {}  # holds the tensors, so that no id comes twice
        self.open: list[Call] = []

    def origins(self, tensor: Tensor) -> dict[str, bool]:
        return self.known.get(id(tensor), (None, {}))[1]

    def mark(self, value: Any, origins: dict[str, bool]) -> None:
        for tensor in tensors_of(value):
            self.known[id(tensor)] = (tensor, origins)

    def joined(self, value: Any, is_plain: bool) -> dict[str, bool]:
        sources: dict[str, bool] = {}
        for tensor in tensors_of(value):
            for name, was_plain in self.origins(tensor).items():
                sources[name] = sources.get(name, True) and was_plain and is_plain
        return sources

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.open:
            return func(*args, **kwargs)
        inputs = [args, kwargs]
        sources = self.joined(inputs, func in _POINTWISE)
        out = func(*args, **kwargs)
        if getattr(func, "__name__", "") in ("max_pool2d", "boolean_dispatch", "_max_pool2d") and sources:
            self.flow.functional_pools.append(" and ".join(sources) or "the image")
        if sources:
            self.mark(out, sources)
        return out

    def enter(self, name: str):
        def hook(module: nn.Module, args: tuple) -> None:
            if not self.open:
                shape = tuple(args[0].shape) if args and isinstance(args[0], Tensor) else ()
                self.flow.calls.append(Call(name, module, self.joined(args, True), shape))
                self.open.append(self.flow.calls[-1])
            else:
                self.open.append(self.open[-1])

        return hook

    def leave(self, name: str):
        def hook(module: nn.Module, args: tuple, out: Any) -> None:
            call = self.open.pop()
            if self.open:
                return
            tensors = tensors_of(out)
            call.out_shape = tuple(tensors[0].shape) if tensors else ()
            # A norm is no end: what is behind it reads the layer in front.
            self.mark(out, dict(call.sources) if is_norm(module) else {name: True})

        return hook
