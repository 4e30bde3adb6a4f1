"""`stabilize`: low-pass every layer that decimates, then repair what reads it; in place, all or nothing, reversible."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mixpool.conversion import convert as stem_conversion
from mixpool.conversion.find import StemError
from mixpool.conversion.stock import converted_stems
from mixpool.selection.images import evaluating
from mixpool.stabilization import repair as repairing
from mixpool.stabilization.agreement import steadiness
from mixpool.stabilization.choose import Level, choose, levels_of
from mixpool.stabilization.flow import Flow, tensors_of, trace
from mixpool.stabilization.pictures import Split, Squares, crop, split, squares_for
from mixpool.stabilization.repair import WHICH, Track
from mixpool.stabilization.report import StabilizationReport
from mixpool.stabilization.treat import (
    ORDERS,
    Decimator,
    find_decimators,
    plan_of,
    treat,
    treated_layers,
    untreat,
    with_dense_stem,
)
from mixpool.stem.module import MixPoolStem

STEMS = ("max", "blurpool", "dense", "modulus", "energy")
LATER = ("blurpool", None)
DEPTHS = ("auto", "all")
MOST_STEM_CONVS = 3
PRICE = 0.24  # of the choice of the depth, times the fidelity
ATTRIBUTE = "_mixpool_stabilized"  # of the model: what `revert` needs


@dataclass
class Stabilized:
    """What a stabilized model knows of its stock state.

    Attributes:
        plan: name -> treatment.
        stock: name of a parameter or buffer -> its stock value, of those that the repair changed.
        sums: name -> fingerprint of the repaired value, which says whether it has been trained since.
        is_final: whether the stock values were dropped, or never were there: the model is from a file.
    """

    plan: dict[str, str]
    stock: dict[str, Tensor] = field(default_factory=dict)
    sums: dict[str, tuple[float, float]] = field(default_factory=dict)
    is_final: bool = False

    @property
    def num_bytes(self) -> int:
        return sum(value.numel() * value.element_size() for value in self.stock.values())


def stabilize(
    model: nn.Module,
    images: Tensor | Iterable[Any] | str | Path | None = None,
    *,
    stem: str = "blurpool",
    later: str | None = "blurpool",
    order: str = "before",
    depth: str = "auto",
    repair: str | None = "next",
    fidelity: float = 0.5,
    size: int | None = None,
    labels: Tensor | None = None,
    seed: int = 0,
    track: Track = lambda steps, total: steps,
) -> StabilizationReport:
    """Make a trained network steady under small shifts of the image: in seconds, without labels, without training.

    Every layer of stride 2 gets a low-pass in front of its decimation. The layers that then read changed maps are
    refitted in closed form to what the stock network computes, on images; held-out images decide, layer by layer.
    Keys and shapes of the state stay (with stem="modulus" or "energy" they become `convert`'s). In place, all or
    nothing; `revert` is the way back, to the bit. Stock weights of refitted layers stay in memory until `finalize`.

    Args:
        model: a trained network in float32 or float64: timm, torchvision or own, on any device.
        images: a folder of photos; normalised images (N, C, H, W), or an iterable of such or of batches (a data
            loader's (images, labels) too); None for synthetic pictures. 250 do well.
        stem: pooling of the stem, "max" leaves it; "blurpool"; "dense" does so over a convolution
            that is computed at every position, at four times its work, so that hardly anything aliases there; or by
            `convert` "modulus" or "energy" (the others of its channels on "blurpool").
        later: "blurpool" low-passes the layers behind the stem; None leaves them.
        order: "before" low-passes what a strided convolution reads; "behind" its activation, as BlurPool does.
        repair: "next": refit the layers that read a changed map; "all": all layers from there on; "statistics":
            norm layers alone; None: nothing, and all is treated.
        depth: "auto" treats the network from the image on as deep as held-out images say it is worth, "all" everywhere.
        fidelity: 0 to 1, from the steadiest to the closest to stock: how deep it is worth to treat, and how weakly a
            refitted layer is held to its weights (a ridge of 10 ** (-2 fidelity)).
        size: side of the model's input, pixels; default what its configuration says.
        labels: (N,) classes of `images` (a tensor), for top-1 in the report.
        seed: of the random splits, crops and positions.
        track: wraps the loop over layers, (iterable, total), for a progress bar.
    Returns:
        StabilizationReport; print it.
    Raises:
        ValueError: an argument or an image does not fit, the model is stabilized already, wrapped, not finite or in
            half precision. The model is then as it was.
    Reference: Zhang 2019, arXiv 1904.11486 (BlurPool); Frantar & Alistarh 2022, arXiv 2208.11580 (closed-form repair).
    Example:
        >>> import torchvision
        >>> model = torchvision.models.squeezenet1_1()
        >>> report = stabilize(model, torch.randn(16, 3, 72, 72), repair=None)
        >>> len(report.plan)
        3
    """
    started = time.perf_counter()
    _check_arguments(stem, later, order, depth, repair, fidelity)
    _check_model(model)
    squares = squares_for(model, images, size=size, seed=seed)
    parts, labels = _split(squares, labels, seed)
    parameter = next(model.parameters())
    probe = crop(squares.images[:1], 0, 0, squares.size).to(parameter.device, parameter.dtype)
    notes = list(squares.notes)
    settings = {"stem": stem, "later": later, "order": order, "depth": depth, "repair": repair, "fidelity": fidelity}
    with evaluating(model):
        flow = _traced(model, probe)
        _check_outputs(model, probe)
        before = steadiness(model, parts.report, labels)
        changed = _copied(model)
        conversion = None
        if stem in ("modulus", "energy"):
            conversion = _convert(changed, stem, parts.fit, notes)
        flow = _traced(changed, probe) if conversion is not None else flow
        decimators = find_decimators(flow)
        wanted = plan_of(flow, _wanted(decimators, flow, stem, later), order)
        if stem == "dense":
            try:
                wanted = with_dense_stem(wanted, flow, _stem_pool(flow))
            except ValueError as error:
                notes.append(f"the stem is as with blurpool: {error}")
        how = {"ridge": 10.0 ** (-2 * fidelity), "seed": seed}
        repaired = []
        if conversion is not None and repair is not None:
            repaired += repairing.repair(changed, model, parts.fit, which=repair, held_out=parts.choose, **how)
        levels, done = choose(
            changed,
            model,
            levels_of(wanted, flow),
            parts,
            price=PRICE * fidelity if depth == "auto" and repair is not None else None,
            track=track,
            which="next" if repair == "all" else repair,
            **how,
        )
        repaired += done
        plan = {name: treatment for level in levels if level.is_kept for name, treatment in level.plan.items()}
        if repair == "all" and (plan or conversion is not None):
            repaired += repairing.repair(changed, model, parts.fit, which="all", held_out=parts.choose, **how)
        after = steadiness(changed, parts.report, labels)
        if not torch.isfinite(after.movement).all():
            raise ValueError("the stabilized network's outputs are not finite; nothing was changed")
    if not plan and conversion is None:
        notes.append("nothing to treat: no layer decimates in a way that can be low-passed")
    _put_into(model, changed, plan, conversion)
    return StabilizationReport(
        decimators=_as_done(decimators, plan, levels),
        plan=plan,
        stem=_stem_done(stem, conversion is not None, plan),
        repaired=tuple(repaired),
        before=before,
        after=after,
        num_images=tuple(len(part.images) for part in parts),
        settings=settings | {"seed": seed, "size": squares.size},
        notes=tuple(notes),
        seconds=time.perf_counter() - started,
        kept_bytes=getattr(model, ATTRIBUTE).num_bytes,
    )


def revert(model: nn.Module) -> nn.Module:
    """Undo `stabilize` (and `convert`), in place, to the bit; the model.

    Raises:
        ValueError: the model is neither stabilized nor converted; or a refitted weight has been trained since, or its
            stock value was dropped by `finalize` or never was in the file that it was loaded from: there is no way
            back then. The model is as it was.
    """
    state: Stabilized | None = getattr(model, ATTRIBUTE, None)
    if state is None:
        return stem_conversion.revert(model)
    if state.is_final:
        raise ValueError("the stock weights are gone: finalize() has dropped them, or the model is from a file")
    tensors = _tensors(model)
    trained = [name for name, sums in state.sums.items() if name not in tensors or _fingerprint(tensors[name]) != sums]
    if trained:
        raise ValueError(
            f"{trained[0]} has changed since stabilize() ({len(trained)} such): its stock value would undo the training"
        )
    _take_back(model, state, with_stem=True)
    delattr(model, ATTRIBUTE)
    return model


def finalize(model: nn.Module) -> nn.Module:
    """Drop the stock weights that a stabilized model keeps for `revert`; the model. ValueError if it is not one."""
    state: Stabilized | None = getattr(model, ATTRIBUTE, None)
    if state is None:
        raise ValueError(f"expected a stabilized model, got {type(model).__name__}")
    state.stock, state.sums, state.is_final = {}, {}, True
    return model


# --- the steps --------------------------------------------------------------------------------------------------------


def _check_arguments(stem: str, later: str | None, order: str, depth: str, which: str | None, fidelity: float) -> None:
    for name, value, allowed in (
        ("stem", stem, STEMS),
        ("later", later, LATER),
        ("order", order, ORDERS),
        ("depth", depth, DEPTHS),
        ("repair", which, (*WHICH, None)),
    ):
        if value not in allowed:
            raise ValueError(f"expected {name} to be one of {allowed}, got {value!r}")
    if not 0 <= fidelity <= 1:
        raise ValueError(f"expected a fidelity from 0 to 1, got {fidelity}")


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(f"expected a torch.nn.Module, got {type(model).__name__}")
    stem_conversion.check_wrappers(model)
    if hasattr(model, ATTRIBUTE) or treated_layers(model):
        raise ValueError("the model is stabilized already; call revert(model) first")
    tensors = _tensors(model)
    if not any(True for _ in model.parameters()):
        raise ValueError("expected a network with parameters, got one without")
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"expected float32 or float64, {name} is {tensor.dtype}: model.float() first, then back")
        if tensor.is_meta:
            raise ValueError(f"expected a network with weights, {name} is on the meta device")
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"expected finite weights, {name} has NaN or infinity")


def _traced(model: nn.Module, probe: Tensor) -> Flow:
    try:
        return trace(model, probe)
    except RuntimeError as error:
        raise ValueError(f"the model does not run on an image {tuple(probe.shape)}: {error}") from error


def _check_outputs(model: nn.Module, probe: Tensor) -> None:
    shapes = [tuple(tensor.shape) for tensor in tensors_of(model(torch.cat([probe, probe])))]
    if not shapes or any(shape[:1] != (2,) for shape in shapes):
        raise ValueError(
            f"expected outputs (N, ...) for N images, got {shapes[:3]} for 2: of a detector, give the backbone"
        )


def _copied(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except RuntimeError as error:  # torch's own word on weights that are made from others, as pruned ones are
        raise ValueError(f"the model cannot be copied: {error}") from error


def _split(squares: Squares, labels: Tensor | None, seed: int) -> tuple[Split, Tensor | None]:
    parts = split(squares, seed)
    if labels is None:
        return parts, None
    if len(labels) != len(squares.images):
        raise ValueError(f"expected a label for each of the {len(squares.images)} images, got {len(labels)}")
    numbered = split(squares._replace(images=torch.arange(len(labels))), seed)
    return parts, torch.as_tensor(labels).cpu()[numbered.report.images]


def _convert(model: nn.Module, pooling: str, fit: Squares, notes: list[str]) -> Any:
    """Convert the stem, or say why not."""
    parameter = next(model.parameters())
    images = crop(fit.images, 0, 0, fit.size).to(parameter.device, parameter.dtype)
    try:
        return stem_conversion.convert(model, pooling=pooling, rest="blurpool", images=images)
    except StemError as error:
        notes.append(f"the stem was not converted: {error}")
        return None


def _wanted(decimators: list[Decimator], flow: Flow, stem: str, later: str | None) -> list[Decimator]:
    """Those that the arguments ask for: the first max pool behind the first convolution is the stem's."""
    place = _stem_pool(flow)
    return [own for own in decimators if (stem != "max" if own.name == place else later is not None)]


def _stem_pool(flow: Flow) -> str | None:
    """The first max pool, if no more convolutions come before it than a deep stem has."""
    num_convs = 0
    for call in flow.calls:
        if isinstance(call.module, MixPoolStem):
            return None
        if isinstance(call.module, nn.MaxPool2d):
            return call.name
        num_convs += isinstance(call.module, nn.Conv2d)
        if num_convs > MOST_STEM_CONVS:
            return None
    return None


def _stem_done(stem: str, is_converted: bool, plan: dict[str, str]) -> str:
    """The stem's pooling as it is in the end."""
    if is_converted or not plan:
        return stem if is_converted else "max"
    if stem == "dense" and "dense" not in plan.values():
        return "blurpool"
    return "blurpool" if stem in ("modulus", "energy") else stem


def _as_done(decimators: list[Decimator], plan: dict[str, str], levels: list[Level]) -> tuple[Decimator, ...]:
    """The decimators with what was done in the end, and why not."""
    left = {name: level.why for level in levels if not level.is_kept for name in level.plan}
    done = []
    for own in decimators:
        treatment = plan.get(own.name)
        why = "" if treatment else own.why if own.treatment is None else left.get(own.name, "as asked")
        done.append(replace(own, treatment=treatment, why=why))
    return tuple(done)


def _put_into(model: nn.Module, changed: nn.Module, plan: dict[str, str], conversion: Any) -> None:
    """What was done to the copy, to the model itself."""
    state = Stabilized(plan)
    try:
        if conversion is not None:
            (name, mixed), *_ = converted_stems(changed).items()
            stem_conversion.convert(model, select=conversion.poolings, stem=name)
            model.get_submodule(name).load_state_dict(mixed.state_dict())
        stems = tuple(f"{name}." for name in converted_stems(model))
        own, other = _tensors(model), _tensors(changed)
        with torch.no_grad():
            for name, tensor in own.items():
                if not name.startswith(stems) and not torch.equal(tensor, other[name]):
                    state.stock[name] = tensor.detach().clone()
                    tensor.copy_(other[name])
                    state.sums[name] = _fingerprint(tensor)
        treat(model, plan)
        setattr(model, ATTRIBUTE, state)
    except BaseException:
        _take_back(model, state, with_stem=conversion is not None)
        raise


def _take_back(model: nn.Module, state: Stabilized, *, with_stem: bool) -> None:
    tensors = _tensors(model)
    if with_stem and converted_stems(model):
        stem_conversion.revert(model)
    with torch.no_grad():
        for name, value in state.stock.items():
            tensors[name].copy_(value)
    untreat(model)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _fingerprint(tensor: Tensor) -> tuple[float, float]:
    values = tensor.detach().double()
    return values.sum().item(), values.abs().sum().item()
