"""The model at work in an evaluation: on its device, in evaluation mode, on normalised frames; afterwards as before."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from mixpool.evaluation.model_input import ModelInput
from mixpool.evaluation.photos import short
from mixpool.selection.images import evaluating


@contextlib.contextmanager
def at_work(model: nn.Module, device: str | torch.device | None) -> Iterator[torch.device]:
    """The model in evaluation mode on the device, default where it is, and afterwards as it was.

    Not in inference_mode: what a model caches in it could never be used in training again.
    """
    home = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    where = home if device is None else usable_device(device)
    try:
        if where != home:
            model.to(where)
        with evaluating(model):
            yield where
    finally:
        if where != home:
            model.to(home)


def usable_device(device: str | torch.device) -> torch.device:
    """The device of a name; ValueError if there is no such device here."""
    try:
        found = torch.device(device)
        torch.zeros(1, device=found).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # each backend has its own way to be absent
        raise ValueError(f"cannot use the device {str(device)!r}: {short(error)}") from error
    return found


class Runner:
    """Normalises frames and runs a function on them.

    Attributes:
        channels_last: the memory format of the input.
    """

    def __init__(
        self,
        model: nn.Module,
        wanted: ModelInput,
        where: torch.device,
        amp: torch.dtype | None,
        channels_last: bool | None,
    ) -> None:
        self.model, self.wanted, self.where, self.amp = model, wanted, where, amp
        self.channels_last = (where.type == "cpu" or amp is not None) if channels_last is None else channels_last
        self.dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        self.mean, self.std = (
            torch.tensor(values, device=where)[:, None, None] for values in (wanted.mean, wanted.std)
        )

    def probe(self) -> int:
        """How many classes the model has, from a forward pass of one gray image."""
        gray = torch.full((1, 3, self.wanted.size, self.wanted.size), 128, dtype=torch.uint8, device=self.where)
        return logits_of(lambda images: self.run(self.model, images), gray).shape[1]

    def run(self, forward: Callable[[Tensor], Tensor], frame: Tensor) -> Tensor:
        # ToTensor and Normalize, operation by operation.
        x = frame.float().div_(255).sub_(self.mean).div_(self.std)
        x = x.to(self.dtype, memory_format=torch.channels_last if self.channels_last else torch.contiguous_format)
        with torch.autocast(self.where.type, dtype=self.amp, enabled=self.amp is not None):
            return forward(x)

    def outputs(
        self,
        forward: Callable[[Tensor], Tensor],
        frames: Iterable[Tensor],
        is_usable: Callable[[Tensor], Tensor],
        bad: Tensor,
    ) -> Iterator[Tensor]:
        """The function's output for each frame, one after another; `bad`, (N,) bool, is set where one is not usable."""
        for frame in frames:
            out = self.run(forward, frame)
            bad |= ~is_usable(out)
            yield out

    @property
    def advice(self) -> str:
        """What may help where outputs are not finite."""
        return "" if self.amp is None else f" under autocast to {self.amp}; try another dtype or none"


def logits_of(classifier: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """What a classifier says of a few images, (N, classes); ValueError if it cannot take them or is none."""
    try:
        out = classifier(images)
    except RuntimeError as error:
        raise ValueError(f"the model does not run on images {tuple(images.shape)}: {short(error)}") from error
    if not isinstance(out, Tensor) or out.ndim != 2 or len(out) != len(images):
        shape = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(f"expected a classifier, whose output is (N, classes), got {shape} for {tuple(images.shape)}")
    return out


def are_logits(out: Tensor) -> Tensor:
    """(N,) bool: no NaN and no infinity, but for classes that a model excludes by -inf, though not all of them."""
    return ((out < torch.inf) & ~out.isnan()).all(dim=1) & (out > -torch.inf).any(dim=1)


def are_finite(out: Tensor) -> Tensor:
    """(N,) bool: all numbers of feature maps are finite."""
    return torch.isfinite(out).flatten(1).all(dim=1)
