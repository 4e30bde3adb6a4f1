"""How far a changed network is from the stock one, and how much either moves when the picture does."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mixpool.evaluation.metrics import DRAWS, bootstrap_interval, kl_divergence
from mixpool.evaluation.protocols import frames_of_directions
from mixpool.evaluation.shifts import DIRECTIONS
from mixpool.stabilization.flow import tensors_of
from mixpool.stabilization.pictures import BATCH, Squares, crop

SHIFTS = (1, 2, 4)  # pixels
LAST = max(SHIFTS)


@torch.no_grad()
def outputs_on(model: nn.Module, batches: Iterable[Tensor]) -> list[list[Tensor]]:
    """The model's output tensors, batch by batch, float32 on the CPU."""
    return [[tensor.float().cpu() for tensor in tensors_of(model(batch))] for batch in batches]


def is_classifier(outputs: list[list[Tensor]]) -> bool:
    """Whether the output is one table (N, classes)."""
    return all(len(tensors) == 1 and tensors[0].ndim == 2 and tensors[0].shape[1] > 1 for tensors in outputs)


def disagreement(changed: list[list[Tensor]], stock: list[list[Tensor]]) -> float:
    """Mean KL divergence from the stock classifier, nats; of other networks the squared error over the variance."""
    if is_classifier(stock):
        return torch.cat([kl_divergence(b[0], a[0]) for a, b in zip(changed, stock, strict=True)]).mean().item()
    error = energy = 0.0
    for own, wanted in zip(changed, stock, strict=True):
        for a, b in zip(own, wanted, strict=True):
            error += (a - b).double().square().sum().item()
            energy += (b - b.mean(dim=0)).double().square().sum().item()
    return error / max(energy, 1e-30)


@dataclass(frozen=True)
class Steadiness:
    """A network on shifted crops of images, one value per image; (N, directions, shifts) unless said otherwise.

    Attributes:
        classes: (N,) class of the first crop, None if the network is no classifier.
        flips: share of the pairs so many pixels apart whose classes differ, None if it is no classifier.
        movement: KL divergence of the pairs, nats; of other networks the squared change over the outputs' variance.
        top1: (N,) whether the first crop's class is the label, None without labels.
    """

    classes: Tensor | None
    flips: Tensor | None
    movement: Tensor
    top1: Tensor | None

    def summary(self) -> dict[str, Any]:
        """Means with 95 % intervals over the images, percent and nats."""
        columns = {f"movement_{k}px": self.movement[:, :, i].mean(dim=1) for i, k in enumerate(SHIFTS)}
        if self.flips is not None:
            columns |= {f"flips_{k}px": 100 * self.flips[:, :, i].mean(dim=1) for i, k in enumerate(SHIFTS)}
        if self.top1 is not None:
            columns["top1"] = 100 * self.top1.double()
        return {name: interval_of(values) for name, values in columns.items()}


def interval_of(values: Tensor) -> dict[str, float]:
    found = bootstrap_interval(values.double(), draws=DRAWS)
    return {"mean": found.mean.item(), "low": found.low.item(), "high": found.high.item()}


@torch.no_grad()
def steadiness(model: nn.Module, squares: Squares, labels: Tensor | None = None) -> Steadiness:
    """Crops 0 to 4 pixels to the side, down and along the diagonal; all pairs at a distance count."""
    offsets = [(0, 0), *((k * y, k * x) for y, x in DIRECTIONS.values() for k in range(1, LAST + 1))]
    parameter = next(model.parameters(), torch.empty(0))
    per_frame: list[list[Tensor]] = []
    for y, x in offsets:
        batches = [
            crop(images, y, x, squares.size).to(parameter.device, parameter.dtype)
            for images in squares.images.split(BATCH)
        ]
        outputs = outputs_on(model, batches)
        per_frame.append([torch.cat(parts) for parts in zip(*outputs, strict=True)])
    tracks = frames_of_directions(LAST)
    classifies = len(per_frame[0]) == 1 and per_frame[0][0].ndim == 2 and per_frame[0][0].shape[1] > 1
    movement = torch.stack([torch.stack([_movement(per_frame, t, k) for k in SHIFTS], dim=1) for t in tracks], dim=1)
    if not classifies:
        return Steadiness(None, None, movement, None)
    classes = torch.stack([tensors[0].argmax(dim=1) for tensors in per_frame], dim=1)
    flips = torch.stack(
        [
            torch.stack([(classes[:, t][:, k:] != classes[:, t][:, :-k]).double().mean(dim=1) for k in SHIFTS], dim=1)
            for t in tracks
        ],
        dim=1,
    )
    return Steadiness(classes[:, 0], flips, movement, None if labels is None else classes[:, 0] == labels)


def _movement(frames: list[list[Tensor]], track: list[int], step: int) -> Tensor:
    """(N,) over the pairs of a track."""
    pairs = list(zip(track[:-step], track[step:], strict=True))
    if len(frames[0]) == 1 and frames[0][0].ndim == 2 and frames[0][0].shape[1] > 1:
        return torch.stack([kl_divergence(frames[a][0], frames[b][0]) for a, b in pairs]).mean(dim=0)
    found = []
    for a, b in pairs:
        change = energy = 0
        for here, there in zip(frames[a], frames[b], strict=True):
            if here.shape == there.shape:
                change = change + (there - here).double().square().flatten(1).sum(dim=1)
                energy = energy + (here - here.mean(dim=0)).double().square().flatten(1).sum(dim=1).mean()
        found.append(change / max(float(energy), 1e-30))
    return torch.stack(found).mean(dim=0)
