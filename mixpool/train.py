"""`mixpool train`: train or fine-tune a model on timm's parts; the same command again continues a run that was cut.

    options -> data -> model -> one epoch, validation, checkpoint; again -> record

It runs on a CPU, on a GPU and, under torchrun, on several of them and several nodes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from mixpool import records
from mixpool.training import checkpoint
from mixpool.training.curves import draw_curves, write_summary
from mixpool.training.loop import train_one_epoch, validate
from mixpool.training.options import OPTIONS
from mixpool.training.run import Position, Run, set_up

RECORD = "record.jsonl"
DRY_RUN_BATCHES = 2


def train(options) -> dict[str, Any]:
    """Carry out a run, from its start or from where it was cut; returns its record.

    Writes into `output/experiment`: last.pth.tar (the whole state, after every epoch), model_best.pth.tar, summary.csv
    (one row per epoch), curves.png and, at the end, record.jsonl.

    Args:
        options: what `mixpool.training.configuration.parse` returns.
    Raises:
        ValueError, FileNotFoundError: something does not fit; known before the first step.
    """
    from timm.utils.distributed import init_distributed_device_so

    _check_timm()
    started_here = not torch.distributed.is_initialized()
    try:
        found = init_distributed_device_so(options.device)
    except AssertionError as error:
        raise ValueError(f"{error}: give --device cpu") from error
    options.device = found["device"]
    try:
        return _train(options, torch.device(found["device"]), found["global_rank"], found["world_size"])
    finally:
        if found["distributed"] and started_here:
            torch.distributed.destroy_process_group()


def _train(options, device: torch.device, rank: int, world_size: int) -> dict[str, Any]:
    run = set_up(options, device, rank, world_size)
    log = _log if run.is_primary else _say_nothing
    for fact in run.facts:
        log(fact)
    if options.dry_run:
        return _dry_run(run, log)
    if run.is_primary:
        run.folder.mkdir(parents=True, exist_ok=True)
        checkpoint.remove_partial(run.folder)
        if options.restart:
            (run.folder / checkpoint.LAST).unlink(missing_ok=True)
    _barrier(run)
    _resume(run, log)
    position = run.position
    stop = min(run.num_epochs, position.epoch + options.stop_after if options.stop_after else run.num_epochs)
    while position.epoch < stop:
        train_one_epoch(run, save=lambda: _save(run), log=log)
        _finish_epoch(run, log)
    if position.epoch < run.num_epochs:
        log(f"stopped after epoch {position.epoch - 1} of {run.num_epochs}; the same command goes on from here")
        return {}
    return _finish(run, log)


def _finish_epoch(run: Run, log: Callable[[str], None]) -> None:
    """Validation, learning rate and checkpoints at the end of an epoch, in an order that a kill cannot spoil."""
    options, position = run.options, run.position
    if run.is_distributed and options.dist_bn:
        from timm.utils import distribute_bn

        distribute_bn(run.model, run.world_size, options.dist_bn == "reduce")
        if options.model_ema:
            distribute_bn(run.task.get_eval_model(ema=True), run.world_size, options.dist_bn == "reduce")
    is_last = position.epoch == run.num_epochs - 1
    row = {
        "epoch": position.epoch,
        "lr": run.optimizer.param_groups[0]["lr"],
        "train_loss": _mean_loss(run),
    }
    metric = None
    if (position.epoch + 1) % options.val_interval == 0 or is_last:
        found = validate(run)
        row |= {f"val_{name}": value for name, value in found.items()}
        text = _shown(found)
        if options.model_ema:
            found = validate(run, ema=True)
            row |= {f"ema_{name}": value for name, value in found.items()}
            text += f"; moving average: {_shown(found)}"
        log(f"epoch {position.epoch} validation: {text}")
        metric = found[options.eval_metric]
    position.history.append(row)
    if run.scheduler is not None:
        run.scheduler.step(position.epoch + 1, metric)
    best = position.best_metric
    is_better = metric is not None and (
        best is None or (metric < best if options.eval_metric == "loss" else metric > best)
    )
    if is_better:
        position.best_metric, position.best_epoch = metric, position.epoch
    position.epoch, position.batch = position.epoch + 1, 0
    position.loss_sum, position.num_images = 0.0, 0
    # The best one first: killed in between, the epoch is trained again and gives the same file.
    _save(run, also_as_best=is_better)
    if run.is_primary:
        write_summary(run.folder, position.history)
        draw_curves(run.folder, position.history, f"{options.model}, {run.folder.name}")


def _finish(run: Run, log: Callable[[str], None]) -> dict[str, Any]:
    position, last = run.position, run.position.history[-1]
    record = records.stamp(
        "training",
        model=run.options.model,
        settings=_settings(run.options),
        num_processes=run.world_size,
        num_train=run.train_loader.dataset.__len__(),
        num_val=len(run.val_loader.dataset),
        epochs=run.num_epochs,
        final={name: value for name, value in last.items() if name.startswith(("val_", "ema_", "train_"))},
        best={"metric": run.options.eval_metric, "value": position.best_metric, "epoch": position.best_epoch},
        history=position.history,
    )
    if run.is_primary:
        records.write(run.folder / RECORD, [record])
    log(f"done: best {run.options.eval_metric} {position.best_metric:.2f} at epoch {position.best_epoch}; {run.folder}")
    return record


def _dry_run(run: Run, log: Callable[[str], None]) -> dict[str, Any]:
    """Everything a run does, on two batches, without writing."""
    train_one_epoch(run, save=lambda: None, log=log, limit=DRY_RUN_BATCHES)
    found = validate(run, limit=DRY_RUN_BATCHES)
    log(f"dry run: {run.position.batch} training and up to {DRY_RUN_BATCHES} validation batches: {_shown(found)}")
    log(f"it would train {run.num_epochs} epochs and write to {run.folder}")
    return {}


# --- checkpoints ------------------------------------------------------------------------------------------------------


def _save(run: Run, also_as_best: bool = False) -> None:
    """Write the state of all processes; only the first one writes, all have to call."""
    generators = checkpoint.generator_states(run.device)
    everyone = [generators]
    if run.is_distributed:
        everyone = [None] * run.world_size
        torch.distributed.all_gather_object(everyone, generators)
    if run.is_primary:
        state = {
            "epoch": run.position.epoch - 1 if run.position.batch == 0 else run.position.epoch,
            "arch": run.options.model,
            "version": 2,  # of timm's format
            "args": _settings(run.options),
            "optimizer": run.optimizer.state_dict(),
            "metric": run.position.best_metric,
            **run.task.get_checkpoint_state(),
            **(run.task.get_checkpoint_state(ema=True) if run.options.model_ema else {}),
            **({run.scaler.state_dict_key: run.scaler.state_dict()} if run.scaler is not None else {}),
            "run": {
                "position": asdict(run.position),
                "scheduler": _plain(run.scheduler.state_dict()) if run.scheduler is not None else {},
                "generators": everyone,
                "settings": _binding(run.options),
            },
        }
        if also_as_best:
            checkpoint.save(run.folder / checkpoint.BEST, state)
        checkpoint.save(run.folder / checkpoint.LAST, state)
    _barrier(run)


def _resume(run: Run, log: Callable[[str], None]) -> None:
    """Go back to the state of the last checkpoint, if there is one.

    Raises:
        ValueError: it belongs to another run, or to another number of processes.
    """
    path = Path(run.options.resume) if run.options.resume else run.folder / checkpoint.LAST
    _check_all_see(run, path)
    if not path.exists():
        if run.options.resume:
            raise FileNotFoundError(f"expected a checkpoint to resume from, but {path} does not exist")
        return
    state = checkpoint.load(path)
    before, now = state["run"]["settings"], _binding(run.options)
    changed = [f"{name} {before.get(name)!r} -> {now[name]!r}" for name in now if before.get(name) != now[name]]
    if changed:
        raise ValueError(
            f"{path} was trained with other options ({'; '.join(changed)}): give them again, another --experiment, "
            "or --restart to forget it"
        )
    generators = state["run"]["generators"]
    if len(generators) != run.world_size:
        raise ValueError(f"{path} was written by {len(generators)} process(es), this run has {run.world_size}")
    run.task.load_checkpoint_state(state["state_dict"])
    if run.options.model_ema:
        run.task.load_checkpoint_state(state["state_dict_ema"], ema=True)
    run.optimizer.load_state_dict(state["optimizer"])
    if run.scaler is not None:
        run.scaler.load_state_dict(state[run.scaler.state_dict_key])
    if run.scheduler is not None:
        run.scheduler.load_state_dict(state["run"]["scheduler"])
    run.position = Position(**state["run"]["position"])
    checkpoint.set_generator_states(generators[run.rank], run.device)
    log(f"continuing {path} at epoch {run.position.epoch}, batch {run.position.batch}")


def _check_all_see(run: Run, path: Path) -> None:
    """All processes have to start from the same file: only the first one writes it, on the disk of its own node.

    Raises:
        ValueError: some processes have the file and some do not, or it differs.
    """
    if not run.is_distributed:
        return
    mine = (path.stat().st_size, path.stat().st_mtime_ns) if path.exists() else None
    everyone = [None] * run.world_size
    torch.distributed.all_gather_object(everyone, mine)
    if any(other != everyone[0] for other in everyone):
        missing = [rank for rank, other in enumerate(everyone) if other is None]
        what = f"processes {missing} do not find it" if missing else "it is not the same file for all processes"
        raise ValueError(f"cannot continue {path}: {what}; expected --output on a disk that all nodes share")


def _settings(options) -> dict[str, Any]:
    return {name: getattr(options, name) for name in OPTIONS}


def _binding(options) -> dict[str, Any]:
    """The options on which the weights depend, so that a run cannot go on with others."""
    return {name: getattr(options, name) for name, option in OPTIONS.items() if not option.is_free}


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    """What of a schedule's state is numbers and lists; the rest follows from the options."""
    return {name: value for name, value in state.items() if _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


# --- small things -----------------------------------------------------------------------------------------------------


def _mean_loss(run: Run) -> float:
    """Of this epoch, over all processes."""
    totals = torch.tensor([run.position.loss_sum, run.position.num_images], dtype=torch.float64, device=run.device)
    if run.is_distributed:
        torch.distributed.all_reduce(totals)
    loss_sum, num_images = totals.tolist()
    return loss_sum / num_images


def _shown(found: dict[str, float]) -> str:
    return f"loss {found['loss']:.4f}, top-1 {found['top1']:.2f} %, top-5 {found['top5']:.2f} %"


def _barrier(run: Run) -> None:
    if run.is_distributed:
        torch.distributed.barrier()


def _log(text: str) -> None:
    print(text, flush=True)


def _say_nothing(text: str) -> None:
    pass


def _check_timm() -> None:
    try:
        from timm.loss import create_classification_loss  # noqa: F401
        from timm.task import ClassificationTask  # noqa: F401
    except ImportError as error:
        import timm

        raise ValueError(f"mixpool train needs timm 1.0.31 or later, found {timm.__version__}: {error}") from error
