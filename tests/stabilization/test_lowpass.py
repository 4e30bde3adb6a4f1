"""Layers with a low-pass, by plain sums; what exporters see has the same values."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support import assert_close
from torch import Tensor, nn

from mixpool.stabilization.lowpass import (
    DecimatingConv2d,
    DenseConv2d,
    FieldMaxPool2d,
    LowPassConv2d,
    LowPassMaxPool2d,
    binomial,
)

SIZES = [(1, 1), (1, 6), (2, 2), (7, 8), (12, 5)]


def by_sums(x: Tensor, axes: tuple[int, int], stride: tuple[int, int]) -> Tensor:
    for dim, size in zip((2, 3), axes, strict=True):
        if size == 2:
            length = x.shape[dim]
            before = x.index_select(dim, torch.tensor([max(i - 1, 0) for i in range(length)]))
            after = x.index_select(dim, torch.tensor([min(i + 1, length - 1) for i in range(length)]))
            x = before / 4 + x / 2 + after / 4
    return x[:, :, :: stride[0], :: stride[1]]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("axes", [(2, 2), (2, 1), (1, 2)])
@pytest.mark.parametrize("size", SIZES)
def test_binomial_by_sums(size, axes, memory_format):
    x = torch.randn(2, 3, *size).contiguous(memory_format=memory_format)
    for stride in (axes, (1, 1)):
        assert_close("binomial", binomial(x, axes, stride), by_sums(x, axes, stride))


def test_a_constant_stays_to_the_border():
    x = torch.full((1, 2, 5, 6), 3.0)
    assert torch.equal(binomial(x), torch.full((1, 2, 3, 3), 3.0))


def test_what_exporters_see_has_the_same_values():
    x = torch.randn(2, 3, 9, 10)
    exported = torch.export.export(_Binomial(), (x,), strict=False)
    names = {str(node.target) for node in exported.graph.nodes}
    assert any("avg_pool2d" in name for name in names) and not any("pad" in name for name in names)
    assert_close("exported", exported.module()(x), binomial(x))


class _Binomial(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return binomial(x)


def as_class(module: nn.Module, cls: type[nn.Module]) -> nn.Module:
    module.__class__ = cls
    return module


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "stride": 2, "padding": 1},
        {"kernel_size": 1, "stride": 2},
        {"kernel_size": 5, "stride": 2, "padding": 2, "groups": 4, "bias": False},
        {"kernel_size": 3, "stride": (2, 1), "padding": 1},
        {"kernel_size": 3, "stride": 2, "padding": 2, "dilation": 2},
        {"kernel_size": 3, "stride": 2, "padding": 1, "padding_mode": "circular"},
        {"kernel_size": 2, "stride": 2},
    ],
    ids=lambda options: "-".join(f"{k[0]}{v}" for k, v in options.items()),
)
@pytest.mark.parametrize("size", [(9, 12), (10, 7)])
def test_a_convolution_sees_its_input_low_passed(options, size):
    conv = nn.Conv2d(4, 8, **options)
    x = torch.randn(2, 4, *size)
    shape = conv(x).shape
    expected = conv(by_sums(x, conv.stride, (1, 1)))
    treated = as_class(conv, LowPassConv2d)
    assert_close("convolution", treated(x), expected)
    assert treated(x).shape == shape


def test_dense_and_decimating_keep_the_size():
    first, second = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 5, 3, 1, 1)
    x = torch.randn(1, 3, 11, 14)
    shape = second(first(x)).shape
    dense = F.conv2d(x, first.weight, first.bias, 1, 1)
    expected = second(by_sums(F.relu(dense), (2, 2), (2, 2)))
    as_class(first, DenseConv2d), as_class(second, DecimatingConv2d)
    assert_close("map", first(x), dense)
    assert_close("output", second(F.relu(first(x))), expected)
    assert second(F.relu(first(x))).shape == shape


@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize(("size", "padding"), [(3, 1), (3, 0), (2, 0)])
@pytest.mark.parametrize("side", [(9, 12), (10, 7), (3, 3)])
def test_max_pooling_is_dense_first(size, padding, ceil_mode, side, needs_grad):
    pool = nn.MaxPool2d(size, 2, padding, ceil_mode=ceil_mode)
    x = torch.randn(2, 3, *side).requires_grad_(needs_grad)
    shape = pool(x).shape
    length = [2 * (n - 1) + 1 for n in shape[2:]]
    padded = F.pad(x, (padding, padding + 3, padding, padding + 3), value=float("-inf"))
    dense = F.max_pool2d(padded, size, 1)[:, :, : side[0] + 2 * padding + 3, : side[1] + 2 * padding + 3]
    if ceil_mode:  # as far as the last window
        dense = dense[:, :, : max(length[0], side[0] + 2 * padding - size + 1)]
        dense = dense[:, :, :, : max(length[1], side[1] + 2 * padding - size + 1)]
    else:
        dense = dense[:, :, : side[0] + 2 * padding - size + 1, : side[1] + 2 * padding - size + 1]
    treated = as_class(pool, LowPassMaxPool2d)
    assert treated(x).shape == shape
    assert_close("pooled", treated(x), by_sums(dense, (2, 2), (2, 2)))


@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize(("size", "padding"), [(3, 1), (3, 0), (2, 0)])
@pytest.mark.parametrize("side", [(22, 27), (21, 24), (13, 13)])
def test_maxima_of_a_dense_map(size, padding, ceil_mode, side):
    """Windows of 2k - 1 neighbours that start at every second position, then the low-pass."""
    conv, pool = nn.Conv2d(3, 4, 5, 2, 2), nn.MaxPool2d(size, 2, padding, ceil_mode=ceil_mode)
    x = torch.randn(2, 3, *side)
    shape = pool(conv(x)).shape
    dense = F.conv2d(x, conv.weight, conv.bias, 1, 2)
    as_class(conv, DenseConv2d), as_class(pool, FieldMaxPool2d)
    out = pool(conv(x))
    assert out.shape == shape
    padded = F.pad(dense, (2 * padding, 40, 2 * padding, 40), value=float("-inf"))
    windows = F.max_pool2d(padded, 2 * size - 1, 2)
    lengths = [(n + 1) // 2 + 2 * padding - size + 1 for n in dense.shape[2:]]
    if ceil_mode:
        lengths = [max(n, 2 * (m - 1) + 1) for n, m in zip(lengths, shape[2:], strict=True)]
    assert_close("pooled", out, by_sums(windows[:, :, : lengths[0], : lengths[1]], (2, 2), (2, 2)))


def test_a_treated_pool_exports_as_it_computes():
    pool, x = as_class(nn.MaxPool2d(3, 2, ceil_mode=True), LowPassMaxPool2d), torch.randn(2, 3, 12, 9)
    exported = torch.export.export(pool, (x,), strict=False)
    assert_close("exported", exported.module()(x), pool(x))
    assert not any("reflect" in str(node.target) for node in exported.graph.nodes)
