"""How deep a network is treated: what a low-pass steadies against what it changes, on held-out images.

A level is all layers that decimate maps of one size: the branches of a block belong together. Levels are treated and
repaired one after another, from the image on. Kept is the depth at which

    movement under shifts by one pixel + price * disagreement with the stock network

is least. Levels are not judged alone: a stem's low-pass often pays only when the next pools have theirs too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mixpool.stabilization.agreement import disagreement, outputs_on
from mixpool.stabilization.flow import Flow
from mixpool.stabilization.pictures import BATCH, Split, Squares, crop
from mixpool.stabilization.repair import Repaired, Track, repair
from mixpool.stabilization.treat import treat, untreat

READ_DENSE = ("decimating", "maxima of a dense map, then low-pass")
STEPS = ((0, 1), (1, 0), (1, 1))  # pixels


@dataclass(frozen=True)
class Level:
    """The layers that decimate maps of one size, and the network when it is treated up to here.

    Attributes:
        plan: name -> treatment.
        is_kept: whether they stay treated.
        movement, disagreement: of the network so treated, on held-out images.
    """

    plan: dict[str, str]
    is_kept: bool
    movement: float
    disagreement: float

    @property
    def why(self) -> str:
        """Why they are left."""
        return (
            f"on held-out images the network would move by {self.movement:.2g}, {self.disagreement:.2g} from stock: "
            "not worth it"
        )


def levels_of(plan: dict[str, str], flow: Flow) -> list[dict[str, str]]:
    """The plan, level by level, in the order of the data; what decimates for a dense layer goes with it."""
    levels: dict[Any, dict[str, str]] = {}
    for name, treatment in plan.items():
        call = flow[name]
        source = next(iter(call.sources)) if treatment in READ_DENSE else None
        key = next((k for k, level in levels.items() if source in level), call.in_shape[-2:])
        levels.setdefault(key, {})[name] = treatment
    return list(levels.values())


@torch.no_grad()
def choose(
    changed: nn.Module,
    stock: nn.Module,
    levels: Sequence[dict[str, str]],
    images: Split,
    *,
    which: str | None,
    price: float | None,
    track: Track = lambda steps, total: steps,
    **options: Any,
) -> tuple[list[Level], list[Repaired]]:
    """Treat and repair a network level by level, and keep the best depth.

    Args:
        changed: the network to treat, in evaluation mode; it may have changes already.
        stock: the network as it was.
        levels: of `levels_of`.
        images: to fit on and to choose by.
        which: as for `repair`; None treats without repair.
        price: movement that a disagreement of 1 may cost; None keeps all levels.
        track: wraps the loop over levels, (iterable, total).
        options: of `repair`.
    Returns:
        The levels, and what the repair of the kept ones did.
    """
    judge = _Judge(stock, images.choose)
    movement, distance = judge(changed)
    best, kept, state = movement + (price or 0) * distance, 0, _copied(changed)
    found, repaired = [], []
    for number, plan in enumerate(track(levels, len(levels)), start=1):
        treat(changed, plan)
        done = []
        if which is not None:
            done = repair(changed, stock, images.fit, which=which, places=plan, held_out=images.choose, **options)
        repaired.append(done)
        movement, distance = judge(changed)
        found.append((plan, movement, distance))
        if price is None or movement + price * distance < best:
            best, kept, state = movement + (price or 0) * distance, number, _copied(changed)
    for plan, *_ in found[kept:]:
        untreat(changed, plan)
    changed.load_state_dict(state)
    seen = [Level(plan, number < kept, *rest) for number, (plan, *rest) in enumerate(found)]
    return seen, [own for done in repaired[:kept] for own in done]


def _copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


class _Judge:
    """(movement, disagreement) of a network, on the same crops each time."""

    def __init__(self, stock: nn.Module, squares: Squares) -> None:
        parameter = next(stock.parameters())
        self.place = {"device": parameter.device, "dtype": parameter.dtype}
        self.squares = squares
        self.start = (squares.images.shape[-1] - squares.size) // 2
        self.wanted = outputs_on(stock, self._at((0, 0)))

    def __call__(self, model: nn.Module) -> tuple[float, float]:
        here = outputs_on(model, self._at((0, 0)))
        moved = [disagreement(outputs_on(model, self._at(step)), here) for step in STEPS]
        return sum(moved) / len(moved), disagreement(here, self.wanted)

    def _at(self, step: tuple[int, int]) -> Iterable:
        y, x = (self.start + pixels for pixels in step)
        for images in self.squares.images.split(BATCH):
            yield crop(images, y, x, self.squares.size).to(**self.place)
