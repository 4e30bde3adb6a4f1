"""`convert`: put a MixPoolStem at the place of a model's stem, in place, all or nothing; `revert`: take it out."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mixpool.conversion.find import StemError, find_stem
from mixpool.conversion.report import ConversionReport, agreement_of
from mixpool.conversion.stock import StockKeys, converted_stems, stock_parts, unwrapped
from mixpool.conversion.swap import Undo, feature_entries, key_holder, move_hooks, set_submodule, swap
from mixpool.ops.renamed import refuse_old
from mixpool.selection.calibrate import calibrate, stock_values
from mixpool.selection.images import first_batches, module_inputs, outputs_of
from mixpool.selection.plan import ChannelPlan
from mixpool.selection.rules import MIN_FIDELITY, Select, check_words, choose
from mixpool.stem.module import MixPoolStem
from mixpool.stem.parts import check_plain, pool_geometry

FEW_IMAGES = 16  # below, the report says that the measured numbers are not to be trusted


def convert(
    model: nn.Module,
    *,
    select: Select = "auto",
    pooling: str = "modulus",
    rest: str = "max",
    images: Tensor | Iterable[Tensor] | None = None,
    stem: str | None = None,
    backend: str = "auto",
    **old: Any,
) -> ConversionReport:
    """Replace a model's stem (conv, norm, activation, max pool) by a MixPoolStem, in place, all or nothing.

    The stem is found by data flow. The parameters are the same objects before and after, so an optimizer stays valid;
    the convolution's keys stay, the norm layer's move below it (`bn1.*` -> `conv1.bn.*`), and stock checkpoints load as
    before. Load weights first and convert second: the channels are chosen by their filters. Convert before
    torch.compile, DistributedDataParallel and EMA. A model of several stems takes several calls: the first finds the
    first stem, `stem=` names the others.

    Args:
        model: a timm, torchvision or own model, pretrained or not, training or not.
        select: which channels are swapped: "auto" (those whose modulus follows their max pooling: on the images, or as
            predicted from the filters, which also calibrates trained stems on synthetic pictures), "all", "none",
            C_out booleans, a function of FilterStats that returns such, or C_out names of poolings.
        pooling: of the chosen channels: "modulus" (binomial mean of |z| over the pooling window), "energy" (root of the
            binomial mean of |z|^2), or "cmod" (|z| at the window's centre, paper 2's CMod).
        rest: of the others: "max", or "blurpool" to pool them as BlurPool does; a model built with BlurPool keeps it.
        images: normalised input batches of the model, (N, C, H, W), or an iterable of images or batches (a data
            loader's (images, labels) too; at most 512 images are used): measures each candidate, calibrates the
            swapped channels' affine maps, and measures what the conversion does to the model's outputs.
        stem: name of the stem's convolution, if it is not the first.
        backend: as for MixPoolStem.
    Returns:
        ConversionReport; print it.
    Raises:
        ValueError: (StemError) the model has no such stem, is converted already, or is compiled or wrapped; or an
            argument does not fit. The message names what was found. The model is then as it was.
    Example:
        >>> import torchvision
        >>> model = torchvision.models.resnet18()
        >>> convert(model, select="all").num_complex
        64
    """
    refuse_old("convert", old)
    check_words(pooling, rest)
    check_model(model, stem)
    found = find_stem(model, stem)
    if found.taps and not feature_entries(model, found):
        raise StemError(
            f"the output of {', '.join(found.taps)} is also an output of the model: after conversion it would have "
            "the size of the pooled map. Convert the model before wrapping it for feature extraction"
        )
    notes = list(found.notes)
    conv, norm, pool = (found.modules.get(name) for name in (found.conv, found.norm, found.pool))
    if found.blur is not None:
        rest, pool = "blurpool", _strided_pool(pool, found.modules[found.blur])
        notes.append(f'built with BlurPool: {found.blur} is part of the stem, so rest="blurpool"')
    is_automatic = isinstance(select, str) and select == "auto"

    undo: Undo = []
    try:
        mixed = MixPoolStem(conv, norm, found.act_module, pool, backend=backend)
        batches = None if images is None else first_batches(images)
        before = None if batches is None else outputs_of(model, batches)
        inputs = None if batches is None else module_inputs(model, conv, batches)
        used = "none" if is_automatic and not found.is_first else select
        plan, fits = choose(mixed, used, inputs, pooling=pooling, rest=rest)
        mixed.lay(plan.poolings)
        undo.append(_values_restorer(conv, norm))
        if _is_shared(model, conv, norm):
            if images is not None or is_automatic:
                notes.append("not calibrated: a parameter of the stem is used elsewhere in the model too")
        elif fits is not None and calibrate(mixed, fits) and images is None:
            notes.append(
                "the swapped channels were calibrated on synthetic pictures"
                + ("" if norm is not None else ", for an input normalised as ImageNet's")
                + "; with images= on real ones"
            )
        notes += swap(model, found, mixed, undo)
        agreement, measured = _measured(model, batches, before)
        notes += measured
        if is_automatic and found.is_first:
            notes += _nothing_selected(plan)
    except BaseException:
        take_back(undo)
        raise
    return ConversionReport(stem=str(found), plan=plan, agreement=agreement, notes=tuple(notes))


def revert(model: nn.Module) -> nn.Module:
    """Put a converted model's stock modules back, in place, with the present weights and the calibration undone.

    `convert` then `revert` is the identity, to the bit. All or nothing, as `convert` is. Returns the model.

    Raises:
        ValueError: the model is not converted, or is compiled or DDP-wrapped, or a weight of the stem is computed from
            others (pruning, weight norm): the message says which. The model is then as it was.
    """
    check_wrappers(model)
    stems = converted_stems(model)
    if not stems:
        raise ValueError(f"expected a converted model, found no MixPoolStem in {type(model).__name__}")
    places = [(stem, *stock_parts(name, stem)) for name, stem in stems.items()]
    for name, stem in stems.items():
        check_plain(stem, name or "the stem")
        if stem.bn is not None:
            check_plain(stem.bn, f"{name}.bn".lstrip("."))
    undo: Undo = []
    try:
        for stem, prefix, stock in places:
            _put_back(model, stem, prefix, stock, undo)
    except BaseException:
        take_back(undo)
        raise
    return model


def take_back(undo: Undo) -> None:
    """Undo the steps, the last one first."""
    for step in reversed(undo):
        step()


def _put_back(model: nn.Module, stem: MixPoolStem, prefix: str, stock: Any, undo: Undo) -> None:
    modules = dict(stock.modules)
    conv = modules["conv"]
    values = stock_values(stem)
    undo.append(_values_restorer(stem, stem.bn, stem.calibration))
    for name, value in values.items():
        owner = stem.bn if name.startswith("bn.") else stem
        getattr(owner, name.removeprefix("bn.")).data.copy_(value)
    stem.calibration[:, 0], stem.calibration[:, 1] = 1, 0
    undo.append(lambda weight=conv.weight, bias=conv.bias: vars(conv)["_parameters"].update(weight=weight, bias=bias))
    conv.weight, conv.bias = stem.weight, stem.bias
    if "norm" in modules:
        modules["norm"] = stem.bn
    if "blur" in modules:
        modules["blur"].to(stem.weight.device, stem.weight.dtype)
    for part, module in modules.items():
        replacement = model.get_submodule(prefix + stock.names[part])
        move_hooks(replacement, module, undo)
        if part != "norm":
            undo.append(lambda module=module, mode=module.training: module.train(mode))
            module.train(replacement.training)
        set_submodule(model, prefix + stock.names[part], module, undo)
    for entry, reduction in stock.reductions:
        undo.append(lambda entry=entry, old=entry["reduction"]: entry.update(reduction=old))
        entry["reduction"] = reduction
    holder = key_holder(model, prefix, stock.names)
    if holder is not None:
        hooks = holder._load_state_dict_pre_hooks
        for key in [k for k, hook in hooks.items() if isinstance(getattr(hook, "hook", hook), StockKeys)]:
            hook = hooks.pop(key)
            undo.append(lambda hooks=hooks, key=key, hook=hook: hooks.update({key: hook}))


# --- checks before anything is touched --------------------------------------------------------------------------------


def check_model(model: nn.Module, stem: str | None) -> None:
    """Raise StemError for what is no plain model, or has the stem converted already."""
    if not isinstance(model, nn.Module):
        raise StemError(f"expected a torch.nn.Module, got {type(model).__name__}")
    check_wrappers(model)
    stems = converted_stems(model)
    if stems and (stem is None or stem in stems):
        raise StemError(
            f"the model is converted already: found a MixPoolStem at {', '.join(map(repr, stems))}; "
            "call revert(model) first, or name the convolution of another stem"
        )


def check_wrappers(model: nn.Module) -> None:
    wrapper = None
    if isinstance(model, torch.jit.ScriptModule):
        wrapper = "a torch.jit.ScriptModule"
    elif unwrapped(model) is not model or "FullyShardedDataParallel" in type(model).__name__:
        wrapper = f"a {type(model).__name__}"
    elif getattr(model, "_compiled_call_impl", None) is not None:
        wrapper = "a model compiled with model.compile()"
    if wrapper is not None:
        raise StemError(f"expected the plain model, found {wrapper} around it: convert first, then compile or wrap")


def _strided_pool(pool: nn.MaxPool2d, blur: nn.Module) -> nn.MaxPool2d:
    """The max pool that a stride-1 max pool and a BlurPool of stride 2 stand for."""
    geometry = pool_geometry(pool)
    filt_size = getattr(blur, "filt_size", None)
    if geometry.stride != (1, 1) or filt_size != 3 or getattr(blur, "pad_mode", "reflect") != "reflect":
        raise StemError(
            "expected a max pool of stride 1 and a BlurPool of 3 taps on a reflected border, "
            f"found {pool} and {blur} with {filt_size} taps"
        )
    if geometry.size != (3, 3) or geometry.padding != (1, 1) or geometry.ceil_mode:
        raise StemError(f"expected a max pool of size 3 and padding 1 before the blur, found {pool}")
    return nn.MaxPool2d(pool.kernel_size, blur.stride, pool.padding)


# --- what the report says ---------------------------------------------------------------------------------------------


def _measured(model: nn.Module, batches: list[Tensor] | None, before: Tensor | None):
    """(agreement of the outputs before and after, notes)."""
    if batches is None:
        return None, []
    notes = []
    count = sum(len(batch) for batch in batches)
    if 0 < count < FEW_IMAGES:
        notes.append(f"only {count} image(s) to measure and calibrate on: give {FEW_IMAGES} or more to trust it")
    after = None if before is None else outputs_of(model, batches)
    if before is None or after is None:
        notes.append("effect not measured: the model's output is not a table of logits (N, classes)")
    elif not torch.isfinite(before).all():
        notes.append("effect not measured: the model's outputs on the images were not finite before the conversion")
    else:
        return agreement_of(before, after), notes
    return None, notes


def _nothing_selected(plan: ChannelPlan) -> list[str]:
    """A note that says why the automatic rule has swapped nothing, if so."""
    if plan.num_complex > 0:
        return []
    if plan.fidelity is None or plan.fidelity.isnan().all():
        return [
            "no filter's modulus is expected to follow its max pooling (untrained weights? load them first, start from "
            "a filter bank by initialize(), or choose channels by select=): everything stays on max pooling"
        ]
    best = plan.fidelity[~plan.fidelity.isnan()].max()
    return [
        f'no candidate\'s correlation with max pooling reached {MIN_FIDELITY} (best {best:.2f}; with "cmod" hardly any '
        "does): everything stays on max pooling; leave the images out, or pass select=, to swap all the same"
    ]


# --- parameters -------------------------------------------------------------------------------------------------------


def _values_restorer(conv: nn.Module, norm: nn.Module | None, *others: Tensor) -> Callable[[], None]:
    """A function that gives the tensors which `calibrate` may change the values they have now."""
    tensors = [t for t in (*_own_tensors(conv, norm), *others) if t is not None]
    values = [tensor.detach().clone() for tensor in tensors]

    def restore() -> None:
        for tensor, value in zip(tensors, values, strict=True):
            tensor.data.copy_(value)

    return restore


def _own_tensors(conv: nn.Module, norm: nn.Module | None) -> list[Tensor | None]:
    return [conv.weight, conv.bias, *([] if norm is None else [norm.weight, norm.bias])]


def _is_shared(model: nn.Module, conv: nn.Conv2d, norm: nn.Module | None) -> bool:
    """Whether a parameter that `calibrate` may change has another place in the model."""
    own = {id(tensor) for tensor in _own_tensors(conv, norm) if tensor is not None}
    places = [id(p) for _, p in model.named_parameters(remove_duplicate=False) if id(p) in own]
    return len(places) > len(set(places))
