"""Least squares against torch's own solution of the written-out problem."""

from __future__ import annotations

import pytest
import torch
from support import assert_close
from torch import nn

from mixpool.stabilization import ridge as ridge_module
from mixpool.stabilization.lowpass import DenseConv2d, LowPassConv2d
from mixpool.stabilization.ridge import MAX_UNKNOWNS, Ridge, num_positions, rows_of, targets_of

LAYERS = {
    "plain": lambda: nn.Conv2d(4, 6, 3, padding=1),
    "strided": lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), bias=False),
    "grouped": lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1),
    "depthwise": lambda: nn.Conv2d(4, 8, 3, groups=4, dilation=2, padding=2),
    "circular": lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"),
    "same": lambda: nn.Conv2d(4, 6, 3, padding="same", dilation=2),
    "1x1": lambda: nn.Conv2d(4, 6, 1),
}


@pytest.mark.parametrize("name", LAYERS)
def test_rows_times_weights_are_the_output(name):
    layer, x = LAYERS[name](), torch.randn(3, 4, 9, 8)
    out = layer(x)
    positions = torch.randperm(out.shape[-2] * out.shape[-1])[:20]
    rows, targets = rows_of(layer, x, positions), targets_of(layer, out, positions)
    weight = layer.weight.reshape(layer.groups, layer.out_channels // layer.groups, -1)
    bias = 0 if layer.bias is None else layer.bias.reshape(layer.groups, 1, -1)
    assert_close("outputs", rows @ weight.mT + bias, targets)


def test_rows_of_a_treated_layer_are_low_passed():
    for layer in (nn.Conv2d(4, 6, 3, 2, 1), nn.Conv2d(4, 6, 1, 2)):
        layer.__class__ = LowPassConv2d
        x = torch.randn(2, 4, 9, 10)
        out = layer(x)
        positions = torch.arange(out.shape[-2] * out.shape[-1])
        rows = rows_of(layer, x, positions)
        found = rows @ layer.weight.flatten(1).T + layer.bias
        assert_close("outputs", found, targets_of(layer, out, positions))


@pytest.mark.parametrize("size", [(9, 10), (8, 7)])
def test_rows_of_a_dense_layer_are_those_of_the_stock_one(size):
    layer, x = nn.Conv2d(4, 6, 3, 2, 1), torch.randn(2, 4, *size)
    wanted = layer(x)
    layer.__class__ = DenseConv2d
    total = num_positions(layer, layer(x).shape)
    assert total == wanted.shape[-2] * wanted.shape[-1]
    positions = torch.randperm(total)
    found = rows_of(layer, x, positions) @ layer.weight.flatten(1).T + layer.bias
    assert_close("outputs", found, targets_of(layer, wanted, positions))


def test_rows_of_a_linear_layer():
    layer, x = nn.Linear(5, 3), torch.randn(2, 7, 5)
    positions = torch.tensor([0, 3])
    assert_close(
        "outputs",
        layer(x)[:, positions].flatten(0, 1)[None],
        rows_of(layer, x, positions) @ layer.weight.T + layer.bias,
    )


@pytest.mark.parametrize("is_dual", [False, True])
@pytest.mark.parametrize("name", ["plain", "grouped", "strided"])
def test_the_solution_is_the_minimum(name, is_dual, monkeypatch):
    """The gradient of what is minimised vanishes there."""
    if is_dual:
        monkeypatch.setattr(ridge_module, "MAX_UNKNOWNS", 1)
    layer = LAYERS[name]().double()
    problem = Ridge(layer, with_bias=layer.bias is not None, ridge=0.1, num_rows=10_000)
    assert problem.is_dual == is_dual
    parts = []
    for seed in range(3):
        torch.manual_seed(seed)
        x, positions = torch.randn(2, 4, 9, 8).double(), torch.arange(30)
        rows = rows_of(layer, x, positions)
        targets = torch.randn(rows.shape[0], rows.shape[1], layer.out_channels // layer.groups).double()
        problem.add(rows, targets)
        parts.append((rows, targets))
    rows, targets = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
    weight, bias = problem.solve()
    start = layer.weight.detach().reshape(layer.groups, -1, rows.shape[2])
    w = weight.reshape(start.shape).clone().requires_grad_()
    b = None if bias is None else bias.reshape(layer.groups, 1, -1).clone().requires_grad_()
    energy = rows.square().sum(dim=1).mean(dim=1)
    loss = (rows @ w.mT + (0 if b is None else b) - targets).square().sum()
    loss = loss + (0.1 * energy[:, None, None] * (w - start).square()).sum()
    if b is not None:
        start_bias = layer.bias.detach().reshape(b.shape)
        loss = loss + ridge_module.BIAS_RIDGE * 0.1 * rows.shape[1] * (b - start_bias).square().sum()
    for gradient in torch.autograd.grad(loss, [w] if b is None else [w, b]):
        assert gradient.abs().max() < 1e-8 * loss


def test_weights_that_fit_already_stay():
    layer = nn.Conv2d(4, 6, 3, padding=1).double()
    x = torch.randn(2, 4, 9, 8).double()
    positions = torch.arange(72)
    problem = Ridge(layer, with_bias=True, ridge=0.01, num_rows=144)
    problem.add(rows_of(layer, x, positions), targets_of(layer, layer(x), positions))
    weight, bias = problem.solve()
    assert_close("weight", weight, layer.weight)
    assert_close("bias", bias, layer.bias)


def test_dead_inputs_keep_their_weights():
    layer = nn.Conv2d(2, 3, 1).double()
    rows = torch.zeros(1, 50, 2).double()
    rows[..., 0] = torch.randn(50)
    problem = Ridge(layer, with_bias=True, ridge=0.1, num_rows=50)
    problem.add(rows, torch.randn(1, 50, 3).double())
    weight, _ = problem.solve()
    assert torch.isfinite(weight).all()
    assert_close("weight", weight[:, 1], layer.weight[:, 1])


def test_sums_alone_are_kept():
    """Whatever comes, memory holds a Gram matrix; of few rows for many unknowns, the rows."""
    for layer, is_kept in ((nn.Linear(20, 3), False), (nn.Linear(MAX_UNKNOWNS + 1, 3), True)):
        problem = Ridge(layer, with_bias=True, ridge=0.1, num_rows=1000)
        for _ in range(3):
            problem.add(torch.randn(1, 5, layer.in_features), torch.randn(1, 5, 3))
        held = sum(t.numel() for t in [problem.gram, problem.cross, *problem.rows, *problem.targets] if t is not None)
        unknowns = layer.in_features + 1
        assert held == (15 * (unknowns + 3) if is_kept else unknowns * (unknowns + 3))


def test_nothing_to_solve():
    with pytest.raises(RuntimeError, match="expected rows of the layer's input"):
        Ridge(nn.Linear(2, 2), with_bias=True, ridge=0.1, num_rows=1).solve()


def test_many_unknowns_are_solved_by_their_rows():
    layer = nn.Linear(30_000, 2)
    problem = Ridge(layer, with_bias=True, ridge=0.1, num_rows=8)
    assert problem.is_dual
    x = torch.randn(1, 8, 30_000)
    problem.add(x, x @ layer.weight.T + layer.bias + 1)
    weight, bias = problem.solve()
    assert (bias - layer.bias).abs().max() < 1 + 1e-6
    before = 1.0
    after = (x.double() @ weight.T + bias - (x @ layer.weight.T + layer.bias).double() - 1).square().mean().sqrt()
    assert after < 0.3 * before
