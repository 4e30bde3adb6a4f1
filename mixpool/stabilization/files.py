"""A stabilized network in a file, and back: its state under stock keys, and beside it which layers have a low-pass.

Low-passes have no parameters, so a state alone does not tell a stabilized network from a stock one. A .safetensors file
says it in its metadata, entry "mixpool", as JSON; a checkpoint of `mixpool train` in its entry "mixpool":

    {"version": of mixpool, "plan": {layer: treatment, as `treat` takes it}}

A .safetensors file may add "arch" and "args", which tell the network's name and how it and its images are made.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mixpool.conversion import convert as stem_conversion
from mixpool.conversion.checkpoint import BUILT_WITH, STABILIZED, Checkpoint, read_checkpoint, write_safetensors
from mixpool.conversion.stock import converted_stems, unwrapped
from mixpool.evaluation.model_input import SETTINGS
from mixpool.stabilization.stabilize import ATTRIBUTE, Stabilized
from mixpool.stabilization.treat import treat, treated_layers, untreat
from mixpool.version import VERSION

KEPT_SETTINGS = (*BUILT_WITH, "model_kwargs", *SETTINGS)  # of a training: what builds the network and its images


def is_stabilized(model: nn.Module) -> bool:
    """Whether `stabilize` or a file has made this model what it is, be it without any layer to low-pass."""
    model = unwrapped(model)
    return hasattr(model, ATTRIBUTE) or bool(treated_layers(model))


def description_of(model: nn.Module) -> dict[str, Any]:
    """What a file says of a stabilized model beside its state, as plain values; of another one nothing, {}."""
    if not is_stabilized(model):
        return {}
    return {STABILIZED: {"version": VERSION, "plan": treated_layers(unwrapped(model))}}


def save_stabilized(
    model: nn.Module, path: str | Path, *, arch: str | None = None, settings: Mapping[str, Any] | None = None
) -> None:
    """Write a stabilized model as .safetensors, all or nothing: the old file stays until the new one is whole.

    Args:
        model: a stabilized model, on any device, in any dtype.
        path: of the file, which is overwritten.
        arch: the model's name, which the commands then compare with the one asked for.
        settings: the options of its training by timm's names; those that shape the network and its images are kept.
    Raises:
        ValueError: the model is not stabilized, or the file is not named *.safetensors.
        OSError: the file cannot be written.
    """
    path, model = Path(path), unwrapped(model)
    if path.suffix != ".safetensors":
        raise ValueError(f"expected a file named *.safetensors, got {path}")
    if not is_stabilized(model):
        raise ValueError(f"expected a stabilized model, got a {type(model).__name__} without low-passes")
    about = dict(description_of(model)[STABILIZED])
    if arch is not None:
        about["arch"] = arch
    if settings is not None:
        about["args"] = {name: settings[name] for name in KEPT_SETTINGS if settings.get(name) is not None}
    write_safetensors(model, path, {STABILIZED: json.dumps(about)})


def load_stabilized(model: nn.Module, file: str | Path | Checkpoint) -> nn.Module:
    """Make a stock model the stabilized one of a file, in place, all or nothing; the model.

    It gets the file's low-passes, its converted stem if there is one, and its weights; mode, device and dtype stay.
    Its stock weights are gone, as after `finalize`: there is no `revert`.

    Args:
        model: the stock network, built with the arguments of the one that was stabilized; its weights do not matter.
        file: what `save_stabilized` or `mixpool stabilize` wrote, or a checkpoint of `mixpool train` of such a network.
    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is not of a stabilized network, or does not fit; or the model is stabilized already.
    Example:
        >>> import os, tempfile, torchvision
        >>> from mixpool.stabilization.stabilize import stabilize
        >>> model = torchvision.models.squeezenet1_1()
        >>> report = stabilize(model, torch.randn(16, 3, 72, 72), repair=None)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_stabilized(model, os.path.join(folder, "steady.safetensors"))
        ...     same = load_stabilized(torchvision.models.squeezenet1_1(), os.path.join(folder, "steady.safetensors"))
        >>> x = torch.randn(1, 3, 64, 64)
        >>> torch.equal(model.eval()(x), same.eval()(x))
        True
    """
    checkpoint = file if isinstance(file, Checkpoint) else read_checkpoint(file)
    if checkpoint.plan is None:
        raise ValueError(
            f"expected the file of a stabilized network, {checkpoint.path} names no low-passes: "
            "load it as any state dict, and stabilize"
        )
    stem_conversion.check_wrappers(model)
    if is_stabilized(model):
        raise ValueError("the model is stabilized already: expected the stock one")
    # A load that fails half-way has overwritten tensors; a copy of them is simpler than to foresee every error.
    before = [(tensor, tensor.detach().clone()) for tensor in (*model.parameters(), *model.buffers())]
    had_stems = bool(converted_stems(model))
    try:
        for stem in () if had_stems else checkpoint.stems:
            stem_conversion.convert(model, select="none", stem=stem)
        treat(model, checkpoint.plan)
        model.load_state_dict(checkpoint.state)
    except BaseException as error:
        untreat(model)
        if converted_stems(model) and not had_stems:
            stem_conversion.revert(model)
        with torch.no_grad():
            for tensor, value in before:
                tensor.copy_(value)
        if not isinstance(error, (RuntimeError, ValueError)):
            raise
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{checkpoint.path} does not fit the {type(model).__name__}: {reason}") from error
    setattr(model, ATTRIBUTE, Stabilized(dict(checkpoint.plan), is_final=True))
    return model
