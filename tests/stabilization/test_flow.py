"""What reads what, on networks whose answer is plain to see."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixpool.stabilization.flow import INPUT, trace

X = torch.randn(1, 3, 16, 16)


class Residual(nn.Module):
    """conv -> norm -> relu -> pool, then a block with an identity, a branch by hand, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.first, self.second = nn.Conv2d(4, 4, 3, 1, 1), nn.Conv2d(4, 4, 3, 1, 1)
        self.side, self.head = nn.Conv2d(8, 4, 1), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu(self.norm(self.conv(x))))
        y = self.relu(self.first(x))
        y = self.second(y) + x
        y = self.side(torch.cat([y, F.relu(y)], dim=1))
        return self.head(y.mean(dim=(2, 3)))


def test_sources_and_readers():
    flow = trace(Residual().eval(), X)
    assert [call.name for call in flow.calls] == ["conv", "norm", "pool", "first", "second", "side", "head"]
    sources = {call.name: call.sources for call in flow.calls}
    assert sources == {
        "conv": {INPUT: True},
        "norm": {"conv": True},
        "pool": {"conv": True},
        "first": {"pool": True},
        "second": {"first": True},
        "side": {"second": False, "pool": False},
        "head": {"side": False},
    }
    assert [call.name for call in flow.readers("pool")] == ["first", "side"]
    assert [call.name for call in flow.behind(["first"])] == ["second", "side", "head"]
    assert flow.outputs == {"head"}
    assert flow["conv"].in_shape == (1, 3, 16, 16) and flow["conv"].out_shape == (1, 4, 8, 8)


def test_a_layer_called_twice_is_counted():
    conv = nn.Conv2d(3, 3, 3, 1, 1)
    flow = trace(nn.Sequential(conv, nn.ReLU(), conv), X)
    assert [call.name for call in flow.calls] == ["0", "0"] and flow.count("0") == 2
    assert flow.calls[1].sources == {"0": True}


def test_control_flow_and_structures():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in range(3))

        def forward(self, x: Tensor) -> dict[str, list[Tensor]]:
            maps = []
            for conv in self.convs:
                x = conv(x)
                maps.append(x)
                if len(maps) == 2 and x.shape[-1] > 3:  # no symbolic trace gets through this
                    break
            return {"maps": maps}

    flow = trace(Odd(), X)
    assert [call.name for call in flow.calls] == ["convs.0", "convs.1"]
    assert flow.outputs == {"convs.0", "convs.1"}


def test_functions_that_pool_are_named():
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return F.max_pool2d(self.conv(x), 3, 2)

    assert trace(Functional(), X).functional_pools == ["conv"]


def test_a_module_may_count_as_a_layer():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.Sequential(nn.Dropout(), nn.AvgPool2d(2)), nn.ReLU(), nn.Conv2d(4, 4, 1)
    )
    flow = trace(model.eval(), X, whole={"1", "2"})
    assert {call.name: call.sources for call in flow.calls} == {
        "0": {INPUT: True},
        "1": {"0": True},
        "2": {"1": True},
        "3": {"2": True},
    }
    assert [call.name for call in trace(model, X).calls] == ["0", "1.1", "3"]


def test_nothing_is_left_on_the_model():
    model = Residual().eval()
    trace(model, X)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
