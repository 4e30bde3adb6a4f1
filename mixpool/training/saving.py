"""How a run is saved and continued: which of its state goes into a checkpoint, and how all processes get it back."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mixpool.conversion.checkpoint import STABILIZED
from mixpool.stabilization.files import description_of
from mixpool.training import state_file
from mixpool.training.loop import DivergedError
from mixpool.training.options import OPTIONS
from mixpool.training.run import Position, Run

RECORD, LOCK = "record.jsonl", ".lock"
FORMAT = 1  # of the entry `run`
WRITTEN = (state_file.LAST, state_file.BEST, RECORD, "summary.csv", "curves.png")


@contextlib.contextmanager
def own_folder(run: Run) -> Iterator[None]:
    """The folder of a run, for this run alone; cleared by `restart`. ValueError if another run is writing to it."""
    if not run.is_primary:
        _barrier(run)
        yield
        return
    from filelock import FileLock, Timeout

    run.folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(run.folder / LOCK, timeout=0)
        lock.acquire()
    except Timeout:
        raise ValueError(f"another run is writing to {run.folder}: wait for it, or give another --experiment") from None
    try:
        for path in run.folder.glob(".*.partial"):  # of a process that was killed while it wrote
            path.unlink(missing_ok=True)
        for name in WRITTEN if run.options.restart else ():
            (run.folder / name).unlink(missing_ok=True)
        _barrier(run)
        yield
    finally:
        lock.release()


def save(run: Run, also_as_best: bool = False) -> None:
    """Write the state of all processes, which all have to call this; DivergedError if a weight is not finite."""
    _check_finite(run)
    mine = {
        "generators": state_file.generator_states(run.device),
        "loss_sum": run.position.loss_sum,
        "num_images": run.position.num_images,
        # Until they are averaged after an epoch, the running statistics of the processes differ.
        "buffers": [_buffers(model) for model in _models(run)] if run.is_distributed else [],
    }
    everyone = _from_all(run, mine)
    if run.is_primary:
        state = {
            "epoch": run.position.epoch - 1 if run.position.batch == 0 else run.position.epoch,
            "arch": run.options.model,
            "version": 2,  # of timm's format
            "args": settings(run.options),
            "optimizer": run.optimizer.state_dict(),
            "metric": run.position.best_metric,
            **run.task.get_checkpoint_state(),
            **(run.task.get_checkpoint_state(ema=True) if run.options.model_ema else {}),
            **({run.scaler.state_dict_key: run.scaler.state_dict()} if run.scaler is not None else {}),
            **description_of(run.model),
            "run": {
                "format": FORMAT,
                "position": asdict(run.position),
                "scheduler": _plain(run.scheduler.state_dict()) if run.scheduler is not None else {},
                "processes": everyone,
                "settings": binding(run),
            },
        }
        # The best one first: killed in between, the epoch is trained again and gives the same file.
        if also_as_best:
            state_file.save(run.folder / state_file.BEST, state)
        state_file.save(run.folder / state_file.LAST, state)
    _barrier(run)


def resume(run: Run, log: Callable[[str], None]) -> None:
    """Go back to the state of the folder's last checkpoint, or of the file `resume` where the folder has none.

    ValueError if it is of another run or number of processes, or not the same for all of them.
    """
    path = run.folder / state_file.LAST
    if run.options.resume and not path.exists():
        path = Path(run.options.resume)
        if not path.exists():
            raise FileNotFoundError(f"expected a checkpoint to resume from, but {path} does not exist")
    _check_all_see(run, path)
    if not path.exists():
        return
    state = state_file.load(path)
    if state["run"].get("format") != FORMAT:
        raise ValueError(f"{path} was written by another version of mixpool, which has to continue it")
    before, now = state["run"]["settings"], binding(run)
    changed = [f"{name} {before.get(name)!r} -> {now[name]!r}" for name in now if before.get(name) != now[name]]
    if changed:
        raise ValueError(
            f"{path} was trained with other options or data ({'; '.join(changed)}): give the same again, another "
            "--experiment, or --restart to forget it"
        )
    if _plan(state) != _plan(description_of(run.model)):
        raise ValueError(
            f"{path} has low-passes in other layers than the initial checkpoint has now: give the one that the run "
            "started from, another --experiment, or --restart to forget it"
        )
    processes = state["run"]["processes"]
    if len(processes) != run.world_size:
        raise ValueError(f"{path} was written by {len(processes)} process(es), this run has {run.world_size}")
    mine = processes[run.rank]
    run.task.load_checkpoint_state(state["state_dict"])
    if run.options.model_ema:
        run.task.load_checkpoint_state(state["state_dict_ema"], ema=True)
    for model, buffers in zip(_models(run), mine["buffers"]):
        _set_buffers(model, buffers)
    run.optimizer.load_state_dict(state["optimizer"])
    if run.scaler is not None:
        run.scaler.load_state_dict(state[run.scaler.state_dict_key])
    if run.scheduler is not None:
        run.scheduler.load_state_dict(state["run"]["scheduler"])
    run.position = Position(**state["run"]["position"])
    run.position.loss_sum, run.position.num_images = mine["loss_sum"], mine["num_images"]
    state_file.set_generator_states(mine["generators"], run.device)
    log(f"continuing {path} at epoch {run.position.epoch}, batch {run.position.batch}")


def settings(options) -> dict[str, Any]:
    """All options, as plain values."""
    return {name: getattr(options, name) for name in OPTIONS}


def binding(run: Run) -> dict[str, Any]:
    """What the weights depend on, so that a run cannot go on with anything else: options and data."""
    options = {name: getattr(run.options, name) for name, option in OPTIONS.items() if not option.is_free}
    return options | run.dataset


def _plan(told: dict[str, Any]) -> dict[str, str] | None:
    """The low-passes of a stabilized network, None of another one; `told` is a checkpoint or a description."""
    return told.get(STABILIZED, {}).get("plan")


def _check_finite(run: Run) -> None:
    """Look at the weights, not only at the loss: one bad gradient spoils them while the loss before it was fine."""
    statistics = [b for name, b in run.model.named_buffers() if name.endswith(("running_mean", "running_var"))]
    tensors = [*run.model.parameters(), *statistics]
    is_finite = torch.stack([torch.isfinite(tensor.detach()).all() for tensor in tensors]).all().int()
    if run.is_distributed:
        torch.distributed.all_reduce(is_finite, op=torch.distributed.ReduceOp.MIN)
    if not is_finite.item():
        raise DivergedError(
            f"weights are not finite any more after epoch {run.position.epoch}, batch {run.position.batch}; the last "
            "checkpoint is from before that. Try a smaller learning rate, a longer warm-up, clip_grad, or bfloat16"
        )


def _check_all_see(run: Run, path: Path) -> None:
    """Raise ValueError unless all processes see the same file: only the first one writes it, on its own node's disk."""
    about = path.stat() if path.exists() else None
    everyone = _from_all(run, None if about is None else (about.st_size, about.st_mtime_ns))
    if any(other != everyone[0] for other in everyone):
        missing = [rank for rank, other in enumerate(everyone) if other is None]
        what = f"processes {missing} do not find it" if missing else "it is not the same file for all processes"
        raise ValueError(f"cannot continue {path}: {what}; expected --output on a disk that all nodes share")


def _models(run: Run) -> list[nn.Module]:
    return [run.model, *([run.task.get_trainable_module(ema=True)] if run.options.model_ema else [])]


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.detach().cpu() for name, buffer in model.named_buffers()}


def _set_buffers(model: nn.Module, values: dict[str, Tensor]) -> None:
    own = dict(model.named_buffers())
    for name, value in values.items():
        own[name].copy_(value)


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    """What of a schedule's state is numbers and lists; the rest follows from the options."""
    return {name: value for name, value in state.items() if _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def _from_all(run: Run, mine: Any) -> list[Any]:
    everyone = [mine]
    if run.is_distributed:
        everyone = [None] * run.world_size
        torch.distributed.all_gather_object(everyone, mine)
    return everyone


def _barrier(run: Run) -> None:
    if run.is_distributed:
        torch.distributed.barrier()
