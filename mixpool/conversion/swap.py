"""The swap, step by step, each with its way back: the stem in, placeholders where its parts were, hooks moved."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mixpool.conversion.find import FoundStem
from mixpool.conversion.stock import Place, StockKeys, StockParts
from mixpool.stem.module import MixPoolStem

Undo = list[Callable[[], None]]

_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
)
_KEPT_BEHIND = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
_WHERE = {"norm": "bn", "act": "act"}  # the stem's children that are stock modules


class Placeholder(nn.Module):
    """Stands where a part of the stem was, passes tensors on, and what is meant for the part to the part.

    `model.bn1.eval()`, `model.bn1.requires_grad_(False)`, `model.bn1.weight`, `model.bn1.momentum = 0.01` and
    `model.bn1.parameters()` reach the norm layer inside the stem. Hooks registered here are called once per pass, with
    the stem's output. It has no parameters and no state of its own, which is what `parameters(recurse=False)` asks for.
    What a tool adds to a module (counters, flags) stays with the one that it was added to. The settings of a pool that
    the stem has taken over can be read, and not be changed.
    """

    def __init__(self, stem: MixPoolStem, part: str, stock: nn.Module) -> None:
        super().__init__()
        names = {name for name in dir(stock) if not name.startswith("__")} - set(dir(nn.Module()))
        self.__dict__.update(_stem=stem, _part=part, _stock=stock, _names=names)  # not children: the stem owns them
        self.training = stock.training

    @property
    def part(self) -> nn.Module:
        """The module that is meant."""
        where = _WHERE.get(self._part)
        return self._stock if where is None else getattr(self._stem, where)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, torch.fx.Proxy):  # one node in any symbolic trace, which tools look for by its name
            return x.tracer.create_proxy("call_module", x.tracer.path_of_module(self), (x,), {})
        # A full backward hook on the stem makes its output a view, which the model's next step may not overwrite; the
        # stock layer that was here gave it a new tensor.
        if not torch.compiler.is_compiling() and torch.is_grad_enabled() and x._is_view():
            return x.clone()
        return x

    def train(self, mode: bool = True) -> Placeholder:
        super().train(mode)
        if self._part in _WHERE:  # a pool waits outside the model for revert(), which gives it this mode
            self.part.train(mode)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Placeholder:
        """`bn1.float()`, `bn1.to(...)`; where the whole model moves, the norm layer has moved already."""
        if self._part in _WHERE:
            self.part._apply(fn, recurse)
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Placeholder:
        self.part.requires_grad_(requires_grad)
        return self

    # Of this module alone: a model's own parameters() and buffers() do not ask their modules' methods.

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        return self.part.named_parameters(prefix, True, remove_duplicate) if recurse else iter(())

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        return self.part.named_buffers(prefix, True, remove_duplicate) if recurse else iter(())

    def __getattr__(self, name: str) -> Any:
        if name in self.__dict__.get("_names", ()):  # there are none while it is copied or unpickled
            return getattr(self.part, name)
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self.__dict__.get("_names", ()):
            super().__setattr__(name, value)
        elif self._part in _WHERE:
            setattr(self.part, name, value)
        else:
            raise AttributeError(f"{name} belongs to the stem now: revert(model), set it, and convert again")

    def extra_repr(self) -> str:
        return f"{type(self.part).__name__} in the stem"


def swap(model: nn.Module, found: FoundStem, stem: MixPoolStem, undo: Undo) -> list[str]:
    """Put the stem and placeholders into the model; append to `undo` how to take each step back; return notes."""
    notes = []
    names = {part: name for part in StockParts.PARTS if (name := getattr(found, part)) is not None}
    stem.stock = stock = StockParts(names=names, modules={})
    for part, name in names.items():
        module = model.get_submodule(name)
        stock.modules[part] = module
        replacement = stem if part == "conv" else Placeholder(stem, part, module)
        moved = move_hooks(module, replacement, undo)
        if moved:
            what = "the stem's input and output" if part == "conv" else "the stem's pooled output"
            notes.append(f"{moved} hook(s) of {name} stay in place and now see {what}")
        left = sum(len(getattr(module, attribute, ())) for attribute in _KEPT_BEHIND)
        if left and part != "norm":
            notes.append(f"{left} state-dict hook(s) of {name} wait for revert()")
        set_submodule(model, name, replacement, undo)
        if part != "conv":
            above, _, child = name.rpartition(".")
            stock.places.append(Place(model.get_submodule(above), child, replacement))
    holder = key_holder(model, "", names)
    if holder is not None:
        above = _common_prefix(names["conv"], names["norm"])
        hook = StockKeys(names["norm"].removeprefix(above), names["conv"].removeprefix(above))
        handle = holder.register_load_state_dict_pre_hook(hook)
        undo.append(handle.remove)
    for entry in feature_entries(model, found):
        stock.reductions.append((entry, entry["reduction"]))
        undo.append(lambda entry=entry, old=entry["reduction"]: entry.update(reduction=old))
        entry["reduction"] *= stem._pool.stride[0]
        notes.append(f"feature map {entry['module']!r} now has reduction {entry['reduction']}: it is the stem's output")
    return notes


def set_submodule(model: nn.Module, name: str, module: nn.Module, undo: Undo) -> None:
    parent, _, child = name.rpartition(".")
    owner = model.get_submodule(parent)
    before = getattr(owner, child)
    undo.append(lambda: setattr(owner, child, before))
    setattr(owner, child, module)


def move_hooks(source: nn.Module, target: nn.Module, undo: Undo) -> int:
    """Give `target` the hooks of `source`, which keeps none; how many. Handles keep working: the dictionaries move."""
    count = len(source._forward_pre_hooks) + len(source._forward_hooks)
    count += len(source._backward_hooks) + len(source._backward_pre_hooks)
    before = [
        (module, {name: vars(module).get(name) for name in (*_HOOKS, "_is_full_backward_hook")})
        for module in (source, target)
    ]
    undo.append(lambda: [vars(module).update(hooks) for module, hooks in before])
    if count == 0:  # then a module's dictionaries stay its own, and what is registered later has one owner
        return 0
    for name in _HOOKS:
        if name in vars(source):
            vars(target)[name] = vars(source)[name]
            vars(source)[name] = OrderedDict()
    vars(target)["_is_full_backward_hook"] = vars(source).get("_is_full_backward_hook")
    vars(source)["_is_full_backward_hook"] = None
    return count


def key_holder(model: nn.Module, prefix: str, names: dict[str, str]) -> nn.Module | None:
    """The innermost module that holds both the convolution and the norm layer; None without a norm layer."""
    if "norm" not in names:
        return None
    return model.get_submodule((prefix + _common_prefix(names["conv"], names["norm"])).rstrip("."))


def feature_entries(model: nn.Module, found: FoundStem) -> list[dict]:
    """timm's feature_info entries whose map is taken between the stem's convolution and its pool."""
    info = getattr(model, "feature_info", None)
    entries = getattr(info, "info", info)

    # A wrapper (FeatureHookNet) may hold the model as a child: its entries then lack the child's name.
    above = _common_prefix(found.conv, found.pool)
    wrapper = next((f"{child}." for child, _ in model.named_children() if above.startswith(f"{child}.")), "")

    def is_inside(name: str) -> bool:
        for prefix in {"", wrapper}:
            own = (prefix + name).replace(".", "_")
            parts = [part.replace(".", "_") for part in (found.conv, found.norm, found.act) if part]
            in_stem = any(part == own or part.startswith(own + "_") for part in parts)
            if in_stem and not found.pool.replace(".", "_").startswith(own + "_"):
                return True
        return False

    return [e for e in entries or () if isinstance(e, dict) and "reduction" in e and is_inside(e.get("module") or "")]


def _common_prefix(first: str, second: str) -> str:
    """Name, with a dot, of the innermost module that holds both of two modules; empty for the model itself."""
    shared = []
    for a, b in zip(first.split(".")[:-1], second.split(".")[:-1], strict=False):
        if a != b:
            break
        shared.append(a)
    return "".join(f"{part}." for part in shared)
