"""The building blocks of the operation, one by one; the operation as a whole is in test_functional.py."""

from __future__ import annotations

import pytest
import torch
from support import assert_close
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mixpool.ops import reference
from mixpool.ops.geometry import ConvGeometry, PoolGeometry
from mixpool.ops.reference import (
    POOLINGS,
    Group,
    binomial_decimate,
    binomial_kernel,
    check_poolings,
    convolve_and_pool,
    convolve_at_centers,
    dense_max_pool,
    groups_of,
    lowpass_pool,
    max_pool,
    nearest_centers,
)

STEM_POOLS = {
    "3/2/1": PoolGeometry((3, 3), (2, 2), (1, 1)),
    "3/2/0": PoolGeometry((3, 3), (2, 2), (0, 0)),
    "3/2/0 ceil": PoolGeometry((3, 3), (2, 2), (0, 0), True),
    "2/2/0": PoolGeometry((2, 2), (2, 2), (0, 0)),
    "2/3/0 ceil": PoolGeometry((2, 2), (3, 3), (0, 0), True),
    "3/1/1": PoolGeometry((3, 3), (1, 1), (1, 1)),
    "3x2/3x2/1x0": PoolGeometry((3, 2), (3, 2), (1, 0)),
}


def test_fresh_memory_of_mixpool_is_nan():
    namespace = {"__name__": "mixpool.somewhere", "torch": torch}
    exec("a, b, c = torch.empty(3), torch.zeros(3).new_empty(2), torch.empty_like(torch.zeros(2))", namespace)
    assert all(namespace[name].isnan().all() for name in "abc"), "the poison of conftest.py does not work"
    namespace = {"__name__": "mixpool_of_someone_else", "torch": torch}
    exec("a = torch.empty(3).zero_(); b = torch.full((2,), 1.0)", namespace)
    assert not namespace["a"].isnan().any() and not namespace["b"].isnan().any()


# --- the means --------------------------------------------------------------------------------------------------------


def test_binomial_kernels():
    like = torch.zeros(1, dtype=torch.float64)
    assert_close("3x3", binomial_kernel((3, 3), like)[0, 0] * 16, torch.tensor([[1, 2, 1], [2, 4, 2], [1, 2, 1]]))
    assert_close("2x2", binomial_kernel((2, 2), like)[0, 0] * 4, torch.ones(2, 2))
    assert_close("3x2", binomial_kernel((3, 2), like)[0, 0] * 8, torch.tensor([[1, 1], [2, 2], [1, 1]]))
    assert binomial_kernel((3, 3), torch.zeros(1, dtype=torch.bfloat16)).float().sum() == 1


@pytest.mark.parametrize("pool", STEM_POOLS.values(), ids=STEM_POOLS)
@pytest.mark.parametrize("size", [(6, 9), (7, 8), (5, 5)])
def test_lowpass_pool_keeps_a_constant(pool, size):
    out = lowpass_pool(torch.full((2, 3, *size), 1.75), pool)
    assert out.shape[-2:] == pool.output_size(*size)
    assert_close("constant", out, torch.full_like(out, 1.75), (0, 1e-6))


def test_lowpass_pool_by_hand():
    envelope = torch.arange(36, dtype=torch.float64).reshape(1, 1, 6, 6)  # 6 i + j
    at = torch.tensor([1 / 3, 2.0, 4.0], dtype=torch.float64)  # rows {0, 1} weigh 2 : 1, then {1, 2, 3}, {3, 4, 5}
    out = lowpass_pool(envelope, STEM_POOLS["3/2/1"])
    assert_close("padding 1", out[0, 0], 6 * at[:, None] + at)
    at = torch.tensor([1.0, 3.0, (4 + 2 * 5) / 3], dtype=torch.float64)  # rows {0, 1, 2}, {2, 3, 4}, {4, 5}
    out = lowpass_pool(envelope, STEM_POOLS["3/2/0 ceil"])
    assert_close("ceil_mode", out[0, 0], 6 * at[:, None] + at)


def test_binomial_decimate_by_hand():
    values = torch.tensor([3.0, 5.0, 5.0, 1.0], dtype=torch.float64).expand(1, 2, 4, 4)
    out = binomial_decimate(values, STEM_POOLS["3/2/1"])
    assert_close("columns", out, torch.tensor([4.0, 4.0]).double().expand(1, 2, 2, 2))  # (5+6+5)/4, (5+10+1)/4


@pytest.mark.parametrize("size", [(1, 6), (6, 1), (1, 1)])
def test_binomial_decimate_of_a_map_one_position_wide_reflects_along_the_other_axis(size):
    values = torch.randn(1, 2, *size, dtype=torch.float64)
    out = binomial_decimate(values, STEM_POOLS["3/2/1"])
    line = values.flatten(2)
    if line.shape[-1] > 1:
        line = torch.nn.functional.pad(line, (1, 1), mode="reflect")
        line = (line[..., :-2:2] + 2 * line[..., 1:-1:2] + line[..., 2::2]) / 4
    assert_close("line", out.flatten(2), line)


def test_dense_max_pool_decimates_to_the_max_pool():
    """Every stride-th value of the stride-1 maxima is the max pool, also where windows hang over the border."""
    for pool in STEM_POOLS.values():
        for size in ((6, 7), (7, 6), (9, 8)):
            y = torch.randn(2, 3, *size)
            dense = dense_max_pool(y, pool)
            expected = max_pool(y, pool)
            assert torch.isfinite(dense).all(), pool
            assert_close(str(pool), dense[..., :: pool.stride[0], :: pool.stride[1]], expected, (0, 0))
            assert binomial_decimate(dense, pool).shape == expected.shape
            assert_close("with gradients", dense_max_pool(y.requires_grad_(), pool).detach(), dense, (0, 0))


def test_the_gradient_of_dense_maxima_at_a_tie_is_max_poolings():
    y = torch.zeros(1, 1, 6, 6, requires_grad=True)
    pool = STEM_POOLS["3/2/1"]
    out = dense_max_pool(y, pool)
    (grad,) = torch.autograd.grad(out, y, torch.ones_like(out))
    (expected,) = torch.autograd.grad(torch.nn.functional.max_pool2d(y, 3, 1, 1), y, torch.ones_like(out))
    assert_close("gradient", grad, expected)


def test_groups_of_one_convolution_are_convolved_together(monkeypatch):
    """[real | re | im] in one map, biases of the real channels alone; the same numbers as one group at a time."""
    x, weight, bias = torch.randn(2, 3, 20, 17), torch.randn(7, 3, 5, 5), torch.randn(7)
    weight_imag = torch.randn(4, 3, 5, 5)
    groups = groups_of(("modulus", "max", "blurpool", "modulus", "energy", "max", "energy"))
    geometry = (ConvGeometry((2, 2), (2, 2)), STEM_POOLS["3/2/1"])
    calls = []
    monkeypatch.setattr(reference, "convolve", lambda *a, real=reference.convolve: calls.append(1) or real(*a))
    together = convolve_and_pool(x, weight, bias, weight_imag, groups, *geometry, with_moments=True)
    assert len(calls) == 1
    first = 0
    for group, part in zip(groups, together, strict=True):
        count = len(group.index) if POOLINGS[group.pooling].is_complex else 0
        own = weight_imag[first : first + count]
        first += count
        (alone,) = convolve_and_pool(x, weight, bias, own, [group], *geometry, with_moments=True)
        assert_close(group.pooling, part.values, alone.values)
        assert_close(f"variance of {group.pooling}", part.moments.var, alone.moments.var)


def test_names_are_checked():
    assert check_poolings("energy", 2) == ("energy", "energy")
    for wrong, message in ((("max", 3), "got 3"), (("max",) * 3, "expected 2 poolings"), ("mean", "got 'mean'")):
        with pytest.raises(ValueError, match=message):
            check_poolings(wrong, 2)


def test_codes_of_earlier_checkpoints_keep_their_meaning():
    """kind (1: modulus) + 2 (blurred) of version 0.1 are the first four places of the table."""
    assert list(POOLINGS)[:5] == ["max", "cmod", "blurpool", "modulus", "energy"]


# --- the modulus at the windows' centres ------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", STEM_POOLS.values(), ids=STEM_POOLS)
@pytest.mark.parametrize(
    "conv",
    [ConvGeometry((2, 2), (3, 3)), ConvGeometry((1, 3), (0, 1)), ConvGeometry((4, 2), (1, 0), (1, 2))],
    ids=str,
)
def test_convolution_at_the_centers_is_the_dense_one_sampled(pool, conv):
    weight = torch.randn(4, 3, 5, 4, dtype=torch.float64)
    for size in ((31, 28), (32, 33), (29, 30)):
        x = torch.randn(1, 3, *size, dtype=torch.float64)
        dense = nn.functional.conv2d(x, weight, None, conv.stride, conv.padding, conv.dilation)
        rows, columns = pool.output_size(*dense.shape[-2:])
        first = [center - padding for center, padding in zip(pool.center, pool.padding)]
        expected = dense[..., first[0] :: pool.stride[0], first[1] :: pool.stride[1]][..., :rows, :columns]
        assert expected.shape[-2:] == (rows, columns)
        assert_close(f"{size}", convolve_at_centers(x, weight, None, conv, pool), expected)
        assert_close(f"nearest {size}", nearest_centers(dense, pool), expected)


@pytest.mark.parametrize("name", ["3/2/1", "3/2/0", "3/2/0 ceil", "2/2/0"])
def test_cmod_costs_no_more_than_a_convolution_of_the_total_stride(name):
    pool, conv = STEM_POOLS[name], ConvGeometry((2, 2), (3, 3))
    x, weight = torch.randn(1, 3, 64, 64), torch.randn(8, 3, 7, 7)
    flops, outputs = {}, {}
    for pooling in ("cmod", "modulus"):
        with FlopCounterMode(display=False) as counter:
            group = Group(pooling, torch.arange(8))
            (outputs[pooling],) = convolve_and_pool(x, weight, None, weight, [group], conv, pool)
        flops[pooling] = counter.get_total_flops()
    positions = outputs["cmod"].values.shape[-2] * outputs["cmod"].values.shape[-1]
    assert flops["cmod"] == 2 * positions * weight[0].numel() * 2 * 8  # 2 per multiply-add; W and V
    assert flops["modulus"] > 3.5 * flops["cmod"]


def test_the_flop_test_can_fail():
    """A convolution at the plain stride, sliced afterwards, counts four times as many operations."""
    x, weight = torch.randn(1, 3, 64, 64), torch.randn(8, 3, 7, 7)
    with FlopCounterMode(display=False) as counter:
        out = nn.functional.conv2d(x, weight, None, 2, 3)[..., ::2, ::2]
    assert counter.get_total_flops() == 4 * 2 * out.shape[-2] * out.shape[-1] * weight[0].numel() * 8
