"""Which layers get a low-pass, on networks from torchvision and by hand."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

from mixpool.stabilization.flow import trace
from mixpool.stabilization.lowpass import LowPassConv2d, LowPassMaxPool2d
from mixpool.stabilization.treat import (
    find_decimators,
    plan_of,
    treat,
    treated_layers,
    untreat,
    with_dense_stem,
)

X = torch.randn(1, 3, 64, 64)


def plan_for(model: nn.Module, order: str = "before") -> dict[str, str]:
    flow = trace(model.eval(), X)
    return plan_of(flow, find_decimators(flow), order)


def test_resnet18():
    model = torchvision.models.resnet18()
    found = {own.name: own for own in find_decimators(trace(model.eval(), X))}
    assert found.pop("conv1").why == "it reads the image"
    blocks = [f"layer{i}.0.{name}" for i in (2, 3, 4) for name in ("conv1", "downsample.0")]
    assert {name: own.treatment for name, own in found.items()} == {
        "maxpool": "maxima, then low-pass",
        **dict.fromkeys(blocks, "low-pass before"),
    }


def test_the_order_behind_moves_the_decimation_to_the_readers():
    plan = plan_for(torchvision.models.resnet18(), "behind")
    assert plan["layer2.0.conv1"] == "dense" and plan["layer2.0.conv2"] == "decimating"
    assert plan["layer2.0.downsample.0"] == "low-pass before"  # an addition reads it


def test_both_orders_keep_all_sizes():
    for order in ("before", "behind"):
        model = torchvision.models.resnet18().eval()
        shapes = {size: model(torch.randn(1, 3, *size)).shape for size in ((64, 64), (63, 50))}
        treat(model, plan_for(model, order))
        assert all(model(torch.randn(1, 3, *size)).shape == shape for size, shape in shapes.items())


def test_the_class_alone_changes():
    model = torchvision.models.resnet18().eval()
    before = model(X)
    keys, parameters = list(model.state_dict()), [id(p) for p in model.parameters()]
    plan = plan_for(model)
    treat(model, plan)
    assert treated_layers(model) == plan
    assert type(model.maxpool) is LowPassMaxPool2d and type(model.layer2[0].conv1) is LowPassConv2d
    assert list(model.state_dict()) == keys and [id(p) for p in model.parameters()] == parameters
    assert not torch.allclose(model(X), before)
    untreat(model)
    assert torch.equal(model(X), before) and treated_layers(model) == {}


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (nn.Conv2d(4, 4, 16, 16), "patches"),
        (nn.Conv2d(4, 4, 7, 4), "stride 4"),
        (nn.MaxPool2d(5, 2), "window of 5"),
        (nn.AvgPool2d(2), "averages already"),
        (nn.MaxPool2d(3, 2, dilation=2), "dilated"),
        (type("Own", (nn.Conv2d,), {})(4, 4, 3, 2), "a Own has arithmetic of its own"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_left_and_why(layer, why):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), layer).eval()
    (found,) = find_decimators(trace(model, X))
    assert found.treatment is None and why in found.why
    assert why in str(found)


def test_a_layer_called_twice_is_left():
    pool = nn.MaxPool2d(2)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), pool, nn.Conv2d(4, 4, 1), pool)
    (found,) = find_decimators(trace(model, X))
    assert found.treatment is None and "called 2 times" in found.why


def test_a_plan_that_does_not_fit_changes_nothing():
    model = torchvision.models.resnet18()
    plan = {"maxpool": "maxima, then low-pass", "layer1.0.bn1": "low-pass before"}
    with pytest.raises(ValueError, match="expected layer1.0.bn1 to be a Conv2d of the stock model, found BatchNorm2d"):
        treat(model, plan)
    assert treated_layers(model) == {}
    with pytest.raises(ValueError, match="no such module"):
        treat(model, {"nothing": "low-pass before"})
    with pytest.raises(ValueError, match="expected a treatment of"):
        treat(model, {"maxpool": "blur"})


def test_a_dense_stem():
    model = torchvision.models.resnet18().eval()
    flow = trace(model, X)
    plan = plan_of(flow, find_decimators(flow))
    found = with_dense_stem(plan, flow, "maxpool")
    assert list(found.items())[:2] == [("conv1", "dense"), ("maxpool", "maxima of a dense map, then low-pass")]
    shapes = [model(torch.randn(1, 3, *size)).shape for size in ((64, 64), (63, 50))]
    treat(model, found)
    assert [model(torch.randn(1, 3, *size)).shape for size in ((64, 64), (63, 50))] == shapes
    assert model.maxpool(model.conv1(X)).shape == (1, 64, 16, 16)


@pytest.mark.parametrize(
    ("layers", "pool", "why"),
    [
        (
            [nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 1, 1), nn.MaxPool2d(2)],
            "2",
            "expected a convolution of stride 2",
        ),
        ([nn.Conv2d(3, 4, 3, 2, 1)], None, "no max pool"),
        ([nn.Conv2d(3, 4, 3, 2, 1), nn.AvgPool2d(1, 1), nn.MaxPool2d(2)], "2", "expected a convolution|no max pool"),
    ],
    ids=["deep", "no-pool", "between"],
)
def test_where_a_stem_cannot_be_dense(layers, pool, why):
    model = nn.Sequential(*layers).eval()
    flow = trace(model, X)
    with pytest.raises(ValueError, match=why):
        with_dense_stem(plan_of(flow, find_decimators(flow)), flow, pool)
