"""The whole state of a run in one file, written all or nothing, and read back without unpickling anything but data.

The entries that timm's CheckpointSaver writes have its names (`state_dict`, `state_dict_ema`, `optimizer`, `epoch`,
`arch`, `args`, `version`), so timm's scripts and `load_checkpoint` read these files too; the entry `run` is ours.
"""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mixpool.evaluation.photos import short

LAST = "last.pth.tar"
BEST = "model_best.pth.tar"


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a file that is either the old one or, whole and on the disk, the new one; also after a power cut."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        _sync_folder(path.parent)
    except RuntimeError as error:  # what torch makes of a full disk
        raise OSError(f"cannot write {path}: {short(error)}") from error
    finally:
        partial.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Put the new name on the disk too, where the system lets one open folders."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load(path: Path) -> dict[str, Any]:
    """The state in a checkpoint of ours; ValueError if the file is damaged or something else."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files raise anything from EOFError to UnpicklingError
        raise ValueError(f"cannot read the checkpoint {path}: {short(error)}") from error
    if not isinstance(state, dict) or "run" not in state:
        raise ValueError(f"expected a checkpoint of mixpool train in {path}: it has no entry 'run'")
    return state


def generator_states(device: torch.device) -> dict[str, Any]:
    """The states of this process's random generators, as plain values and tensors."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    states = {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
    }
    return states | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_generator_states(states: dict[str, Any], device: torch.device) -> None:
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
