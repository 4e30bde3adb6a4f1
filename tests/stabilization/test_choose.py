"""How deep a network is treated, on one whose levels are plain to see."""

from __future__ import annotations

import pytest
import torch
from strided_net import TREATED, images, trained
from torch import nn

from mixpool.stabilization import choose as choose_module
from mixpool.stabilization.choose import choose, levels_of
from mixpool.stabilization.flow import trace
from mixpool.stabilization.pictures import Squares, split
from mixpool.stabilization.treat import find_decimators, plan_of, treated_layers


def levels_for(model: nn.Module, order: str = "before") -> list[dict[str, str]]:
    flow = trace(model.eval(), images()[:1])
    return levels_of(plan_of(flow, find_decimators(flow), order), flow)


def run(model: nn.Module, price: float | None, which: str | None = "next"):
    stock = trained()
    parts = split(Squares(torch.nn.functional.pad(images(40), (4,) * 4, mode="reflect"), images().shape[-1]))
    return choose(model, stock, levels_for(trained()), parts, which=which, price=price, ridge=0.1, seed=0)


def test_a_level_holds_what_decimates_maps_of_one_size():
    levels = levels_for(trained())
    assert {name: what for level in levels for name, what in level.items()} == TREATED
    import torchvision

    found = levels_for(torchvision.models.resnet18(), "behind")
    assert [sorted(level) for level in found[1:]] == [
        sorted([f"layer{i}.0.conv1", f"layer{i}.0.conv2", f"layer{i}.0.downsample.0"]) for i in (2, 3, 4)
    ]


def test_without_a_price_all_is_kept():
    model = trained().eval()
    found, _ = run(model, None)
    assert all(level.is_kept for level in found) and treated_layers(model) == TREATED


def test_a_price_that_nothing_is_worth_changes_nothing():
    model = trained().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found, repaired = run(model, 1e9)
    assert not any(level.is_kept for level in found) and repaired == [] and treated_layers(model) == {}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert "not worth it" in found[0].why


@pytest.mark.parametrize("best", [0, 1, 2])
def test_the_best_depth_is_kept(best, monkeypatch):
    """Movement and disagreement by hand: the network comes back to the state that it had at that depth."""
    levels = levels_for(trained())
    values = iter([(0.0 if number == best else 1.0, 1.0) for number in range(len(levels) + 1)])
    states = []

    class Judge:
        def __init__(self, *_):
            pass

        def __call__(self, model):
            states.append({name: value.clone() for name, value in model.state_dict().items()})
            return next(values)

    monkeypatch.setattr(choose_module, "_Judge", Judge)
    model = trained().eval()
    found, _ = run(model, 1.0)
    assert [level.is_kept for level in found] == [number < best for number in range(len(levels))]
    assert treated_layers(model) == {name: what for level in levels[:best] for name, what in level.items()}
    assert all(torch.equal(value, states[best][name]) for name, value in model.state_dict().items())
