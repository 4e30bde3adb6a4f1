"""Files of weights: what one holds, whoever wrote it, and writing one all or nothing."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mixpool.ops.renamed import SPELLED_NOW

TORCHVISION = "torchvision/"
HUBS = ("hf_hub:", "hf-hub:", "local-dir:")
# Where a checkpoint has its state, the first of these, as timm's load_state_dict looks for it.
AVERAGES, STATES = ("state_dict_ema", "model_ema"), ("state_dict", "model")
# What a training run says of its network besides the name and `model_kwargs`: its option -> the model's argument. The
# others of its options (dropout and the like) change nothing in evaluation.
BUILT_WITH = {"num_classes": "num_classes", "in_chans": "in_chans", "gp": "global_pool", "bn_eps": "bn_eps"}
WRAPPER_PREFIXES = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile
# Where a stabilized network's file has its plan: an entry, of safetensors JSON in the metadata.
STABILIZED = "mixpool"


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
        plan: layer -> low-pass of a stabilized network (see `stabilization.files`), or None if it is none.
    """

    path: Path
    state: dict[str, Tensor]
    is_average: bool = False
    has_average: bool = False
    arch: str | None = None
    settings: Mapping[str, Any] | None = None
    plan: dict[str, str] | None = None

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
    about: Any = None  # what the metadata of a .safetensors file say, where a file of torch.save has entries
    try:
        if path.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(path, "pt") as file:
                content = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  it is no mapping
                about = json.loads((file.metadata() or {}).get(STABILIZED, "{}"))
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
    told = entries if about is None else about if isinstance(about, Mapping) else {}
    arch, settings = told.get("arch"), told.get("args")
    if isinstance(settings, argparse.Namespace):
        settings = vars(settings)
    return Checkpoint(
        path=path,
        state=dict(state),
        is_average=taken in AVERAGES,
        has_average=any(name in AVERAGES for name in present),
        arch=arch if isinstance(arch, str) else None,
        settings=settings if isinstance(settings, Mapping) else None,
        plan=_plan(told if about is not None else entries.get(STABILIZED), path),
    )


def _plan(told: Any, path: Path) -> dict[str, str] | None:
    """The low-passes that a file tells of, None if it tells of none; ValueError if they are damaged."""
    if not isinstance(told, Mapping) or "plan" not in told:
        return None
    plan = told["plan"]
    if not isinstance(plan, Mapping) or not all(isinstance(text, str) for item in plan.items() for text in item):
        raise ValueError(f"expected {path} to say which layers have which low-pass, its plan is damaged: {plan!r:.200}")
    return dict(plan)


def write_safetensors(model: nn.Module, path: Path, metadata: dict[str, str]) -> None:
    """Write a model's state, all or nothing: into a file beside `path`, which then takes its name."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    # Clones, since tensors that share memory (tied weights) are refused.
    state = {key: value.detach().cpu().contiguous().clone() for key, value in model.state_dict().items()}
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        save_file(state, unfinished, metadata=metadata)
        os.replace(unfinished, path)
    except SafetensorError as error:  # what it makes of a full disk or a read-only folder
        raise OSError(f"cannot write {path}: {error}") from error
    finally:
        unfinished.unlink(missing_ok=True)


def _bare(name: str) -> str:
    """A model's name without the library's or our prefix and without the tag of its weights."""
    if name.startswith(HUBS):
        return name
    return name.removeprefix(TORCHVISION).removeprefix("mixpool_").partition(".")[0]


def one_line(error: BaseException) -> str:
    """What kind of error it is and what it says, as part of a message."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}{'...' if len(text) > 200 else ''}"
