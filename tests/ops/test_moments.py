"""Batch statistics and their derivatives, against float64 and finite differences."""

from __future__ import annotations

import pytest
import torch
from support import assert_close
from torch.autograd import forward_ad

from mixpool.ops.moments import energy_moments, modulus_moments, real_moments

KINDS = {"real": real_moments, "modulus": modulus_moments, "energy": energy_moments}


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_moments(dtype, memory_format):
    y = (torch.randn(3, 4, 5, 6, dtype=torch.float64) + 2).to(dtype).contiguous(memory_format=memory_format)
    by_hand = y.double()
    moments = real_moments(y)
    assert moments.count == 90 and moments.mean.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close("mean", moments.mean, by_hand.mean(dim=(0, 2, 3)))
    assert_close("var", moments.var, by_hand.var(dim=(0, 2, 3), correction=0))
    wide = y.to(moments.mean.dtype)
    for moments in (modulus_moments(wide.abs()), energy_moments(wide.square())):
        assert_close("energy", moments.var, by_hand.square().mean(dim=(0, 2, 3)) / 2)
        assert not moments.mean.any()


def test_a_large_mean_does_not_hide_the_variance():
    y = 1000 + torch.randn(8, 4, 32, 32)
    expected = y.double().var(dim=(0, 2, 3), correction=0)
    assert_close("var", real_moments(y).var, expected, (0, 1e-5))
    by_squares = y.square().mean(dim=(0, 2, 3)) - y.mean(dim=(0, 2, 3)).square()
    assert (by_squares.double() / expected - 1).abs().max() > 1e-2, "the test cannot fail"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_derivatives_of_both_orders(kind, memory_format):
    y = (torch.randn(2, 3, 2, 3, dtype=torch.float64) + 1).contiguous(memory_format=memory_format).requires_grad_()

    def both(y):
        return KINDS[kind](y)[:2]

    assert torch.autograd.gradcheck(both, y)
    assert torch.autograd.gradgradcheck(both, y)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")  # of torch's own modules
@pytest.mark.parametrize("kind", KINDS)
def test_tangents_are_carried_forward(kind):
    y, tangent = torch.randn(2, 2, 3, 4, 5, dtype=torch.float64)
    step = 1e-5
    ahead, behind = (KINDS[kind](y + sign * step * tangent) for sign in (1, -1))
    with forward_ad.dual_level():
        found = KINDS[kind](forward_ad.make_dual(y, tangent))
        for name in ("mean", "var"):
            of_dual = forward_ad.unpack_dual(getattr(found, name)).tangent
            by_difference = (getattr(ahead, name) - getattr(behind, name)) / (2 * step)
            of_dual = torch.zeros_like(by_difference) if of_dual is None else of_dual
            assert_close(name, of_dual, by_difference, (1e-8, 1e-6))


@pytest.mark.parametrize("kind", KINDS)
def test_transforms_agree(kind):
    """Under torch.func, as in a compiled graph, other operators compute the same."""
    y = torch.randn(2, 3, 4, 5, dtype=torch.float64)

    def total(y):
        mean, var, _ = KINDS[kind](y)
        return (mean * torch.arange(3) + var.square()).sum()

    expected = torch.autograd.grad(total(y.requires_grad_()), y)[0]
    assert_close("torch.func", torch.func.grad(total)(y), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_moments_of_an_empty_batch_are_zeros_with_a_gradient(kind):
    y = torch.zeros(0, 4, 5, 6, requires_grad=True)
    moments = KINDS[kind](y)
    assert moments.count == 0 and not moments.var.any() and not moments.mean.any()
    assert torch.autograd.grad(moments.var.sum(), y)[0].shape == y.shape
