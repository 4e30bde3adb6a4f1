"""One epoch of training, and one validation."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import nn

from mixpool.selection.images import evaluating
from mixpool.training import data
from mixpool.training.run import Run


class DivergedError(ValueError):
    """The loss is not finite any more."""


def train_one_epoch(run: Run, *, save: Callable[[], None], log: Callable[[str], None], limit: int = 0) -> None:
    """Train from the run's position to the end of its epoch.

    Args:
        save: write a checkpoint; called after every `recovery_interval` updates.
        limit: stop after so many batches, for a trial; 0 for none.
    Raises:
        DivergedError: the loss is not finite; nothing has been saved since.
    """
    options, position = run.options, run.position
    run.task.train()
    if run.mix is not None:
        run.mix.mixup_enabled = not options.mixup_off_epoch or position.epoch < options.mixup_off_epoch
    data.set_position(run.train_loader, position.epoch, position.batch)
    num_batches, steps = len(run.train_loader), options.grad_accum_steps
    last_steps = num_batches % steps or steps  # the last update of an epoch may have fewer batches
    # Summed where it is computed: to read it at every step would make the GPU wait for Python.
    loss_sum = torch.tensor(position.loss_sum, dtype=torch.float64, device=run.device)

    def settle() -> float:
        position.loss_sum = loss_sum.item()
        if not math.isfinite(position.loss_sum):
            raise DivergedError(
                f"the loss is not finite in epoch {position.epoch}, batch {position.batch} or before; the last "
                "checkpoint is from before that. Try a smaller learning rate, a longer warm-up, clip_grad, or bfloat16"
            )
        return position.loss_sum / position.num_images

    run.optimizer.zero_grad()
    started, seen = time.perf_counter(), 0
    for images, labels in run.train_loader:
        if position.batch == num_batches:  # a stream may hold more than it says
            break
        accumulated = last_steps if position.batch >= num_batches - last_steps else steps
        is_update = position.batch == num_batches - 1 or (position.batch + 1) % steps == 0
        loss_sum += _step(run, images, labels, accumulated, is_update).double() * len(images)
        position.batch += 1
        position.num_images += len(images)
        seen += len(images)
        if position.batch % options.log_interval == 0 or position.batch == num_batches:
            rate = seen * run.world_size / (time.perf_counter() - started)
            left = (num_batches - position.batch) * options.batch_size * run.world_size / rate
            log(
                f"epoch {position.epoch} batch {position.batch}/{num_batches}: loss {settle():.4f}, "
                f"lr {run.learning_rate:.3g}, {rate:,.0f} images/s, {_duration(left)} left"
            )
        if is_update:
            position.updates += 1
            run.task.update_ema(step=position.updates)
            if run.scheduler is not None:
                run.scheduler.step_update(num_updates=position.updates)
            if options.recovery_interval and position.updates % options.recovery_interval == 0:
                settle()
                save()
        if limit and position.batch >= limit:
            break
    settle()


def _step(run: Run, images: torch.Tensor, labels: torch.Tensor, accumulated: int, is_update: bool) -> torch.Tensor:
    """Forward, backward and, if it is time, the update; returns the mean loss of this process's images."""
    from timm.utils import dispatch_clip_grad

    options = run.options
    images = images.to(run.device, non_blocking=True)
    labels = labels.to(run.device, non_blocking=True)
    if run.erase is not None:
        images = run.erase(images)
    if run.mix is not None:
        images, labels = run.mix(images, labels)
    if options.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    # The gradients of all processes are averaged once per update, not at each of its steps.
    with nullcontext() if is_update else run.task.no_sync():
        with run.autocast():
            loss = run.task(images, labels)["loss"]
        parameters = run.task.get_clip_parameters(exclude_head="agc" in options.clip_mode)
        clip = {"clip_grad": options.clip_grad, "clip_mode": options.clip_mode}
        if run.scaler is not None:
            run.scaler(loss / accumulated, run.optimizer, parameters=parameters, need_update=is_update, **clip)
        else:
            (loss / accumulated).backward()
            if is_update:
                if options.clip_grad is not None:
                    dispatch_clip_grad(parameters, value=options.clip_grad, mode=options.clip_mode)
                run.optimizer.step()
    if is_update:
        run.optimizer.zero_grad()
    return loss.detach()


def validate(run: Run, *, ema: bool = False, limit: int = 0) -> dict[str, float]:
    """Loss, top-1 and top-5 in percent over the validation images of all processes.

    Args:
        ema: of the moving average of the weights.
        limit: stop after so many batches, for a trial; 0 for none.
    """
    evaluator = run.task.create_evaluator()
    model = run.task.get_eval_model(ema=ema)
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module  # whose forward is no collective: the processes may have different numbers of batches
    with evaluating(model):
        for number, (images, labels) in enumerate(run.val_loader, start=1):
            images = images.to(run.device, non_blocking=True)
            if run.options.channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            with run.autocast():
                out = model(images)
            is_read = labels >= 0
            evaluator.update(out[is_read.to(out.device)], labels[is_read].to(run.device, non_blocking=True))
            if number == limit:
                break
    return dict(evaluator.compute(distributed=run.is_distributed))


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {seconds} s"
