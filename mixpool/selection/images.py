"""Run a model on images: batches from what the user has, what reaches a module, what comes out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

MAX_IMAGES = 512


def batches_of(images: Tensor | Iterable[Tensor], channels: int | None = None) -> Iterable[Tensor]:
    """Yield (N, C, H, W) float batches of at most 32 from a tensor, a list of images or batches, or a data loader."""
    if isinstance(images, Tensor):
        images = images.split(32) if images.ndim == 4 else [images]
    if not isinstance(images, Iterable):
        raise ValueError(f"expected images as a float tensor (N, C, H, W) or an iterable of such, got {images!r}")
    for item in images:
        batch = item[0] if isinstance(item, (tuple, list)) and len(item) > 0 else item
        if item is not batch and any(isinstance(other, Tensor) and other.ndim >= 3 for other in item[1:]):
            raise ValueError("expected each item of images to be a tensor or (tensor, labels), got a list of images")
        if isinstance(batch, Tensor) and batch.ndim == 3:
            batch = batch[None]
        good = isinstance(batch, Tensor) and batch.ndim == 4 and batch.is_floating_point()
        if not good or (channels is not None and batch.shape[1] != channels):
            got = f"{batch.dtype} {tuple(batch.shape)}" if isinstance(batch, Tensor) else type(item).__name__
            wanted = "C" if channels is None else channels
            raise ValueError(
                f"expected normalised images as float tensors (N, {wanted}, H, W), or an iterable of such, got {got}"
            )
        if not torch.isfinite(batch).all():
            raise ValueError("expected finite images, got NaN or infinity among them")
        yield from batch.split(32)


def first_batches(images: Tensor | Iterable[Tensor]) -> list[Tensor]:
    """At most 512 images, as batches."""
    batches, count = [], 0
    for batch in batches_of(images):
        batches.append(batch[: MAX_IMAGES - count])
        count += len(batches[-1])
        if count >= MAX_IMAGES:
            break
    if count == 0:
        raise ValueError("expected at least one image, got none")
    return batches


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, with every module's own training flag put back after."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, flag in flags:
            module.training = flag


class _Reached(Exception):
    pass


def module_inputs(model: nn.Module, conv: nn.Module, batches: list[Tensor]) -> list[Tensor]:
    """What reaches the convolution when the model sees the images."""
    inputs: list[Tensor] = []

    def catch(module: nn.Module, args: tuple) -> None:
        inputs.append(args[0].detach())
        raise _Reached

    handle = conv.register_forward_pre_hook(catch)
    weight = conv.weight
    try:
        with evaluating(model):
            for batch in batches:
                try:
                    _run(model, batch.to(weight.device, weight.dtype))
                except _Reached:
                    pass
    finally:
        handle.remove()
    if len(inputs) != len(batches):
        raise ValueError("expected the model's forward to reach the stem's convolution once per batch, it did not")
    return inputs


def outputs_of(model: nn.Module, batches: list[Tensor]) -> Tensor | None:
    """(N, classes) logits on the CPU; None where the model returns something else."""
    parameter = next(model.parameters())
    outputs = []
    with evaluating(model):
        for batch in batches:
            out = _run(model, batch.to(parameter.device, parameter.dtype))
            if not isinstance(out, Tensor) or out.ndim != 2 or out.shape[1] < 2:
                return None
            outputs.append(out.float().cpu())
    return torch.cat(outputs)


def _run(model: nn.Module, batch: Tensor) -> object:
    """The model's output; what goes wrong inside says which images it was."""
    try:
        return model(batch)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise ValueError(f"the model cannot run on the images, a batch of {tuple(batch.shape)}: {error}") from error
