"""Which layers of a network decimate, which of them get a low-pass, and the change itself with its way back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from mixpool.filters.spectrum import pair
from mixpool.stabilization.flow import INPUT, Call, Flow
from mixpool.stabilization.lowpass import DecimatingConv2d, DenseConv2d, FieldMaxPool2d, LowPassConv2d, LowPassMaxPool2d
from mixpool.stem.module import MixPoolStem

ORDERS = ("before", "behind")
# What a treated layer's class is called in a plan and in a file, and the class of the stock layer.
TREATMENTS: dict[str, tuple[type[nn.Module], type[nn.Module]]] = {
    "low-pass before": (LowPassConv2d, nn.Conv2d),
    "dense": (DenseConv2d, nn.Conv2d),
    "decimating": (DecimatingConv2d, nn.Conv2d),
    "maxima, then low-pass": (LowPassMaxPool2d, nn.MaxPool2d),
    "maxima of a dense map, then low-pass": (FieldMaxPool2d, nn.MaxPool2d),
}


@dataclass(frozen=True)
class Decimator:
    """A layer that decimates.

    Attributes:
        name: of the layer.
        what: the layer in words.
        treatment: of TREATMENTS, or None where it is left.
        why: the reason, if it is left.
    """

    name: str
    what: str
    treatment: str | None
    why: str = ""

    def __str__(self) -> str:
        done = self.treatment if self.treatment is not None else f"left: {self.why}"
        return f"{self.name} ({self.what}): {done}"


def find_decimators(flow: Flow) -> list[Decimator]:
    """Every layer of a pass whose output has fewer positions than its input, and what can be done with it."""
    found = []
    for call in flow.calls:
        if any(call.name == other.name for other in found):
            continue
        if isinstance(call.module, MixPoolStem):
            found.append(Decimator(call.name, "mixpool stem", None, "its poolings low-pass it already"))
        elif _decimates(call):
            found.append(_judged(call, flow))
    for sources in dict.fromkeys(flow.functional_pools):
        found.append(Decimator(f"max_pool2d() behind {sources}", "function", None, "a function, not a module"))
    return found


def plan_of(flow: Flow, decimators: list[Decimator], order: str = "before") -> dict[str, str]:
    """Name -> treatment, in the order of the data.

    Args:
        order: "before" low-passes what a strided convolution reads; "behind" low-passes behind its activation, as
            BlurPool does, where convolutions alone read that; else before.
    """
    if order not in ORDERS:
        raise ValueError(f"expected the order to be one of {ORDERS}, got {order!r}")
    plan = {}
    for decimator in decimators:
        if decimator.treatment is None:
            continue
        plan[decimator.name] = decimator.treatment
        readers = flow.readers(decimator.name)
        is_conv = decimator.treatment == "low-pass before"
        if order == "behind" and is_conv and _all_can_decimate(decimator.name, readers, flow, plan):
            plan[decimator.name] = "dense"
            plan |= {call.name: "decimating" for call in readers if isinstance(call.module, nn.Conv2d)}
    return plan


def with_dense_stem(plan: Mapping[str, str], flow: Flow, pool: str | None) -> dict[str, str]:
    """The plan with the stem's convolution computed at every position, if the stem's pool reads it and nothing else.

    Raises:
        ValueError: it does not; the message says why.
    """
    sources = {} if pool is None or plan.get(pool) != "maxima, then low-pass" else flow[pool].sources
    conv = next(iter(sources), None)
    call = None if conv in (None, INPUT) else flow[conv]
    readers = [] if call is None else [own.name for own in flow.readers(conv) if not _is_norm_of(own, conv)]
    if call is None or sources != {conv: True} or readers != [pool] or flow.count(conv) != 1:
        raise ValueError("no max pool that reads one convolution, through norm and activation alone")
    if type(call.module) is not nn.Conv2d or call.module.stride != (2, 2) or isinstance(call.module.padding, str):
        raise ValueError(f"expected a convolution of stride 2 in front of {pool}, found {call.module}")
    return {conv: "dense", **plan, pool: "maxima of a dense map, then low-pass"}


def treat(model: nn.Module, plan: Mapping[str, str]) -> None:
    """Give the planned layers their classes, in place, all or nothing.

    Raises:
        ValueError: the model has no such layer, or it is not the stock layer of its treatment.
    """
    modules = dict(model.named_modules())
    for name, treatment in plan.items():
        if treatment not in TREATMENTS:
            raise ValueError(f"expected a treatment of {', '.join(TREATMENTS)}, got {treatment!r} of {name}")
        wanted = TREATMENTS[treatment][1]
        if type(modules.get(name)) is not wanted:
            got = "no such module" if name not in modules else type(modules[name]).__name__
            raise ValueError(f"expected {name} to be a {wanted.__name__} of the stock model, found {got}")
    for name, treatment in plan.items():
        modules[name].__class__ = TREATMENTS[treatment][0]


def untreat(model: nn.Module, names: Iterable[str] | None = None) -> None:
    """Give treated layers the stock classes back; all of them by default."""
    stock = {treated: own for treated, own in TREATMENTS.values()}
    chosen = None if names is None else set(names)
    for name, module in model.named_modules():
        if type(module) in stock and (chosen is None or name in chosen):
            module.__class__ = stock[type(module)]


def treated_layers(model: nn.Module) -> dict[str, str]:
    """Name -> treatment of a model's layers, as `treat` takes it."""
    names = {treated: name for name, (treated, _) in TREATMENTS.items()}
    return {name: names[type(module)] for name, module in model.named_modules() if type(module) in names}


# --- what can be done with a layer ------------------------------------------------------------------------------------


def _decimates(call: Call) -> bool:
    module = call.module
    if isinstance(module, (nn.MaxPool2d, nn.AvgPool2d)):
        return max(pair(module.stride if module.stride is not None else module.kernel_size)) > 1
    return isinstance(module, nn.Conv2d) and max(module.stride) > 1


def _judged(call: Call, flow: Flow) -> Decimator:
    module = call.module
    stride = pair(module.stride if module.stride is not None else module.kernel_size)
    kernel = pair(module.kernel_size)
    what = f"{type(module).__name__} {_by(kernel)}/{_by(stride)}"
    treatment, why = None, ""
    if isinstance(module, nn.AvgPool2d):
        why = "it averages already"
    elif max(stride) > 2:
        why = f"stride {max(stride)}, of which three taps are no low-pass"
        if isinstance(module, nn.Conv2d) and kernel == stride:
            why = "it cuts the image into patches"
    elif isinstance(module, nn.Conv2d):
        if INPUT in call.sources:
            why = "it reads the image"
        elif type(module) is not nn.Conv2d:
            why = f"a {type(module).__name__} has arithmetic of its own"
        elif isinstance(module.padding, str):
            why = f"padding={module.padding!r}"
        else:
            treatment = "low-pass before"
    elif type(module) is not nn.MaxPool2d:
        why = f"a {type(module).__name__} has arithmetic of its own"
    elif module.return_indices or pair(module.dilation) != (1, 1):
        why = "it returns indices" if module.return_indices else "it is dilated"
    elif INPUT in call.sources:
        why = "it reads the image"
    elif max(kernel) > 3 or any(k == 1 and s > 1 for k, s in zip(kernel, stride, strict=True)):
        why = f"a window of {_by(kernel)}"
    else:
        treatment = "maxima, then low-pass"
    if treatment is not None and flow.count(call.name) > 1:
        treatment, why = None, f"it is called {flow.count(call.name)} times in a pass"
    return Decimator(call.name, what, treatment, why)


def _all_can_decimate(name: str, readers: list[Call], flow: Flow, plan: Mapping[str, str]) -> bool:
    """Whether convolutions of stride 1 alone read a layer, through norms and activations alone."""
    convs = [call for call in readers if not _is_norm_of(call, name)]
    return (
        bool(convs)
        and name not in flow.outputs
        and all(
            type(call.module) is nn.Conv2d
            and call.module.stride == (1, 1)
            and not isinstance(call.module.padding, str)
            and call.sources == {name: True}
            and flow.count(call.name) == 1
            and call.name not in plan
            for call in convs
        )
    )


def _is_norm_of(call: Call, name: str) -> bool:
    return not isinstance(call.module, (nn.Conv2d, nn.Linear, nn.MaxPool2d, nn.AvgPool2d)) and name in call.sources


def _by(numbers: tuple[int, int]) -> str:
    return str(numbers[0]) if numbers[0] == numbers[1] else f"{numbers[0]}x{numbers[1]}"
