"""`convert`: put a MixPoolStem at the place of a model's stem, in place, all or nothing; `revert`: take it out."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mixpool.conversion.find import FoundStem, StemError, find_stem
from mixpool.conversion.report import ConversionReport, agreement_of
from mixpool.conversion.stock import StockKeys, StockParts, converted_stems, stock_parts, unwrapped
from mixpool.selection.calibrate import stock_values
from mixpool.selection.images import first_batches, module_inputs, outputs_of
from mixpool.selection.plan import ChannelPlan
from mixpool.selection.rules import MIN_FIDELITY, Select
from mixpool.stem.module import MixPoolStem
from mixpool.stem.parts import check_parts, pool_geometry

FEW_IMAGES = 16  # below, the report says that the measured numbers are not to be trusted

_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
    "_is_full_backward_hook",
)
_KEPT_BEHIND = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def convert(
    model: nn.Module,
    *,
    select: Select = "auto",
    blur: int = 3,
    max_blur: int = 1,
    imag: str = "tied",
    images: Tensor | Iterable[Tensor] | None = None,
    stem: str | None = None,
    backend: str = "auto",
) -> ConversionReport:
    """Replace a model's stem (conv, norm, activation, max pool) by a MixPoolStem, in place, all or nothing.

    The stem is found by data flow. The parameters are the same objects before and after, so an optimizer stays valid
    (`imag="free"` adds one, `weight_imag`, that it does not know yet); the convolution's keys stay, the norm layer's
    move below it (`bn1.*` -> `conv1.bn.*`), and stock checkpoints load as before. Load weights first and convert
    second: the channels are chosen by their filters. Convert before torch.compile, DistributedDataParallel and EMA.
    A model of several stems takes several calls: the first finds the first stem, `stem=` names the others.

    Args:
        model: a timm, torchvision or own model, pretrained or not, training or not.
        select: which channels take the modulus: "auto" (those whose modulus follows their max pooling: on the images,
            or as predicted from the filters, which also calibrates trained stems on synthetic pictures), "all",
            "none", C_out booleans, or a function of FilterStats that returns such.
        blur: 3 for a binomial mean of the modulus over the pooling window, 1 for its centre alone (paper 2's CMod).
        max_blur: 3 to pool the max channels as BlurPool does; a model built with BlurPool keeps it (3).
        imag: "tied": the imaginary filters follow the real ones; "free": they are a parameter of their own.
        images: normalised input batches of the model, (N, C, H, W), or an iterable of images or batches (a data
            loader's (images, labels) too; at most 512 images are used): measures each candidate, calibrates the
            swapped channels' affine maps, and measures what the conversion does to the model's outputs.
        stem: name of the stem's convolution, if it is not the first.
        backend: as for MixPoolStem; "fused" wants a model on the GPU already if images are given.
    Returns:
        ConversionReport; print it.
    Raises:
        ValueError: (StemError) the model has no such stem, is converted already, or is compiled or wrapped; or an
            argument does not fit. The message names what was found. The model is then as it was.
    Example:
        >>> import torchvision
        >>> model = torchvision.models.resnet18()
        >>> convert(model, select="all").num_modulus
        64
    """
    _check_model(model, stem)
    found = find_stem(model, stem)
    if found.taps and not _feature_entries(model, found):
        raise StemError(
            f"the output of {', '.join(found.taps)} is also an output of the model: after conversion it would have "
            "the size of the pooled map. Convert the model before wrapping it for feature extraction"
        )
    conv, pool = found.modules[found.conv], found.modules[found.pool]
    notes = list(found.notes)
    if found.blur is not None:
        max_blur, pool = 3, _strided_pool(pool, found.modules[found.blur])
        notes.append(f"built with BlurPool: {found.blur} is part of the stem, so max_blur=3")
    norm = None if found.norm is None else found.modules[found.norm]
    check_parts(conv, norm, found.act_module, pool)
    is_automatic = isinstance(select, str) and select == "auto"
    if is_automatic and not found.is_first:
        select = "none"

    undo = []
    try:
        batches = None if images is None else first_batches(images)
        before = None if batches is None else outputs_of(model, batches)
        inputs = None if batches is None else module_inputs(model, conv, batches)
        undo.append(_values_restorer(conv, norm))
        is_shared = _is_shared(model, conv, norm)
        if is_shared and (images is not None or is_automatic):
            notes.append("not calibrated: a parameter of the stem is used elsewhere in the model too")
        mixed = MixPoolStem(
            conv,
            norm,
            found.act_module,
            pool,
            select=select,
            blur=blur,
            max_blur=max_blur,
            imag=imag,
            images=inputs,
            calibrated=not is_shared,
            backend=backend,
        )
        mixed.stock = StockParts(
            names={
                part: name
                for part in ("conv", "norm", "act", "pool", "blur")
                if (name := getattr(found, part)) is not None
            },
            modules={},
        )
        if images is None and bool((mixed.calibration[:, 0] != 1).any()):
            notes.append(
                "the swapped channels were calibrated on synthetic pictures"
                + ("" if norm is not None else ", for an input normalised as ImageNet's")
                + "; with images= on real ones"
            )
        notes += _swap(model, found, mixed, undo)
        if imag == "free":
            notes.append(f"{found.conv}.weight_imag is a new parameter: an optimizer built before does not train it")
        num_images = 0 if batches is None else sum(len(batch) for batch in batches)
        if 0 < num_images < FEW_IMAGES:
            notes.append(
                f"only {num_images} image(s) to measure and calibrate on: give {FEW_IMAGES} or more to trust it"
            )
        after = None if before is None else outputs_of(model, batches)
        agreement = None
        if before is not None and after is not None and torch.isfinite(before).all():
            agreement = agreement_of(before, after)
        elif before is not None:
            notes.append("effect not measured: the model's outputs on the images were not finite before the conversion")
        elif batches is not None:
            notes.append("effect not measured: the model's output is not a table of logits (N, classes)")
        if is_automatic and found.is_first:
            notes += _nothing_selected(mixed.channel_plan)
    except BaseException:
        for step in reversed(undo):
            step()
        raise
    return ConversionReport(
        stem=str(found),
        plan=mixed.channel_plan,
        blur=mixed.blur,
        max_blur=mixed.max_blur,
        imag=mixed.imag,
        agreement=agreement,
        notes=tuple(notes),
    )


def revert(model: nn.Module) -> nn.Module:
    """Put a converted model's stock modules back, in place, with the present weights and the calibration undone.

    `convert` then `revert` is the identity, to the bit. Returns the model.

    Raises:
        ValueError: the model is not converted, or is compiled or DDP-wrapped.
    """
    _check_wrappers(model)
    stems = converted_stems(model)
    if not stems:
        raise ValueError(f"expected a converted model, found no MixPoolStem in {type(model).__name__}")
    places = [(stem, *stock_parts(name, stem)) for name, stem in stems.items()]
    for stem, prefix, stock in places:
        if parametrize.is_parametrized(stem, "weight"):  # filters of which only the colour mix was learned
            parametrize.remove_parametrizations(stem, "weight")
        _restore_values(stem)
        modules = dict(stock.modules)
        conv = modules["conv"]
        conv.weight, conv.bias = stem.weight, stem.bias
        if "norm" in modules:
            modules["norm"] = stem.bn
        if "blur" in modules:
            modules["blur"].to(stem.weight.device, stem.weight.dtype)
        for part, module in modules.items():
            replacement = model.get_submodule(prefix + stock.names[part])
            _move_hooks(replacement, module)
            if part != "norm":
                module.train(replacement.training)
            _set_submodule(model, prefix + stock.names[part], module)
        for entry, reduction in stock.reductions:
            entry["reduction"] = reduction
        holder = _key_holder(model, prefix, stock.names)
        if holder is not None:
            hooks = holder._load_state_dict_pre_hooks
            for key in [k for k, hook in hooks.items() if isinstance(_inner_hook(hook), StockKeys)]:
                del hooks[key]
    return model


# --- checks before anything is touched --------------------------------------------------------------------------------


def _check_model(model: nn.Module, stem: str | None) -> None:
    if not isinstance(model, nn.Module):
        raise StemError(f"expected a torch.nn.Module, got {type(model).__name__}")
    _check_wrappers(model)
    stems = converted_stems(model)
    if stems and (stem is None or stem in stems):
        raise StemError(
            f"the model is converted already: found a MixPoolStem at {', '.join(map(repr, stems))}; "
            "call revert(model) first, or name the convolution of another stem"
        )


def _check_wrappers(model: nn.Module) -> None:
    wrapper = None
    if isinstance(model, torch.jit.ScriptModule):
        wrapper = "a torch.jit.ScriptModule"
    elif unwrapped(model) is not model or "FullyShardedDataParallel" in type(model).__name__:
        wrapper = f"a {type(model).__name__}"
    elif getattr(model, "_compiled_call_impl", None) is not None:
        wrapper = "a model compiled with model.compile()"
    if wrapper is not None:
        raise StemError(f"expected the plain model, found {wrapper} around it: convert first, then compile or wrap")


# --- the swap and its way back ----------------------------------------------------------------------------------------


def _swap(model: nn.Module, found: FoundStem, mixed: MixPoolStem, undo: list) -> list[str]:
    """Put the stem and Identities into the model; append to `undo` how to take each step back; return notes."""
    notes = []
    stock = mixed.stock
    for part, name in stock.names.items():
        module = model.get_submodule(name)
        stock.modules[part] = module
        replacement = mixed if part == "conv" else nn.Identity().train(module.training)
        moved = _move_hooks(module, replacement)
        if moved:
            what = "the stem's input and output" if part == "conv" else "the stem's pooled output"
            notes.append(f"{moved} hook(s) of {name} stay in place and now see {what}")
        left = sum(len(getattr(module, attribute, ())) for attribute in _KEPT_BEHIND)
        if left and part != "norm":
            notes.append(f"{left} state-dict hook(s) of {name} wait for revert()")
        undo.append(lambda name=name, module=module: _set_submodule(model, name, module))
        _set_submodule(model, name, replacement)
    holder = _key_holder(model, "", stock.names)
    if holder is not None:
        above = _common_prefix(stock.names["conv"], stock.names["norm"])
        hook = StockKeys(stock.names["norm"].removeprefix(above), stock.names["conv"].removeprefix(above))
        handle = holder.register_load_state_dict_pre_hook(hook)
        undo.append(handle.remove)
    for entry in _feature_entries(model, found):
        stock.reductions.append((entry, entry["reduction"]))
        undo.append(lambda entry=entry, old=entry["reduction"]: entry.update(reduction=old))
        entry["reduction"] *= mixed._pool.stride[0]
        notes.append(f"feature map {entry['module']!r} now has reduction {entry['reduction']}: it is the stem's output")
    return notes


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


def _nothing_selected(plan: ChannelPlan) -> list[str]:
    """A note that says why the automatic rule has swapped nothing, if so."""
    if plan.num_modulus > 0:
        return []
    if plan.fidelity is None or plan.fidelity.isnan().all():
        return [
            "no filter's modulus is expected to follow its max pooling (untrained weights? load them first, start from "
            "a filter bank by initialize(), or choose channels by select=): everything stays on max pooling"
        ]
    best = plan.fidelity[~plan.fidelity.isnan()].max()
    return [
        f"no candidate's correlation with max pooling reached {MIN_FIDELITY} (best {best:.2f}; with blur=1 hardly any "
        "does): everything stays on max pooling; leave the images out, or pass select=, to swap all the same"
    ]


def _values_restorer(conv: nn.Conv2d, norm: nn.Module | None) -> Callable[[], None]:
    """A function that gives the tensors which `calibrate` may change the values they have now."""
    tensors = [t for t in _own_tensors(conv, norm) if t is not None]
    values = [tensor.detach().clone() for tensor in tensors]

    def restore() -> None:
        for tensor, value in zip(tensors, values, strict=True):
            tensor.data.copy_(value)

    return restore


def _own_tensors(conv: nn.Conv2d, norm: nn.Module | None) -> list[Tensor | None]:
    return [conv.weight, conv.bias, *([] if norm is None else [norm.weight, norm.bias])]


def _is_shared(model: nn.Module, conv: nn.Conv2d, norm: nn.Module | None) -> bool:
    """Whether a parameter that `calibrate` may change has another place in the model."""
    own = {id(tensor) for tensor in _own_tensors(conv, norm) if tensor is not None}
    places = [id(p) for _, p in model.named_parameters(remove_duplicate=False) if id(p) in own]
    return len(places) > len(set(places))


def _restore_values(stem: MixPoolStem) -> None:
    """Undo the calibration in the stem's parameters."""
    for name, value in stock_values(stem).items():
        owner = stem.bn if name.startswith("bn.") else stem
        getattr(owner, name.removeprefix("bn.")).data.copy_(value)
    stem.calibration[:, 0], stem.calibration[:, 1] = 1, 0


def _set_submodule(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _move_hooks(source: nn.Module, target: nn.Module) -> int:
    """Let `target` run the hooks of `source` (the same dictionaries, so that handles keep working); how many."""
    count = len(source._forward_pre_hooks) + len(source._forward_hooks)
    count += len(source._backward_hooks) + len(source._backward_pre_hooks)
    for attribute in _HOOKS:
        if hasattr(source, attribute):
            setattr(target, attribute, getattr(source, attribute))
    return count


def _key_holder(model: nn.Module, prefix: str, names: dict[str, str]) -> nn.Module | None:
    """The innermost module that holds both the convolution and the norm layer; None without a norm layer."""
    if "norm" not in names:
        return None
    return model.get_submodule((prefix + _common_prefix(names["conv"], names["norm"])).rstrip("."))


def _common_prefix(first: str, second: str) -> str:
    """Name, with a dot, of the innermost module that holds both of two modules; empty for the model itself."""
    shared = []
    for a, b in zip(first.split(".")[:-1], second.split(".")[:-1], strict=False):
        if a != b:
            break
        shared.append(a)
    return "".join(f"{part}." for part in shared)


def _inner_hook(hook: object) -> object:
    return getattr(hook, "hook", hook)


def _feature_entries(model: nn.Module, found: FoundStem) -> list[dict]:
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
