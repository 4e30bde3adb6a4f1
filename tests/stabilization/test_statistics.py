"""Statistics move by what the change did, and by nothing else."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from support import assert_close, assert_same_bits
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from mixpool.stabilization.flow import trace
from mixpool.stabilization.statistics import correct_statistics, norms_behind, statistics_of


class ChannelwiseAffine(nn.Module):
    """The map, channel by channel times `scale` plus `shift`."""

    def __init__(self, scale: list[float], shift: list[float]) -> None:
        super().__init__()
        self.scale, self.shift = (torch.tensor(values)[:, None, None] for values in (scale, shift))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale.to(x.dtype) + self.shift.to(x.dtype)


SCALE, SHIFT = [2.0, 1.0, 0.5, -1.0], [0.0, 3.0, -1.0, 0.25]


def random_norm(norm: nn.Module) -> nn.Module:
    norm.running_mean.normal_(0, 0.3)
    norm.running_var.uniform_(0.5, 2)
    norm.weight.data.uniform_(0.5, 2)
    norm.bias.data.normal_()
    return norm


def chain(norm=nn.BatchNorm2d) -> nn.Sequential:
    """conv, (change), norm, relu, conv, norm."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False),
        nn.Identity(),
        random_norm(norm(4)),
        nn.ReLU(),
        nn.Conv2d(4, 5, 3),
        random_norm(norm(5)),
    ).eval()


def corrected(stock: nn.Sequential, change: nn.Module, batches: list[Tensor], names=("2", "5")) -> nn.Sequential:
    changed = copy.deepcopy(stock)
    changed[1] = change
    starts = {name: statistics_of(stock.get_submodule(name)) for name in names}
    correct_statistics(changed, stock, batches, names, starts)
    return changed


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, FrozenBatchNorm2d, BatchNormAct2d], ids=lambda cls: cls.__name__)
def test_where_nothing_has_changed_nothing_moves(norm):
    stock = chain(norm)
    changed = corrected(stock, nn.Identity(), [torch.randn(4, 3, 12, 12), torch.randn(2, 3, 12, 12)])
    for name, value in stock.state_dict().items():
        assert_same_bits(name, changed.state_dict()[name], value)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, FrozenBatchNorm2d, BatchNormAct2d], ids=lambda cls: cls.__name__)
def test_a_scaled_and_shifted_channel_moves_as_its_moments_do(norm):
    stock, x = chain(norm), torch.randn(8, 3, 12, 12)
    changed = corrected(stock, ChannelwiseAffine(SCALE, SHIFT), [x])
    scale, shift = torch.tensor(SCALE), torch.tensor(SHIFT)
    mean = stock[0](x).mean(dim=(0, 2, 3))
    assert_close("mean", changed[2].running_mean, stock[2].running_mean + (scale - 1) * mean + shift)
    assert_close("variance", changed[2].running_var, stock[2].running_var * scale.square())


@torch.no_grad()
def test_a_change_that_an_affine_map_undoes_is_undone():
    """Where the running statistics are the images' own, scale and shift go, and the layers behind do not move."""
    stock, x = chain().double(), torch.randn(8, 3, 12, 12, dtype=torch.float64)
    var, mean = torch.var_mean(stock[0](x), dim=(0, 2, 3), correction=0)
    stock[2].running_mean.copy_(mean), stock[2].running_var.copy_(var)
    stock[2].eps = 0.0
    changed = corrected(stock, ChannelwiseAffine([2.0, 1.0, 0.5, 3.0], SHIFT), [x])
    # because moments are taken in float32
    assert_close("output", changed(x), stock(x), (1e-5, 1e-5))
    assert_close("mean behind", changed[5].running_mean, stock[5].running_mean, (1e-5, 1e-5))


def test_later_layers_see_the_earlier_ones_corrected():
    """In one pass what two passes give, of the first layer and then of the second."""
    stock, x, change = chain(), torch.randn(8, 3, 12, 12), ChannelwiseAffine(SCALE, SHIFT)
    both = corrected(stock, change, [x])
    one = corrected(stock, change, [x], names=("2",))
    start = statistics_of(one[5])
    var, mean = torch.var_mean(one[:5](x), dim=(0, 2, 3), correction=0)
    stock_var, stock_mean = torch.var_mean(stock[:5](x), dim=(0, 2, 3), correction=0)
    assert_close("mean", both[5].running_mean, start[0] + mean - stock_mean)
    assert_close("variance", both[5].running_var, start[1] * var / stock_var)
    alone = corrected(stock, change, [x], names=("5",))
    assert not torch.allclose(alone[5].running_mean, both[5].running_mean, atol=1e-3)


def test_batches_count_by_their_images():
    stock, change = chain(), ChannelwiseAffine([2.0, 2.0, 1.0, 1.0], [0.0] * 4)
    x = torch.randn(3, 3, 12, 12)
    mean = [stock[0](part).mean(dim=(0, 2, 3)) for part in (x[:1], x[1:])]
    changed = corrected(stock, change, [x[:1], x[1:]], names=("2",))
    expected = stock[2].running_mean + torch.tensor([1.0, 1.0, 0.0, 0.0]) * (mean[0] + 2 * mean[1]) / 3
    assert_close("mean", changed[2].running_mean, expected)


def test_dead_channels_keep_their_variance():
    stock, x = chain(), torch.randn(4, 3, 12, 12)
    with torch.no_grad():
        stock[0].weight[2] = 0
    changed = corrected(stock, ChannelwiseAffine([0.0, 1.0, 1.0, 1.0], [0.0, 0.0, 5.0, 0.0]), [x])
    assert torch.isfinite(changed(x)).all()
    assert torch.equal(changed[2].running_var[[0, 2]], stock[2].running_var[[0, 2]])
    assert_close("mean", changed[2].running_mean[2], stock[2].running_mean[2] + 5)


def test_nothing_to_correct_runs_nothing():
    correct_statistics(nn.Identity(), nn.Identity(), [None], [], {})


def test_hooks_go_even_after_an_error():
    stock = chain()
    changed = copy.deepcopy(stock)
    starts = {"2": statistics_of(stock[2])}
    with pytest.raises(RuntimeError):
        correct_statistics(changed, stock, [torch.randn(1, 5, 12, 12)], ["2"], starts)
    assert not any(m._forward_pre_hooks for net in (changed, stock) for m in net.modules())


def test_statistics_are_copies():
    norm = nn.BatchNorm2d(3)
    mean, _ = statistics_of(norm)
    norm.running_mean += 1
    assert torch.equal(mean, torch.zeros(3))


def test_which_norms_are_behind():
    flow = trace(torchvision.models.resnet18().eval(), torch.randn(1, 3, 64, 64))
    behind = norms_behind(flow, ["layer4.0.conv1"])
    assert behind == ["layer4.0.bn1", "layer4.0.bn2", "layer4.1.bn1", "layer4.1.bn2"]
    assert "layer1.0.bn1" in norms_behind(flow, ["maxpool"]) and "bn1" not in norms_behind(flow, ["maxpool"])
    assert norms_behind(flow, []) == []


def test_norms_that_have_no_statistics_or_are_shared_are_not_behind():
    shared = nn.BatchNorm2d(4)
    norms = [nn.BatchNorm2d(4, track_running_stats=False), shared, shared, nn.BatchNorm2d(4)]
    flow = trace(nn.Sequential(nn.Conv2d(3, 4, 3), *norms).eval(), torch.randn(2, 3, 8, 8))
    assert norms_behind(flow, ["0"]) == ["4"]
