"""How an operation finds out in which mode it runs, and how it steps out of a mode."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mixpool.ops.modes import (
    compute_dtype,
    in_functorch,
    is_compiled_for_one_size,
    is_eager,
    needs_gradient,
    of_nobody,
    widened,
    without_autocast,
)

IGNORE_JIT = pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning", "ignore:.torch.jit:DeprecationWarning")


@pytest.fixture(autouse=True)
def fresh_compiler():
    yield
    torch.compiler.reset()


def marked(question):
    """A function of a tensor that adds 1 where the answer is yes."""
    return lambda x: x + (1 if question(x) else 0)


# --- one by one, compiled, transformed --------------------------------------------------------------------------------


@IGNORE_JIT
def test_eager_is_what_is_neither_compiled_nor_traced_nor_transformed():
    function, x = marked(lambda _: is_eager()), torch.zeros(2, 3)
    assert (function(x) == 1).all()
    with torch.no_grad(), torch.inference_mode():
        assert (function(x) == 1).all()
    assert (torch.compile(function, backend="eager", fullgraph=True)(x) == 0).all()
    assert (torch.jit.trace(function, x, check_trace=False)(x) == 0).all()
    assert (torch.vmap(function)(x) == 0).all()


def test_transformations_of_torch_func():
    function, x = marked(lambda _: in_functorch()), torch.zeros(2, 3)
    assert (function(x) == 0).all() and (torch.vmap(function)(x) == 1).all()
    seen = []
    torch.func.grad(lambda x: (seen.append(in_functorch()), x.sum())[1])(x)
    assert seen == [True] and not in_functorch()


def test_compiled_for_one_size():
    function, x = marked(is_compiled_for_one_size), torch.zeros(2, 3, 4, 5)
    assert (function(x) == 0).all(), "eager"
    assert (torch.compile(function, backend="eager", fullgraph=True, dynamic=False)(x) == 1).all()
    torch.compiler.reset()
    assert (torch.compile(function, backend="eager", fullgraph=True, dynamic=True)(x) == 0).all()


def test_a_second_size_makes_a_graph_for_many():
    """torch.compile's default: the first graph is for one size, the next one is not."""
    compiled = torch.compile(marked(is_compiled_for_one_size), backend="eager", fullgraph=True)
    assert (compiled(torch.zeros(2, 3, 4, 5)) == 1).all()
    assert (compiled(torch.zeros(6, 3, 4, 5)) == 0).all()


def test_an_exported_graph_is_for_other_sizes_too():
    class Marked(nn.Module):
        def forward(self, x):
            return marked(is_compiled_for_one_size)(x)

    x = torch.zeros(2, 3, 4, 5)
    for strict in (False, True):
        assert (torch.export.export(Marked(), (x,), strict=strict).module()(x) == 0).all()


# --- dtypes -----------------------------------------------------------------------------------------------------------


def test_sums_are_not_rounded_by_autocast():
    x = torch.randn(3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16
        with without_autocast(x):
            assert (x @ x).dtype == torch.float32
        with without_autocast(torch.empty(2, device="meta")):  # which autocast does not know
            pass


def test_half_types_are_widened_and_no_others():
    for dtype in (torch.float16, torch.bfloat16):
        assert widened(torch.ones(2, dtype=dtype)).dtype == torch.float32
    for dtype in (torch.float32, torch.float64):
        x = torch.ones(2, dtype=dtype)
        assert widened(x) is x


def test_the_dtype_of_the_products():
    for dtype in (torch.float32, torch.float64, torch.float16):
        assert compute_dtype(torch.ones(1, dtype=dtype)) == dtype
    with torch.autocast("cpu", torch.bfloat16):
        assert compute_dtype(torch.ones(1)) == torch.bfloat16
        with torch.autocast("cpu", enabled=False):
            assert compute_dtype(torch.ones(1)) == torch.float32


# --- gradients --------------------------------------------------------------------------------------------------------


def test_whether_autograd_records():
    plain, parameter = torch.ones(1), torch.ones(1, requires_grad=True)
    assert needs_gradient(None, plain, parameter)
    assert not needs_gradient(None, plain) and not needs_gradient()
    with torch.no_grad():
        assert not needs_gradient(parameter)
    with torch.inference_mode():
        assert not needs_gradient(parameter)


# --- nobody's mode ----------------------------------------------------------------------------------------------------


def test_what_is_made_in_nobodys_mode_is_an_ordinary_tensor():
    def made():
        eye, ones = torch.eye(2), torch.ones(2, 2)
        return eye @ ones

    parameter = torch.ones(2, 2, requires_grad=True)
    for caller in (
        torch.inference_mode(),
        torch.device("meta"),
        torch.autocast("cpu", torch.bfloat16),
        torch.enable_grad(),
    ):
        with caller:
            with of_nobody():
                own = made()
                assert not (own * parameter).requires_grad
        assert own.device.type == "cpu" and own.dtype == torch.float32 and not own.is_inference(), caller
        (own * parameter).sum().backward()  # saves it
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def test_the_callers_mode_comes_back():
    with torch.inference_mode(), torch.device("meta"), torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(KeyError), of_nobody():
            raise KeyError
        assert torch.is_inference_mode_enabled() and torch.empty(1).is_meta and torch.is_autocast_enabled("cpu")


def test_it_decorates_a_function():
    @of_nobody()
    def one():
        return torch.ones(1)

    with torch.device("meta"):
        assert not one().is_meta and not one().is_meta, "more than once"
