"""Models by name, from timm or torchvision, and checkpoints from files. Only the command line uses this."""

from __future__ import annotations

import argparse
import difflib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mixpool.data import IMAGENET_MEAN, IMAGENET_STD

TORCHVISION = "torchvision/"
WRAPPER_PREFIXES = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile


@dataclass(frozen=True)
class InputSettings:
    """How a model wants its images: side of the crop in pixels, crop over resized shorter side, mean and std."""

    size: int = 224
    crop_ratio: float = 0.875
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD


def create_model(name: str, *, pretrained: bool = False, num_classes: int | None = None) -> nn.Module:
    """A model in evaluation mode, by its timm name, by `torchvision/NAME`, or by a name that only torchvision knows.

    Raises:
        ValueError: no such model, or its pretrained weights cannot be had.
    """
    import timm
    from torchvision import models

    options: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    bare = name.removeprefix(TORCHVISION)
    is_hub = name.startswith(("hf_hub:", "hf-hub:", "local-dir:"))
    if name.startswith("mixpool_") or is_hub:
        import mixpool.timm_models  # noqa: F401  puts its models into timm's registry
    if not name.startswith(TORCHVISION) and (is_hub or timm.is_model(name)):
        build = timm.create_model
        options["pretrained"] = pretrained
    elif bare in models.list_models(module=models):
        build = models.get_model
        options["weights"] = "DEFAULT" if pretrained else None
    else:
        known = [*timm.list_models(), *(TORCHVISION + other for other in models.list_models(module=models))]
        close = difflib.get_close_matches(name, known, n=3)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise ValueError(f"neither timm nor torchvision has a model named {name!r}{hint}")
    try:
        with warnings.catch_warnings():
            # googlenet and inception_v3 warn of their slow initialisation, which is of no interest here.
            warnings.filterwarnings("ignore", category=FutureWarning, module="torchvision")
            return build(bare if build is models.get_model else name, **options).eval()
    except Exception as error:  # the hubs raise many kinds for a missing network, file or weight
        if pretrained:
            raise ValueError(
                f"cannot get the pretrained weights of {name!r} ({_one_line(error)}); "
                "without a network, download them elsewhere and give --checkpoint FILE"
            ) from error
        raise ValueError(f"cannot build {name!r}: {_one_line(error)}") from error


def input_settings(model: nn.Module) -> InputSettings:
    """What timm's configuration of the model says; ImageNet's usual settings for a torchvision model."""
    if not hasattr(model, "pretrained_cfg") and not hasattr(model, "default_cfg"):
        return InputSettings()
    from timm.data import resolve_model_data_config

    config = resolve_model_data_config(model)
    return InputSettings(max(config["input_size"][1:]), config["crop_pct"], tuple(config["mean"]), tuple(config["std"]))


def load_checkpoint(model: nn.Module, path: str | Path) -> None:
    """Load a stock checkpoint into a model, every key of it.

    Args:
        path: a .safetensors file, or a file of torch.save (only tensors and plain values are unpickled), which may
            hold the state in an entry `state_dict` or `model` and its keys under `module.` or `_orig_mod.`.
    Raises:
        FileNotFoundError: no such file.
        ValueError: the file cannot be read, or its keys or shapes are not the model's.
    """
    state = read_state(path)
    plans = [key for key in state if key.rpartition(".")[2] == "plan"]
    if plans:
        raise ValueError(f"{path} holds a converted model ({plans[0]}); give the stock checkpoint it was made from")
    expected = model.state_dict()
    missing, unexpected = expected.keys() - state.keys(), state.keys() - expected.keys()
    # Batch counters came with PyTorch 0.4.1; older files lack them, and an evaluation does not need them.
    missing = {key for key in missing if not key.endswith("num_batches_tracked")}
    if missing or unexpected:
        raise ValueError(
            f"{path} does not fit the model: {_some_keys(missing, 'missing')}, {_some_keys(unexpected, 'unexpected')}"
        )
    differing = [key for key in state if state[key].shape != expected[key].shape]
    if differing:
        key = differing[0]
        raise ValueError(
            f"{path} does not fit the model: {key} has shape {tuple(state[key].shape)} in the file and "
            f"{tuple(expected[key].shape)} in the model ({len(differing)} such); for another number of classes "
            "give --num-classes"
        )
    model.load_state_dict({**expected, **state})


def read_state(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a checkpoint file, without the wrappers' prefixes."""
    path = Path(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"expected a checkpoint file, but {path} {what}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            # timm's own training script stores its arguments as such a namespace; it holds plain values.
            with torch.serialization.safe_globals([argparse.Namespace]):
                state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files raise anything from EOFError to SafetensorError
        raise ValueError(f"cannot read the checkpoint {path}: {_one_line(error)}") from error
    for entry in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(entry), Mapping):
            state = state[entry]
    if not isinstance(state, Mapping) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"expected a state dict in {path}, or one in its entry 'state_dict' or 'model'")
    for prefix in WRAPPER_PREFIXES * 2:
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return dict(state)


def _some_keys(keys: set[str], what: str) -> str:
    shown = ", ".join(sorted(keys)[:3])
    return f"{len(keys)} keys {what}" + (f" ({shown}{', ...' if len(keys) > 3 else ''})" if keys else "")


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}{'...' if len(text) > 200 else ''}"
