"""Models by name, from timm or torchvision, with the weights of a file. Only the commands use this."""

from __future__ import annotations

import difflib
import warnings
from pathlib import Path
from typing import Any

import timm
from torch import nn

from mixpool.conversion.checkpoint import HUBS, TORCHVISION, Checkpoint, one_line, read_checkpoint
from mixpool.conversion.convert import convert
from mixpool.conversion.stock import converted_stems
from mixpool.stabilization.files import load_stabilized


def is_timm_model(name: str) -> bool:
    """Whether timm builds a model of this name; one that torchvision knows too is timm's unless it says otherwise."""
    return name.startswith(HUBS) or (not name.startswith(TORCHVISION) and timm.is_model(name))


def create_model(name: str, *, pretrained: bool = False, num_classes: int | None = None, **arguments: Any) -> nn.Module:
    """A model in evaluation mode, by its timm name, by `torchvision/NAME`, or by a name that only torchvision knows.

    Torchvision's pretrained weights are its default ones, the best it has, and the model then says in `pretrained_cfg`,
    as timm's do, how the images have to be for these weights. Without them nothing is known about that.

    Args:
        arguments: further ones of the model's constructor.
    Raises:
        ValueError: no such model, or its pretrained weights cannot be had.
    """
    from torchvision import models

    options: dict[str, Any] = dict(arguments) if num_classes is None else {**arguments, "num_classes": num_classes}
    bare = name.removeprefix(TORCHVISION)
    if is_timm_model(name):
        build = timm.create_model
        options["pretrained"] = pretrained
    elif bare in models.list_models(module=models):
        build = models.get_model
        options["weights"] = models.get_model_weights(bare).DEFAULT if pretrained else None
    else:
        known = [*timm.list_models(), *(TORCHVISION + other for other in models.list_models(module=models))]
        close = difflib.get_close_matches(name, known, n=3)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise ValueError(f"neither timm nor torchvision has a model named {name!r}{hint}")
    try:
        with warnings.catch_warnings():
            # googlenet and inception_v3 warn of their slow initialisation, which is of no interest here.
            warnings.filterwarnings("ignore", category=FutureWarning, module="torchvision")
            model = build(bare if build is models.get_model else name, **options).eval()
    except Exception as error:  # the hubs raise many kinds for a missing network, file or weight
        if pretrained:
            raise ValueError(
                f"cannot get the pretrained weights of {name!r} ({one_line(error)}); "
                "without a network, download them elsewhere and give --checkpoint FILE"
            ) from error
        raise ValueError(f"cannot build {name!r}: {one_line(error)}") from error
    if options.get("weights") is not None:
        model.pretrained_cfg = _torchvision_config(options["weights"].transforms())
    return model


def load_model(
    name: str,
    file: Checkpoint | str | Path | None = None,
    *,
    pretrained: bool = False,
    num_classes: int | None = None,
) -> nn.Module:
    """A model by name, in evaluation mode, with the weights of a file: of a stock model, a converted or stabilized one.

    Where the file says what was trained (`args` of `mixpool train` and of timm's script), the network is built with the
    same arguments: a state dict alone does not tell, for one, a network antialiased by `aa_layer` from the plain one.

    Args:
        name: as for `create_model`.
        file: the checkpoint, or None for random or pretrained weights.
        num_classes: counts more than what the file says.
    Raises:
        FileNotFoundError: no such file.
        ValueError: no such model, or the file does not fit it.
    """
    if file is None:
        return create_model(name, pretrained=pretrained, num_classes=num_classes)
    checkpoint = file if isinstance(file, Checkpoint) else read_checkpoint(file)
    built, arguments = checkpoint.built_as(name)
    if num_classes is not None:
        arguments["num_classes"] = num_classes
    model = create_model(built, **arguments)
    if checkpoint.plan is not None:
        return load_stabilized(model, checkpoint).eval()
    if not checkpoint.stems and not converted_stems(model):
        _load_stock(model, checkpoint)
        return model
    try:
        if not converted_stems(model):
            for stem in checkpoint.stems:
                convert(model, select="none", stem=stem)
        model.load_state_dict(checkpoint.state)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{checkpoint.path} does not fit {name}: {' '.join(str(error).split())[:300]}") from error
    return model.eval()


def _load_stock(model: nn.Module, checkpoint: Checkpoint) -> None:
    state, expected = checkpoint.state, model.state_dict()
    missing, unexpected = expected.keys() - state.keys(), state.keys() - expected.keys()
    # Batch counters came with PyTorch 0.4.1; older files lack them, and an evaluation does not need them.
    missing = {key for key in missing if not key.endswith("num_batches_tracked")}
    if missing or unexpected:
        raise ValueError(
            f"{checkpoint.path} does not fit the model: {_some_keys(missing, 'missing')}, "
            f"{_some_keys(unexpected, 'unexpected')}"
        )
    differing = [key for key in state if state[key].shape != expected[key].shape]
    if differing:
        key = differing[0]
        raise ValueError(
            f"{checkpoint.path} does not fit the model: {key} has shape {tuple(state[key].shape)} in the file and "
            f"{tuple(expected[key].shape)} in the model ({len(differing)} such); for another number of classes "
            "give --num-classes"
        )
    model.load_state_dict({**expected, **state})


def _torchvision_config(transform: Any) -> dict[str, Any]:
    """What the transform of torchvision's weights does, in timm's terms."""
    (crop,), (resized,) = transform.crop_size, transform.resize_size
    return {
        "input_size": (3, crop, crop),
        "crop_pct": crop / resized,
        "crop_mode": "center",
        "interpolation": transform.interpolation.value,
        "mean": tuple(transform.mean),
        "std": tuple(transform.std),
    }


def _some_keys(keys: set[str], what: str) -> str:
    shown = ", ".join(sorted(keys)[:3])
    return f"{len(keys)} keys {what}" + (f" ({shown}{', ...' if len(keys) > 3 else ''})" if keys else "")
