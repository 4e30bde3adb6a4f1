"""The network of a run: built as timm's train.py builds it, converted if asked, with its stock twin as teacher."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from typing import Any

import timm
import torch
from torch import Tensor, nn

from mixpool.conversion.checkpoint import Checkpoint, one_line, read_checkpoint
from mixpool.conversion.convert import convert, revert
from mixpool.conversion.stock import converted_stems
from mixpool.evaluation.photos import IMAGENET_MEAN, IMAGENET_STD
from mixpool.stabilization.files import is_stabilized, load_stabilized
from mixpool.timm_models.loading import is_timm_model, load_model


def build_model(options) -> nn.Module:
    """The model on the CPU with its starting weights, before the key `convert`; ValueError if these cannot be had."""
    for name in options.device_modules or ():
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ValueError(f"cannot import {name!r} of device_modules: {error}") from error
    model = _timm_model(options) if is_timm_model(options.model) else _torchvision_model(options)
    if not hasattr(model, "pretrained_cfg"):  # timm's tasks ask the models they compare how their inputs are scaled
        model.pretrained_cfg = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "input_size": (3, 224, 224)}
    return model.train()


def _timm_model(options) -> nn.Module:
    arguments = {
        "in_chans": options.in_chans,
        "num_classes": options.num_classes,
        "drop_rate": options.drop,
        "drop_path_rate": options.drop_path,
        "drop_block_rate": options.drop_block,
        "global_pool": options.gp,
        "bn_momentum": options.bn_momentum,
        "bn_eps": options.bn_eps,
    }
    arguments = {name: value for name, value in arguments.items() if value is not None}
    stabilized = _stabilized(options.initial_checkpoint)
    if options.pretrained_path is not None:
        # The file stands for the published weights. timm leaves out a classifier of another number of classes than it
        # is told here, so it has to be told what the file has.
        num_classes = _classes_in(options.pretrained_path, options.model)
        arguments["pretrained_cfg_overlay"] = {"file": options.pretrained_path, "num_classes": num_classes}
    try:
        model = timm.create_model(
            options.model,
            pretrained=options.pretrained or options.pretrained_path is not None,
            checkpoint_path=None if stabilized else options.initial_checkpoint or None,
            **arguments,
            **options.model_kwargs,
        )
    except Exception as error:  # hubs, files and constructors each raise their own
        hint = "; without a network, give the weights by --pretrained-path FILE" if options.pretrained else ""
        raise ValueError(f"cannot build {options.model!r}: {one_line(error)}{hint}") from error
    return model if stabilized is None else load_stabilized(model, stabilized)


def _stabilized(path: str) -> Checkpoint | None:
    """What a file holds, if it is of a stabilized network: timm would load the weights without the low-passes."""
    try:
        found = read_checkpoint(path) if path else None
    except (ValueError, OSError):  # timm reads more kinds of files, and says what is wrong with the others
        return None
    return found if found is not None and found.plan is not None else None


def _classes_in(path: str, name: str) -> int:
    """The number of classes that a file of weights is for; ValueError if it has no classifier of that model."""
    classifier = timm.models.get_pretrained_cfg(name).classifier
    names = classifier if isinstance(classifier, (tuple, list)) else (classifier,)
    checkpoint = read_checkpoint(path)
    if checkpoint.plan is not None:
        raise ValueError(f"{path} is of a stabilized network: give it as initial_checkpoint, not as pretrained_path")
    state = checkpoint.state
    found = [state[f"{layer}.weight"].shape[0] for layer in names if f"{layer}.weight" in state]
    if not found:
        raise ValueError(f"expected weights of {name!r} in {path}, found none of its classifier ({classifier})")
    return found[0]


def _published_classes(options) -> int | None:
    """The number of classes of the weights that a run starts from; None if only they themselves know."""
    if options.pretrained_path is not None:
        return _classes_in(options.pretrained_path, options.model)
    if options.initial_checkpoint or not timm.is_model(options.model):
        return None  # these have to fit the model as they are
    cfg = timm.models.get_pretrained_cfg(options.model)
    return None if cfg is None else cfg.num_classes


def _torchvision_model(options) -> nn.Module:
    unused = [
        name
        for name in ("in_chans", "drop", "drop_path", "drop_block", "gp", "bn_momentum", "bn_eps", "pretrained_path")
        if getattr(options, name) is not None
    ]
    if unused or options.model_kwargs:
        given = ", ".join([*unused, *(["model_kwargs"] if options.model_kwargs else [])])
        raise ValueError(f"{options.model!r} is a model of torchvision, which does not take {given}")
    file = options.initial_checkpoint or None
    return load_model(options.model, file, pretrained=options.pretrained, num_classes=options.num_classes)


def convert_as_asked(model: nn.Module, options, training_images: Callable[[int], Tensor]):
    """Carry out the key `convert`; `training_images(n)` gives n of them, normalised. Returns the report or None."""
    if options.convert is None:
        return None
    if is_stabilized(model):
        raise ValueError("the initial checkpoint is of a stabilized network: leave out `convert`")
    if converted_stems(model):
        raise ValueError(
            f"{options.model!r} is a converted model already: leave out `convert`, or name the stock model"
        )
    images = training_images(options.convert_images) if options.convert_images else None
    try:
        return convert(model, images=images, **options.convert)
    except TypeError as error:
        raise ValueError(f"`convert` takes the arguments of mixpool.convert: {error}") from error


def stock_teacher(model: nn.Module, options) -> nn.Module | None:
    """For `distill: stock`, the network as it was published: a copy of the starting model, its conversion undone.

    Raises:
        ValueError: the model or its classifier starts from random weights, from which there is nothing to learn, or
            options change it behind the stem.
    """
    if options.distill is None:
        return None
    if not (options.pretrained or options.pretrained_path or options.initial_checkpoint):
        raise ValueError(
            "expected trained weights for `distill: stock`: give pretrained, pretrained_path or initial_checkpoint"
        )
    published = _published_classes(options)
    if options.num_classes is not None and published is not None and options.num_classes != published:
        raise ValueError(
            f"`distill: stock` has a teacher of {published} classes, which cannot teach {options.num_classes}: train "
            "on the labels, or give an initial_checkpoint of the stock model that knows these classes"
        )
    changed = [name for name in ("aa_layer",) if options.model_kwargs.get(name) is not None]
    changed += [name for name in ("bn_eps",) if getattr(options, name) is not None]
    if changed:
        raise ValueError(
            f"`distill: stock` needs the stock network as it was published: leave out {', '.join(changed)}"
        )
    if is_stabilized(model):
        raise ValueError(
            "`distill: stock` needs the stock network, and the initial checkpoint is of a stabilized one, whose stock "
            "weights are gone: train on the labels"
        )
    teacher = copy.deepcopy(model)
    if converted_stems(teacher):
        revert(teacher)
    return teacher.eval().requires_grad_(False)


def prepare(model: nn.Module, options, device: torch.device, distributed: bool) -> nn.Module:
    """The model on its device, in its memory format, with the batch norms of all processes tied if asked."""
    if options.grad_checkpointing:
        if not hasattr(model, "set_grad_checkpointing"):
            raise ValueError(f"{options.model!r} cannot recompute its activations: leave out grad_checkpointing")
        model.set_grad_checkpointing(True)
    model.to(device)
    if options.channels_last:
        model.to(memory_format=torch.channels_last)
    if distributed and options.sync_bn:
        if device.type == "cpu":
            raise ValueError("PyTorch ties batch norms on GPUs only: leave out sync_bn on a CPU")
        from timm.layers import convert_sync_batchnorm

        model = convert_sync_batchnorm(model)
    return model


def build_task(model: nn.Module, teacher: nn.Module | None, options, device: torch.device, is_mixed: bool):
    """timm's task, which is the loss around the model: of the labels, or of the labels and a teacher."""
    from timm.task import ClassificationTask, DistillationTeacher, LogitDistillationTask

    loss: dict[str, Any] = {"smoothing": 0.0 if is_mixed else options.smoothing, "soft_targets": is_mixed}
    if options.bce_loss:
        loss |= {"loss_type": "bce", "bce_target_thresh": options.bce_target_thresh}
    if teacher is None:
        return ClassificationTask(model, criterion_kwargs=loss, device=device, verbose=False)
    if options.channels_last:
        teacher.to(memory_format=torch.channels_last)
    return LogitDistillationTask(
        model,
        DistillationTeacher(teacher.to(device), device=device),  # else timm asks the model for what only its own know
        criterion_kwargs=loss,
        distill_loss_weight=options.distill_loss_weight,
        task_loss_weight=options.task_loss_weight,
        temperature=options.kd_temperature,
        device=device,
        verbose=False,
    )
