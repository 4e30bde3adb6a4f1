"""Disagreement and steadiness against loops, and against what `mixpool evaluate` counts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support import assert_close
from torch import Tensor, nn

from mixpool.evaluation.metrics import flip_curve, kl_divergence
from mixpool.stabilization.agreement import (
    SHIFTS,
    disagreement,
    interval_of,
    is_classifier,
    outputs_on,
    steadiness,
)
from mixpool.stabilization.pictures import MARGIN, Squares

SIZE = 20
OFFSETS = [[(0, k) for k in range(5)], [(k, 0) for k in range(5)], [(k, k) for k in range(5)]]


@pytest.fixture
def squares() -> Squares:
    return Squares(torch.randn(6, 3, SIZE + MARGIN, SIZE + MARGIN), SIZE)


class Toy(nn.Module):
    """A classifier that every pixel of shift throws about."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3, 4), nn.Linear(8, 3)
        nn.init.normal_(self.head.weight), nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.conv(x).relu().amax(dim=(2, 3))
        return self.head(pooled - pooled.mean(dim=1, keepdim=True))


class Features(Toy):
    """No classifier: a dictionary of maps."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"map": self.conv(x), "pooled": self.conv(x).mean(dim=(2, 3))}


def frames(squares: Squares) -> list[list[Tensor]]:
    """By direction and pixel, the crops."""
    return [[squares.images[..., y : y + SIZE, x : x + SIZE] for y, x in track] for track in OFFSETS]


@torch.no_grad()
def test_flips_and_kl_are_those_of_the_evaluation(squares):
    model = Toy()
    found = steadiness(model, squares)
    logits = [torch.stack([model(crop) for crop in track], dim=1) for track in frames(squares)]
    for d, track in enumerate(logits):
        curve = flip_curve(track.argmax(dim=2))
        for s, shift in enumerate(SHIFTS):
            assert_close("flips", found.flips[:, d, s], curve[:, shift - 1])
            pairs = [kl_divergence(track[:, t], track[:, t + shift]) for t in range(5 - shift)]
            # because batches of another size may round otherwise
            assert_close("KL", found.movement[:, d, s], torch.stack(pairs).mean(dim=0), (1e-5, 1e-5))
    assert found.flips.shape == found.movement.shape == (6, 3, 3) and found.flips.max() > 0
    assert torch.equal(found.classes, logits[0][:, 0].argmax(dim=1)) and found.top1 is None


def test_top1_needs_labels(squares):
    model = Toy()
    classes = steadiness(model, squares).classes
    labels = classes.clone()
    labels[0] = (labels[0] + 1) % 3
    found = steadiness(model, squares, labels)
    assert found.top1.tolist() == [False] + [True] * 5
    assert found.summary()["top1"]["mean"] == pytest.approx(100 * 5 / 6)


@torch.no_grad()
def test_other_outputs_move_by_their_squared_change(squares):
    model = Features()
    found = steadiness(model, squares)
    assert found.flips is None and found.classes is None
    expected = torch.zeros(6, 3, 3, dtype=torch.float64)
    for d, track in enumerate(frames(squares)):
        outputs = [list(model(crop).values()) for crop in track]
        for s, shift in enumerate(SHIFTS):
            for t in range(5 - shift):
                change = [(b - a).double().square().flatten(1).sum(1) for a, b in zip(outputs[t], outputs[t + shift])]
                spread = sum((a - a.mean(0)).double().square().flatten(1).sum(1).mean() for a in outputs[t])
                expected[:, d, s] += sum(change) / spread / (5 - shift)
    assert_close("movement", found.movement, expected, (1e-5, 1e-5))
    assert set(found.summary()) == {"movement_1px", "movement_2px", "movement_4px"}


def test_a_network_that_sees_no_shift_does_not_move(squares):
    constant = squares._replace(images=squares.images[..., :1, :1].expand_as(squares.images))
    found = steadiness(Toy(), constant)
    assert found.flips.max() == 0 and found.movement.max() < 1e-12


def test_the_summary_is_the_mean_with_its_interval(squares):
    found = steadiness(Toy(), squares)
    summary = found.summary()
    assert set(summary) == {f"{name}_{k}px" for name in ("flips", "movement") for k in SHIFTS}
    assert summary["flips_2px"]["mean"] == pytest.approx(100 * found.flips[:, :, 1].mean().item())
    for interval in summary.values():
        assert interval["low"] <= interval["mean"] <= interval["high"]
    assert interval_of(torch.tensor([2.0, 2.0])) == {"mean": 2.0, "low": 2.0, "high": 2.0}


def test_disagreement_of_classifiers_is_the_kl_divergence_from_stock():
    stock, changed = ([[torch.randn(n, 5)] for n in (3, 2)] for _ in range(2))
    p = torch.cat([b[0] for b in stock]).double().softmax(dim=1)
    q = torch.cat([b[0] for b in changed]).double().softmax(dim=1)
    assert disagreement(changed, stock) == pytest.approx((p * (p / q).log()).sum(dim=1).mean().item())
    assert disagreement(stock, stock) == 0


def test_disagreement_of_other_networks_is_the_error_over_the_variance():
    stock, changed = ([[torch.randn(4, 5, 6, 6), torch.randn(4, 3)]] for _ in range(2))
    error = sum((a - b).double().square().sum() for a, b in zip(changed[0], stock[0], strict=True))
    spread = sum((b - b.mean(dim=0)).double().square().sum() for b in stock[0])
    assert disagreement(changed, stock) == pytest.approx((error / spread).item())
    assert disagreement(stock, stock) == 0


@pytest.mark.parametrize(
    ("outputs", "classifies"),
    [([[torch.zeros(2, 3)]], True), ([[torch.zeros(2, 1)]], False), ([[torch.zeros(2, 3, 4, 4)]], False)]
    + [([[torch.zeros(2, 3), torch.zeros(2, 3)]], False)],
)
def test_what_counts_as_a_classifier(outputs, classifies):
    assert is_classifier(outputs) == classifies


def test_outputs_are_flat_and_on_the_cpu():
    model = Features().double()
    batches = [torch.randn(n, 3, SIZE, SIZE, dtype=torch.float64) for n in (2, 1)]
    found = outputs_on(model, batches)
    assert [[tuple(t.shape) for t in tensors] for tensors in found] == [
        [(2, 8, 5, 5), (2, 8)],
        [(1, 8, 5, 5), (1, 8)],
    ]
    assert all(t.dtype == torch.float32 and not t.requires_grad for tensors in found for t in tensors)
    assert_close("map", found[1][0], F.conv2d(batches[1], model.conv.weight, model.conv.bias, 4).float())
