"""A network on shifted crops: top-1, flips, KL or relative movement, per image, and ratios to stock with intervals.

Crops 0 to 8 pixels to the side, down and along the diagonal, 25 in all; of each direction all pairs at a distance
count. Top-1 is the mean over the crops. Ratios of means are bootstrapped over the images, both networks on the same.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from mixpool.evaluation.metrics import DRAWS, kl_divergence, percentile_ends
from mixpool.evaluation.protocols import MAX_SHIFT, frames_of_directions
from mixpool.evaluation.shifts import DIRECTIONS

SHIFTS = (1, 2, 4)
BATCH = 4


class Measured(NamedTuple):
    """Name -> (N,) one value per image."""

    values: dict[str, Tensor]

    def means(self) -> dict[str, float]:
        return {name: round(column.mean().item(), 5) for name, column in self.values.items()}

    def ratios(self, stock: Measured) -> dict[str, list[float]]:
        """Mean over stock's mean, with the ends of its 95 % interval; top-1 as a difference."""
        generator = torch.Generator().manual_seed(0)
        count = len(next(iter(self.values.values())))
        chosen = torch.randint(count, (DRAWS, count), generator=generator)
        found = {}
        for name, column in self.values.items():
            a, b = column.double(), stock.values[name].double()
            if name == "top1":
                draws, value = (a - b)[chosen].mean(dim=1), (a - b).mean()
            else:
                draws, value = a[chosen].mean(dim=1) / b[chosen].mean(dim=1), a.mean() / b.mean()
            low, high = percentile_ends(draws)
            found[name] = [round(float(number), 4) for number in (value, low, high)]
        return found


@torch.no_grad()
def frames(model: nn.Module, squares: Tensor, size: int, batch: int = BATCH) -> list[Tensor]:
    """Outputs (N, classes) of each of the 25 crops; squares (N, 3, size + 8, size + 8)."""
    offsets = [(0, 0), *((k * y, k * x) for y, x in DIRECTIONS.values() for k in range(1, MAX_SHIFT + 1))]
    found = []
    for y, x in offsets:
        crops = (part[..., y : y + size, x : x + size] for part in squares.split(batch))
        found.append(torch.cat([model(part.contiguous(memory_format=torch.channels_last)) for part in crops]))
    return found


def of_classifier(logits: list[Tensor], labels: Tensor) -> Measured:
    """Percent and nats."""
    classes = torch.stack([own.argmax(dim=1) for own in logits], dim=1)
    values = {"top1": 100 * (classes == labels[:, None]).double().mean(dim=1)}
    tracks = frames_of_directions(MAX_SHIFT)
    for k in SHIFTS:
        flips = [100 * (classes[:, t][:, k:] != classes[:, t][:, :-k]).double().mean(dim=1) for t in tracks]
        values |= {f"{way[0]}{k}": own for way, own in zip(DIRECTIONS, flips, strict=True)}
        values[f"flips{k}"] = torch.stack(flips).mean(dim=0)
        pairs = [(a, b) for track in tracks for a, b in zip(track[:-k], track[k:], strict=True)]
        values[f"kl{k}"] = torch.stack([kl_divergence(logits[a], logits[b]) for a, b in pairs]).mean(dim=0)
    return Measured(values)


def of_features(outputs: list[Tensor]) -> Measured:
    """Squared change of the outputs over their variance, at each distance."""
    energy = (outputs[0] - outputs[0].mean(dim=0)).double().square().flatten(1).sum(dim=1).mean()
    values = {}
    for k in SHIFTS:
        pairs = [
            (a, b) for track in frames_of_directions(MAX_SHIFT) for a, b in zip(track[:-k], track[k:], strict=True)
        ]
        moved = [(outputs[b] - outputs[a]).double().square().flatten(1).sum(dim=1) / energy for a, b in pairs]
        values[f"moved{k}"] = torch.stack(moved).mean(dim=0).sqrt()
    return Measured(values)
