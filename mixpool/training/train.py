"""`mixpool train`: train or fine-tune a model on timm's parts; the same command again continues a run that was cut.

    options -> data -> model -> one epoch, validation, checkpoint; again -> record

It runs on a CPU, on a GPU and, under torchrun, on several of them and several nodes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from mixpool import records
from mixpool.evaluation.runner import usable_device
from mixpool.training.curves import draw_curves, write_summary
from mixpool.training.data import unreadable
from mixpool.training.loop import train_one_epoch, validate
from mixpool.training.run import Run, set_up
from mixpool.training.saving import RECORD, own_folder, resume, save, settings

DRY_RUN_BATCHES = 2


def train(options) -> dict[str, Any]:
    """Carry out a run, from its start or from where it was cut; returns its record, empty if it is not at its end.

    Writes into `output/experiment`: last.pth.tar (the whole state, after every epoch), model_best.pth.tar, summary.csv
    (one row per epoch), curves.png and, at the end, record.jsonl.

    Args:
        options: what `mixpool.training.configuration.complete` returns.
    Raises:
        ValueError, FileNotFoundError: something does not fit; known before the first step.
        DivergedError: a ValueError, too: the loss or a weight is not finite; the last checkpoint is from before that.
    """
    from timm.utils.distributed import init_distributed_device_so

    _check_timm()
    records.code()  # that of the start, for the record at the end
    started_here = not torch.distributed.is_initialized()
    if not options.device.startswith("cuda"):  # to try GPU 0 would take memory there, for each of a node's processes
        usable_device(options.device)
    try:
        found = init_distributed_device_so(options.device)
    except AssertionError as error:  # no GPU
        raise ValueError(f"cannot use the device {options.device!r} ({error}): give --device cpu") from error
    options.device = found["device"]
    try:
        run = set_up(options, torch.device(options.device), found["global_rank"], found["world_size"])
        log = partial(print, flush=True) if run.is_primary else lambda text: None
        for fact in run.facts:
            log(fact)
        if options.dry_run:
            return _dry_run(run, log)
        with own_folder(run):
            return _train(run, log)
    finally:
        if found["distributed"] and started_here:
            torch.distributed.destroy_process_group()


def _train(run: Run, log: Callable[[str], None]) -> dict[str, Any]:
    resume(run, log)
    position, options = run.position, run.options
    if position.epoch >= run.num_epochs and (run.folder / RECORD).exists():
        log(f"{run.folder} is finished: nothing to train")
        return next(records.read(run.folder / RECORD))
    stop = min(run.num_epochs, position.epoch + options.stop_after if options.stop_after else run.num_epochs)
    while position.epoch < stop:
        train_one_epoch(run, save=lambda: save(run), log=log)
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
    row = {"epoch": position.epoch, "lr": run.learning_rate, "train_loss": _mean_loss(run)}
    metric = None
    if (position.epoch + 1) % options.val_interval == 0 or position.epoch == run.num_epochs - 1:
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
    is_better = metric is not None and _is_better(metric, position.best_metric, options.eval_metric)
    if is_better:
        position.best_metric, position.best_epoch = metric, position.epoch
    position.epoch, position.batch = position.epoch + 1, 0
    position.loss_sum, position.num_images = 0.0, 0
    save(run, also_as_best=is_better)
    if run.is_primary:
        write_summary(run.folder, position.history)
        draw_curves(run.folder, position.history, f"{options.model}, {run.folder.name}")


def _is_better(metric: float, best: float | None, name: str) -> bool:
    if not math.isfinite(metric):
        return False
    return best is None or (metric < best if name == "loss" else metric > best)


def _finish(run: Run, log: Callable[[str], None]) -> dict[str, Any]:
    position, last, name = run.position, run.position.history[-1], run.options.eval_metric
    skipped = {"train": unreadable(run.train_loader), "val": unreadable(run.val_loader)}
    record = records.stamp(
        "training",
        model=run.options.model,
        settings=settings(run.options),
        num_processes=run.world_size,
        **run.dataset,
        skipped_images=skipped,
        epochs=run.num_epochs,
        final={key: value for key, value in last.items() if key.startswith(("val_", "ema_", "train_"))},
        best={"metric": name, "value": position.best_metric, "epoch": position.best_epoch},
        history=position.history,
    )
    if run.is_primary:
        records.write(run.folder / RECORD, [record])
    for split, names in skipped.items():
        if names:
            log(f"warning: {len(names)} {split} image(s) could not be read and were skipped, first {names[0]}")
    best = "never finite" if position.best_metric is None else f"{position.best_metric:.2f} at {position.best_epoch}"
    log(f"done: best {name} {best}; {run.folder}")
    return record


def _dry_run(run: Run, log: Callable[[str], None]) -> dict[str, Any]:
    """Everything a run does, on two batches, without writing."""
    train_one_epoch(run, save=lambda: None, log=log, limit=DRY_RUN_BATCHES)
    found = validate(run, limit=DRY_RUN_BATCHES)
    log(f"dry run: {run.position.batch} training and up to {DRY_RUN_BATCHES} validation batches: {_shown(found)}")
    log(f"it would train {run.num_epochs} epochs and write to {run.folder}")
    return {}


def _mean_loss(run: Run) -> float:
    """Of this epoch, over all processes."""
    totals = torch.tensor([run.position.loss_sum, run.position.num_images], dtype=torch.float64, device=run.device)
    if run.is_distributed:
        torch.distributed.all_reduce(totals)
    loss_sum, num_images = totals.tolist()
    return loss_sum / num_images


def _shown(found: dict[str, float]) -> str:
    return f"loss {found['loss']:.4f}, top-1 {found['top1']:.2f} %, top-5 {found['top5']:.2f} %"


def _check_timm() -> None:
    try:
        from timm.loss import create_classification_loss  # noqa: F401
        from timm.task import ClassificationTask  # noqa: F401
    except ImportError as error:
        import timm

        raise ValueError(
            f"mixpool train needs timm 1.0.31 or later (the extra mixpool[train]), found {timm.__version__}: {error}"
        ) from error
