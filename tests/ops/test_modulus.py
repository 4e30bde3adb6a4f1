"""Modulus, energy, root and their derivatives, against known numbers, float64 and finite differences."""

from __future__ import annotations

import pytest
import torch
from support import assert_close
from torch import Tensor
from torch.autograd import forward_ad

from mixpool.ops.modulus import energy, modulus, root


def complex_map(re: list[float], im: list[float], dtype: torch.dtype = torch.float64) -> Tensor:
    """z of one channel, (len(re), 2)."""
    return torch.tensor([re, im], dtype=dtype).T.contiguous()


@pytest.mark.parametrize("grad_enabled", [True, False])
def test_known_numbers(grad_enabled):
    z = complex_map([3.0, 0.0, -5.0, 0.0, 8e-10], [4.0, 0.0, 12.0, -2.0, 6e-10], torch.float32)
    with torch.set_grad_enabled(grad_enabled):
        assert_close("modulus", modulus(z), torch.tensor([[5.0, 0.0, 13.0, 2.0, 1e-9]]).T, (1e-15, 1e-6))


def test_real_parts_come_before_imaginary_parts():
    z = torch.randn(2, 6, 5, 4)
    assert_close("modulus", modulus(z), torch.complex(z[:, :3], z[:, 3:]).abs())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_neither_overflows_nor_underflows(dtype):
    z = complex_map([300.0, 6e-4], [400.0, 8e-4], dtype)
    out = modulus(z)
    assert out.dtype == torch.float32  # because 300^2 is more than float16 can hold
    assert_close("modulus", out, torch.hypot(*z.double().chunk(2, dim=1)), (0, 1e-6))


def test_derivative_is_zero_at_zero():
    z = complex_map([0.0, 3.0, 0.0, -1.0], [0.0, 4.0, 2.0, 0.0]).requires_grad_()
    (grad,) = torch.autograd.grad(modulus(z), z, torch.tensor([[7.0, 10.0, 1.0, 3.0]]).T.double())
    assert_close("gradient", grad, complex_map([0.0, 6.0, 0.0, -3.0], [0.0, 8.0, 1.0, 0.0]))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_derivatives_of_both_orders_away_from_zero(memory_format):
    z = torch.randn(2, 6, 2, 3, dtype=torch.float64).contiguous(memory_format=memory_format).requires_grad_()
    assert torch.autograd.gradcheck(modulus, z)
    assert torch.autograd.gradgradcheck(modulus, z)


def test_gradient_has_the_memory_format_of_the_map():
    z = torch.randn(2, 6, 4, 5).contiguous(memory_format=torch.channels_last).requires_grad_()
    (grad,) = torch.autograd.grad(modulus(z).sum(), z)
    assert grad.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")  # of torch's own modules
def test_tangents_are_carried_forward():
    z, tangent = complex_map([0.0, 3.0, -1.0], [0.0, 4.0, 0.0]), complex_map([7.0, 10.0, 2.0], [5.0, 5.0, 1.0])
    expected = torch.tensor([[0.0, 10.0, -2.0]]).T.double()
    with forward_ad.dual_level():
        out = modulus(forward_ad.make_dual(z, tangent))
        assert_close("tangent", forward_ad.unpack_dual(out).tangent, expected)
    _, by_transform = torch.func.jvp(modulus, (z,), (tangent,))
    assert_close("torch.func", by_transform, expected)


def test_squares_hold_what_the_docstring_says():
    z = complex_map([3e18], [4e18], torch.float32).requires_grad_()
    out = modulus(z)
    assert_close("modulus", out, torch.tensor([[5e18]]), (0, 1e-6))
    assert_close("gradient", torch.autograd.grad(out, z)[0], torch.tensor([[0.6, 0.8]]))
    assert modulus(complex_map([3e19], [4e19], torch.float32)).isinf().all()


@pytest.mark.parametrize("function", [modulus, lambda z: root(energy(z))], ids=["modulus", "energy"])
def test_parts_of_a_batch_are_as_the_whole(function, monkeypatch):
    """Also second derivatives and batches of gradients, which take another way."""
    z = torch.randn(5, 6, 4, 3).requires_grad_()
    upstream = torch.randn(5, 3, 4, 3)
    out = function(z)
    whole = torch.autograd.grad(out, z, upstream, create_graph=True)[0]
    monkeypatch.setattr("mixpool.ops.modulus.PART_BYTES", 2 * z[0].numel() * 4)
    assert torch.equal(function(z), out)
    assert_close("gradient", torch.autograd.grad(function(z), z, upstream)[0], whole)
    (batched,) = torch.autograd.grad(function(z), z, torch.stack([upstream, 2 * upstream]), is_grads_batched=True)
    assert_close("batched", batched, torch.stack([whole, 2 * whole]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_keep_the_dtype(dtype):
    z = torch.randn(8, 2, dtype=dtype).requires_grad_()
    upstream = torch.randn(8, 1)
    (grad,) = torch.autograd.grad(modulus(z), z, upstream)
    wanted = upstream.double() * z.double() / torch.hypot(*z.double().chunk(2, dim=1))
    assert grad.dtype == dtype
    assert_close("gradient", grad, wanted.to(dtype))


# --- energy and its root ----------------------------------------------------------------------------------------------


def root_of_energy(z: Tensor) -> Tensor:
    return root(energy(z))


def test_energy_by_hand():
    z = complex_map([3.0, 0.0, -5.0], [4.0, 0.0, 12.0]).requires_grad_()
    out = energy(z)
    assert_close("energy", out, torch.tensor([[25.0, 0.0, 169.0]]).T)
    (grad,) = torch.autograd.grad(out, z, torch.tensor([[1.0, 7.0, 0.5]]).T.double())
    assert_close("gradient", grad, complex_map([6.0, 0.0, -5.0], [8.0, 0.0, 12.0]))
    assert_close("root", root(out), modulus(z).detach())


@pytest.mark.parametrize("function", [energy, root_of_energy])
def test_energy_has_derivatives_of_both_orders(function):
    z = torch.randn(2, 6, 2, 3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(function, z, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, z)


def test_the_root_has_derivative_zero_at_zero():
    values = torch.tensor([[0.0, 4.0, 0.25]]).requires_grad_()
    upstream = torch.tensor([[5.0, 8.0, 1.0]])
    (grad,) = torch.autograd.grad(root(values), values, upstream)
    assert_close("gradient", grad, torch.tensor([[0.0, 2.0, 1.0]]))
    by_transform = torch.func.grad(lambda v: (root(v) * upstream).sum())(values.detach())
    assert_close("torch.func", by_transform, grad)


@pytest.mark.parametrize("function", [modulus, root_of_energy])
@pytest.mark.parametrize("transformed", [False, True])
def test_nothing_is_divided_by_a_tiny_number(function, transformed):
    """Gradients are those of the modulus down to 1e-19 in float32, and smaller from there on."""
    for size in (1.0, 1e-10, 1e-18, 1e-25, 1e-38, 1e-42):
        z = torch.tensor([[3 * size, 4 * size]])
        if transformed:
            grad = torch.func.grad(lambda z: (function(z) * 1e6).sum())(z)
        else:
            (grad,) = torch.autograd.grad(function(z.requires_grad_()), z, torch.tensor([[1e6]]))
        expected = torch.tensor([[0.6e6, 0.8e6]]) if size > 1e-19 else torch.zeros(1, 2)
        assert_close(f"gradient at {size}", grad, expected, (10.0, 1e-3))
