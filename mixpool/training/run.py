"""One training run, put together from its options: model, data, optimizer, schedule, and where it stands."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mixpool.conversion.stock import converted_stems
from mixpool.stabilization.files import is_stabilized
from mixpool.stabilization.treat import treated_layers
from mixpool.training import checks, data
from mixpool.training.model import build_model, build_task, convert_as_asked, prepare, stock_teacher
from mixpool.training.splits import check_classes, fingerprint, open_splits

PROBE = 2  # images with which the checks run the model
SLOW = 2  # times as slow as float32, from which on half precision is worth a warning


@dataclass
class Position:
    """Where a run stands: what a checkpoint has to hold beside the weights and the optimizer.

    Attributes:
        epoch, batch: the next batch to train on.
        updates: updates of the weights so far.
        loss_sum, num_images: of this epoch so far, over the batches of this process.
        best_metric, best_epoch: of the validations so far.
        history: one row per finished epoch.
    """

    epoch: int = 0
    batch: int = 0
    updates: int = 0
    loss_sum: float = 0.0
    num_images: int = 0
    best_metric: float | None = None
    best_epoch: int | None = None
    history: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Run:
    """A run that is ready to train. `model` is the plain network inside `task`, which has what is wrapped around it."""

    options: Any
    device: torch.device
    rank: int
    world_size: int
    folder: Path
    model: nn.Module
    task: Any
    optimizer: torch.optim.Optimizer
    scheduler: Any
    num_epochs: int
    scaler: Any
    train_loader: Any
    val_loader: Any
    mix: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None
    erase: Callable[[Tensor], Tensor] | None
    position: Position
    dataset: dict[str, Any]
    facts: list[str]

    @property
    def is_primary(self) -> bool:
        return self.rank == 0

    @property
    def is_distributed(self) -> bool:
        return self.world_size > 1

    @property
    def learning_rate(self) -> float:
        """That of the last layers, where the rates of the layers differ."""
        return max(group["lr"] for group in self.optimizer.param_groups)

    def autocast(self):
        if not self.options.amp:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=getattr(torch, self.options.amp_dtype))


def set_up(options, device: torch.device, rank: int, world_size: int) -> Run:
    """Build everything and check that it fits together, before the first step; the error says what does not."""
    from timm.utils import random_seed

    random_seed(options.seed, rank=0)  # the same weights on all processes
    train_set, val_set = open_splits(options)
    model = build_model(options)
    data_config = _data_config(options, model)
    train_loader = data.train_loader(train_set, options, data_config, rank, world_size)
    val_loader = data.val_loader(val_set, options, data_config, rank, world_size)
    images = data.first_images(train_loader, data_config, PROBE)
    check_classes(train_set, val_set, checks.count_outputs(model, images), bool(options.class_map))
    report = convert_as_asked(model, options, lambda count: data.evaluation_images(train_set, data_config, count))
    teacher = stock_teacher(model, options)
    memory = checks.estimate_memory(model, images, options, device)
    facts = [_conversion(model, report), _sizes(train_set, val_set, options, world_size), str(memory)]
    if not memory.is_enough:
        facts.append("warning: this may not fit into the memory; a smaller batch_size with grad_accum_steps would")
    if options.amp and device.type == "cpu":
        facts += _slow_half_precision(getattr(torch, options.amp_dtype))

    model = prepare(model, options, device, world_size > 1)
    mixes = bool(options.mixup or options.cutmix or options.cutmix_minmax)
    task = build_task(model, teacher, options, device, mixes)
    optimizer = _optimizer(model, options, world_size)
    updates_per_epoch = math.ceil(len(train_loader) / options.grad_accum_steps)
    scheduler, num_epochs = _schedule(optimizer, options, updates_per_epoch)
    if options.model_ema:
        task.setup_ema(decay=options.model_ema_decay, use_warmup=options.model_ema_warmup)
    if options.torchcompile:
        known = torch.compiler.list_backends(exclude_tags=())
        if options.torchcompile not in known:
            raise ValueError(f"expected torchcompile to be one of {', '.join(known)}, got {options.torchcompile!r}")
        task.compile(backend=options.torchcompile, mode=options.torchcompile_mode)
    if world_size > 1:
        device_ids = [device] if device.type == "cuda" else None
        task.prepare_distributed(device_ids=device_ids, broadcast_buffers=not options.no_ddp_bb)
    random_seed(options.seed, rank)
    return Run(
        options=options,
        device=device,
        rank=rank,
        world_size=world_size,
        folder=Path(options.output) / experiment_name(options),
        model=model,
        task=task,
        optimizer=optimizer,
        scheduler=scheduler,
        num_epochs=num_epochs,
        scaler=_scaler(options, device),
        train_loader=train_loader,
        val_loader=val_loader,
        mix=_mixup(options, model, images, device) if mixes else None,
        erase=_eraser(options, device) if options.reprob else None,
        position=Position(),
        dataset=fingerprint(train_set, val_set),
        facts=facts,
    )


def _slow_half_precision(dtype: torch.dtype) -> list[str]:
    slowdown = checks.half_precision_slowdown(dtype)
    if slowdown < SLOW:
        return []
    name = str(dtype).removeprefix("torch.")
    return [f"warning: this CPU computes {name} {slowdown:.0f} times as slowly as float32; --no-amp would be faster"]


def experiment_name(options) -> str:
    """The folder of a run inside `output`: always the same one for the same command, so that it can go on."""
    if options.experiment:
        return options.experiment
    return Path(options.config).stem if options.config else options.model.replace("/", "_").replace(":", "_")


def learning_rate(options, world_size: int) -> float:
    """`lr`, or `lr_base` scaled by the images per update as timm's script scales it."""
    if options.lr is not None:
        return options.lr
    ratio = options.batch_size * world_size * options.grad_accum_steps / options.lr_base_size
    adaptive = any(name in options.opt.lower() for name in ("ada", "lamb"))
    scale = options.lr_base_scale or ("sqrt" if adaptive else "linear")
    return options.lr_base * (ratio**0.5 if scale == "sqrt" else ratio)


def _data_config(options, model: nn.Module) -> dict[str, Any]:
    """How the model wants its images, in timm's terms; with another number of channels also their mean and std."""
    from timm.data import resolve_data_config

    channels = options.in_chans or (options.input_size or [3])[0]
    for name in ("mean", "std"):
        values = getattr(options, name)
        if values is not None and len(values) not in (1, channels):
            raise ValueError(f"expected 1 or {channels} values of {name}, got {len(values)}")
    names = ("input_size", "img_size", "mean", "std", "crop_pct", "interpolation")
    given = {name: value for name in names if (value := getattr(options, name)) not in (None, "")}
    try:
        config = resolve_data_config(given, model=model)
    except (AssertionError, KeyError) as error:
        raise ValueError(f"the options of the images do not fit the model: {type(error).__name__} {error}") from error
    if options.in_chans is not None:
        config["input_size"] = (options.in_chans, *config["input_size"][1:])
    channels = config["input_size"][0]
    for name in ("mean", "std"):
        if len(config[name]) != channels:
            config[name] = (sum(config[name]) / len(config[name]),) * channels
    return config


def _conversion(model: nn.Module, report) -> str:
    if report is not None:
        return str(report)
    facts = [
        f"stem {name}: {stem.num_complex} of {len(stem.poolings)} channels pool by a modulus"
        for name, stem in converted_stems(model).items()
    ]
    if is_stabilized(model):
        facts.append(f"stabilized: {len(treated_layers(model))} layers with a low-pass")
    return "\n".join(facts or ["stem: stock"])


def _sizes(train_set, val_set, options, world_size: int) -> str:
    update = options.batch_size * world_size * options.grad_accum_steps
    return (
        f"{len(train_set):,} training and {len(val_set):,} validation images; {update:,} images per update "
        f"({world_size} process(es) x {options.batch_size} x {options.grad_accum_steps} step(s)), "
        f"learning rate {learning_rate(options, world_size):.4g}"
    )


def _optimizer(model: nn.Module, options, world_size: int) -> torch.optim.Optimizer:
    from timm.optim import create_optimizer_v2

    given = {"eps": options.opt_eps, "betas": options.opt_betas, "layer_decay": options.layer_decay}
    try:
        return create_optimizer_v2(
            model,
            opt=options.opt,
            lr=learning_rate(options, world_size),
            weight_decay=options.weight_decay,
            momentum=options.momentum,
            **{name: value for name, value in given.items() if value is not None},
            **options.opt_kwargs,
        )
    except (ValueError, TypeError, AssertionError, KeyError, IndexError) as error:
        raise ValueError(f"cannot build the optimizer {options.opt!r}: {error}") from error


def _schedule(optimizer: torch.optim.Optimizer, options, updates_per_epoch: int) -> tuple[Any, int]:
    from timm.scheduler import create_scheduler_v2, scheduler_kwargs

    try:
        return create_scheduler_v2(optimizer, **scheduler_kwargs(options), updates_per_epoch=updates_per_epoch)
    except (ValueError, AssertionError, AttributeError, UnboundLocalError) as error:
        raise ValueError(f"cannot build the schedule {options.sched!r}: {error}") from error


def _scaler(options, device: torch.device):
    from timm.utils import NativeScaler

    return NativeScaler(device=device.type) if options.amp and options.amp_dtype == "float16" else None


def _mixup(options, model: nn.Module, images: Tensor, device: torch.device):
    from timm.data import Mixup

    if options.batch_size % 2:
        raise ValueError(f"expected an even batch_size for mixup and cutmix, got {options.batch_size}")
    return Mixup(
        mixup_alpha=options.mixup,
        cutmix_alpha=options.cutmix,
        cutmix_minmax=options.cutmix_minmax,
        prob=options.mixup_prob,
        switch_prob=options.mixup_switch_prob,
        mode=options.mixup_mode,
        label_smoothing=options.smoothing,
        num_classes=checks.count_outputs(model, images.to(device)),
    )


def _eraser(options, device: torch.device):
    from timm.data.random_erasing import RandomErasing

    return RandomErasing(probability=options.reprob, mode=options.remode, max_count=options.recount, device=str(device))
