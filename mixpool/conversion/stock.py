"""State dicts in both directions: stock checkpoints into converted models, and a converted model's stock state."""

from __future__ import annotations

import copy
import weakref
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from mixpool.selection.calibrate import stock_values
from mixpool.stem.module import MixPoolStem


class Place:
    """A child of a module, and what has to be there; without a hold on the module, whose copies have their own."""

    def __init__(self, parent: nn.Module | None, child: str, module: nn.Module | None) -> None:
        self.parent = None if parent is None else weakref.ref(parent)
        self.child, self.module = child, module

    def __deepcopy__(self, memo: dict[int, Any]) -> Place:
        parent = self.parent and self.parent()
        return Place(memo.get(id(parent)), self.child, copy.deepcopy(self.module, memo))

    def __reduce__(self) -> tuple[type[Place], tuple[None, str, None]]:
        return Place, (None, self.child, None)  # a file does not say where the model's modules will be

    def check(self) -> None:
        """Raise ValueError if the module is not there any more, nor inside of a wrapper."""
        parent = self.parent and self.parent()
        found = getattr(parent, self.child, None)
        if isinstance(found, nn.Module) and all(module is not self.module for module in found.modules()):
            raise ValueError(
                f"expected {self.child} to stay as conversion left it (it is part of the stem now), got "
                f"{type(found).__module__}.{type(found).__qualname__}"
            )


@dataclass
class StockParts:
    """The modules that a converted stem stands for, kept outside the module tree, with their names in the model.

    Attributes:
        names: part ("conv", "norm", "act", "pool", "blur") -> name in the model, absent parts left out.
        modules: part -> the stock module.
        places: where the placeholders of the parts are.
        reductions: feature_info entries that were corrected, with their former reduction.
    """

    PARTS: ClassVar[tuple[str, ...]] = ("conv", "norm", "act", "pool", "blur")

    names: dict[str, str]
    modules: dict[str, nn.Module]
    places: list[Place] = field(default_factory=list)
    reductions: list[tuple[dict[str, Any], int]] = field(default_factory=list)

    def check(self) -> None:
        """Raise ValueError if another module stands in the place of a part."""
        for place in self.places:
            place.check()


class StockKeys:
    """Load hook that renames the norm layer's keys of a stock checkpoint, `bn1.*`, to the stem's, `conv1.bn.*`.

    It sits on the innermost module that holds both, so that parts of a model load as well as the whole.
    """

    def __init__(self, norm: str, conv: str) -> None:
        self.old, self.new = f"{norm}.", f"{conv}.bn."

    def __call__(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        stock = [key for key in state_dict if key.startswith(prefix + self.old)]
        for key in stock:
            state_dict[prefix + self.new + key[len(prefix + self.old) :]] = state_dict.pop(key)
        conv = self.new.removesuffix("bn.")
        if stock and f"{prefix}{conv}calibration" not in state_dict:
            stem = module.get_submodule(conv.rstrip("."))
            stem.calibration[:, 0], stem.calibration[:, 1] = 1, 0  # these values were never calibrated


def converted_stems(model: nn.Module) -> dict[str, MixPoolStem]:
    """Name -> stem, for every MixPoolStem in the model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MixPoolStem)}


def stock_parts(name: str, stem: MixPoolStem) -> tuple[str, StockParts]:
    """The stock parts of a converted stem and the prefix of the model that was converted."""
    stock = stem.stock
    if stock is None:
        raise ValueError(f"the MixPoolStem at {name or 'the root'!r} was built directly, not by convert()")
    conv = stock.names["conv"]
    if name != conv and not name.endswith("." + conv):
        raise ValueError(f"expected the converted stem to end in {conv!r}, found it at {name!r}")
    return name[: len(name) - len(conv)], stock


def stock_state_dict(model: nn.Module) -> OrderedDict[str, Tensor]:
    """The model's state with the stock model's keys and values, to load into an unconverted model.

    The plan is left out, and the calibration is undone. A compiled or DDP-wrapped model is
    unwrapped first, so the keys have no `module.` or `_orig_mod.` prefix.

    Raises:
        ValueError: the model holds no converted stem.
    """
    model = unwrapped(model)
    stems = converted_stems(model)
    if not stems:
        raise ValueError(f"expected a converted model, found no MixPoolStem in {type(model).__name__}")
    state = model.state_dict()
    for name, stem in stems.items():
        prefix, stock = stock_parts(name, stem)
        at = f"{name}."
        values = {at + key: value for key, value in stock_values(stem).items()}
        renamed = OrderedDict()
        for key, value in state.items():
            if key in (f"{at}plan", f"{at}calibration"):
                continue
            value = values.get(key, value)
            if key.startswith(f"{at}bn."):
                key = f"{prefix}{stock.names['norm']}.{key[len(at) + 3 :]}"
            renamed[key] = value
        state = renamed
    return state


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's and DistributedDataParallel's wrappers."""
    while True:
        inner = getattr(model, "_orig_mod", None) if hasattr(model, "_orig_mod") else None
        if inner is None and isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            inner = model.module
        if inner is None:
            return model
        model = inner
