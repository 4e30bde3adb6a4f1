"""Models by name, from timm or torchvision, and checkpoints from files. Only the commands use this."""

from __future__ import annotations

import argparse
import difflib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from mixpool.conversion.convert import convert
from mixpool.conversion.stock import converted_stems
from mixpool.ops.renamed import SPELLED_NOW

TORCHVISION = "torchvision/"
HUBS = ("hf_hub:", "hf-hub:", "local-dir:")
# Where a checkpoint has its state, the first of these, as timm's load_state_dict looks for it.
AVERAGES, STATES = ("state_dict_ema", "model_ema"), ("state_dict", "model")
# What a training run says of its network besides the name and `model_kwargs`: its option -> the model's argument. The
# others of its options (dropout and the like) change nothing in evaluation.
BUILT_WITH = {"num_classes": "num_classes", "in_chans": "in_chans", "gp": "global_pool", "bn_eps": "bn_eps"}
WRAPPER_PREFIXES = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile


@dataclass(frozen=True)
class Checkpoint:
    """What a file of weights holds.

    Attributes:
        path: of the file.
        state: the state dict, without the wrappers' prefixes.
        is_average: whether that is the moving average of the weights.
        has_average: whether the file has a moving average, taken or not.
        arch: name of the network that was trained, or None where the file does not say.
        settings: the options of the training (entry `args` of timm's script and of `mixpool train`), or None.
    """

    path: Path
    state: dict[str, Tensor]
    is_average: bool = False
    has_average: bool = False
    arch: str | None = None
    settings: Mapping[str, Any] | None = None

    @property
    def stems(self) -> list[str]:
        """Names of the converted stems; empty for a stock model's state."""
        return [key.removesuffix(".plan") for key in self.state if key.endswith(".plan")]

    def is_of(self, name: str) -> bool:
        """Whether the network that was trained is the one of this name, or the mixpool or stock model to it."""
        return self.arch is not None and _bare(self.arch) == _bare(name)

    def built_as(self, name: str) -> tuple[str, dict[str, Any]]:
        """The network to load this into where one of `name` is asked for: its name and the constructor's arguments.

        They are those of the training, if it was of that network. A mixpool model stays one: the stock model to it
        does not take its arguments.
        """
        if not self.is_of(name):
            return name, {}
        settings = self.settings or {}
        found = {argument: settings.get(option) for option, argument in BUILT_WITH.items()}
        arguments = {argument: value for argument, value in found.items() if value is not None}
        # What version 0.1 called the poolings is left out: the state's plan says them.
        own = {key: value for key, value in (settings.get("model_kwargs") or {}).items() if key not in SPELLED_NOW}
        return self.arch if self.arch.startswith("mixpool_") else name, arguments | own


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
    """A model by name, in evaluation mode, with the weights of a file: of a stock model or of a converted one.

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


def read_checkpoint(path: str | Path, *, use_ema: bool = True) -> Checkpoint:
    """What a file of weights holds.

    Args:
        path: a .safetensors file, or a file of torch.save (only tensors and plain values are unpickled), which may
            hold the state in an entry, of which the moving average comes first (`state_dict_ema`, `model_ema`,
            `state_dict`, `model`), and its keys under `module.` or `_orig_mod.`.
        use_ema: take the moving average of the weights, if the file has one; as timm does.
    Raises:
        FileNotFoundError: no such file.
        ValueError: the file cannot be read, or holds no state dict.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"expected a checkpoint file, but {path} {what}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content = load_file(path)
        else:
            # timm's own training script stores its arguments as such a namespace; it holds plain values.
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files raise anything from EOFError to SafetensorError
        raise ValueError(f"cannot read the checkpoint {path}: {one_line(error)}") from error
    entries = content if isinstance(content, Mapping) else {}
    present = [name for name in (*AVERAGES, *STATES) if isinstance(entries.get(name), Mapping)]
    taken = next((name for name in present if use_ema or name not in AVERAGES), None)
    state = content if taken is None else entries[taken]
    if not isinstance(state, Mapping) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        names = ", ".join((*AVERAGES, *STATES) if use_ema else STATES)
        raise ValueError(f"expected a state dict in {path}, or one in its entry {names}")
    for prefix in WRAPPER_PREFIXES * 2:
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    arch, settings = entries.get("arch"), entries.get("args")
    if isinstance(settings, argparse.Namespace):
        settings = vars(settings)
    return Checkpoint(
        path=path,
        state=dict(state),
        is_average=taken in AVERAGES,
        has_average=any(name in AVERAGES for name in present),
        arch=arch if isinstance(arch, str) else None,
        settings=settings if isinstance(settings, Mapping) else None,
    )


def _bare(name: str) -> str:
    """A model's name without the library's or our prefix and without the tag of its weights."""
    if name.startswith(HUBS):
        return name
    return name.removeprefix(TORCHVISION).removeprefix("mixpool_").partition(".")[0]


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


def one_line(error: BaseException) -> str:
    """What kind of error it is and what it says, as part of a message."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}{'...' if len(text) > 200 else ''}"
