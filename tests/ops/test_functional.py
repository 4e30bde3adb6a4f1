"""`mixpool2d` against the definition of support.py, numbers worked by hand, and finite differences."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import ALL_MAX, ALL_MODULUS, EVERY, MIXED, PLANS, assert_close, definition, plan_of, pooled_length
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mixpool import MixPoolStem, analytic_partner, convert, mixpool2d
from mixpool.ops.geometry import PoolGeometry, memory_format_of
from mixpool.ops.modulus import modulus
from mixpool.ops.moments import modulus_moments
from mixpool.ops.reference import POOLINGS, Pooled, Pooling


def random_problem(plan=MIXED, size=(17, 14), images=2, kernel=(5, 4), dtype=torch.float64, in_channels=3, **geometry):
    """(x, weight) and the keywords of `mixpool2d`, without act: all optional tensors, scales of both signs and 0."""
    channels = len(plan)
    x = torch.randn(images, in_channels, *size, dtype=torch.float64)
    weight, weight_imag = torch.randn(2, channels, in_channels, *kernel, dtype=torch.float64)
    weight, weight_imag = (w / math.sqrt(in_channels * math.prod(kernel)) for w in (weight, weight_imag))
    bias, scale, shift = torch.randn(3, channels, dtype=torch.float64)
    scale[channels // 2] = 0
    scale[0], scale[-1] = -scale[0].abs(), scale[-1].abs()
    tensors = {"bias": bias, "weight_imag": weight_imag, "scale": scale, "shift": shift + 0.3}
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    defaults = {"conv_stride": (2, 2), "conv_padding": (2, 2), "pool_padding": (1, 1)}
    return (x.to(dtype), weight.to(dtype)), {**tensors, "pooling": plan, **defaults, **geometry}


# --- by hand ----------------------------------------------------------------------------------------------------------


def test_ramp_by_hand():
    """6x6 ramp 6 i + j, kernel 3 + 4i of one tap: W x = 3 x and |(W + iV) x| = 5 x. Window 3, stride 2, padding 1."""
    ramp = torch.arange(36.0, dtype=torch.float64).reshape(1, 1, 6, 6)
    three, four = (torch.full((1, 1, 1, 1), value, dtype=torch.float64) for value in (3.0, 4.0))

    def pool(pooling):
        return mixpool2d(ramp, three, weight_imag=four, pooling=pooling, pool_padding=1)[0, 0]

    # windows {0, 1}, {1, 2, 3}, {3, 4, 5} in both axes
    expected = 3 * torch.tensor([[7, 9, 11], [19, 21, 23], [31, 33, 35]])
    assert_close("max", pool("max"), expected)
    expected = 5 * torch.tensor([[0, 2, 4], [12, 14, 16], [24, 26, 28]])
    assert_close("modulus at the centres", pool("cmod"), expected)
    # means {0, 1} with 2 : 1 -> 1/3, then 2 and 4
    expected = 5 * torch.tensor([[7 / 3, 4, 6], [37 / 3, 14, 16], [73 / 3, 26, 28]], dtype=torch.float64)
    expected[0, 1:] = 5 * torch.tensor([2 + 2, 2 + 4])  # row 1/3 of the ramp is 6/3 + j
    assert_close("binomial modulus", pool("modulus"), expected)
    # mean squares of the ramp: E[(6 i + j)^2] over independent i and j; at the centre (2, 2) 14^2 + (36 + 1) / 2
    assert_close("energy", pool("energy")[1, 1], 5 * torch.tensor(14.0**2 + 37 / 2, dtype=torch.float64).sqrt())
    # at the corner i, j = 0, 0, 1: 0, 1, 36, 49 with weights 4, 2, 2, 1 of 9
    assert_close(
        "energy at the corner", pool("energy")[0, 0], 5 * torch.tensor((2 + 72 + 49) / 9, dtype=torch.float64).sqrt()
    )


def test_row_by_hand():
    """Rows 3 0 0 4 5 12, kernel [1 0] + i [0 1] at stride 2 along x: z = 3, 4i, 5 + 12i; the modulus takes |scale|."""
    x = torch.tensor([3.0, 0, 0, 4, 5, 12], dtype=torch.float64).expand(1, 1, 6, 6)
    weight, weight_imag = torch.tensor([[[[1.0, 0]]], [[[0, 1.0]]]], dtype=torch.float64).split(1)
    geometry = {"conv_stride": (1, 2), "pool_padding": 1}

    def row(pooling, scale=1.0, shift=0.0):
        scale, shift = (torch.tensor([v], dtype=torch.float64) for v in (scale, shift))
        options = {"pooling": pooling, "weight_imag": weight_imag, "scale": scale, "shift": shift}
        out = mixpool2d(x, weight, **options, **geometry)
        assert out.shape == (1, 1, 3, 2) and (out == out[:, :, :1]).all()
        return out[0, 0, 0]

    # real part 3 0 5, modulus 3 4 13; windows {0, 1} and {1, 2}
    assert_close("max", row("max"), torch.tensor([3, 5]))
    assert_close("max, scale -1, shift 4", row("max", -1.0, 4.0), torch.tensor([4, 4]))
    assert_close("max, scale 0", row("max", 0.0, 4.0), torch.tensor([4, 4]))
    assert_close("max, relu", row("max", 1.0, -4.0), torch.tensor([0, 1]))
    assert_close("BlurPool", row("blurpool"), torch.tensor([4, 5]))  # maxima 3 5 5: (6+10)/4, (10+10)/4
    assert_close("modulus, centres", row("cmod"), torch.tensor([3, 13]))
    assert_close("modulus", row("modulus"), torch.tensor([10 / 3, 10]).double(), (1e-6, 0))  # (2 3 + 4)/3, (4 + 2 13)/3
    squares = torch.tensor([(2 * 9 + 16) / 3, (16 + 2 * 169) / 3], dtype=torch.float64)
    assert_close("energy", row("energy"), squares.sqrt())
    assert_close("modulus, scale -2, shift -7", row("modulus", -2.0, -7.0), torch.tensor([0, 13]))


# --- against the definition -------------------------------------------------------------------------------------------


class Case(NamedTuple):
    plan: tuple[str, ...]
    images: int
    size: tuple[int, int]
    kernel: tuple[int, int]
    geometry: dict
    act: str


ACTIVATIONS = {
    "relu": (F.relu, lambda v: np.maximum(v, 0.0)),
    "identity": (lambda v: v, lambda v: v),
    "leaky": (lambda v: F.leaky_relu(v, 0.1), lambda v: np.where(v < 0, 0.1 * v, v)),
}


DROPPED = {
    "all": (),
    "none": ("bias", "scale", "shift"),
    "scale only": ("bias", "shift"),
    "bias only": ("scale", "shift"),
}


@st.composite
def cases(draw) -> Case:
    def two(values):
        return draw(st.tuples(values, values))

    geometry = {
        "conv_stride": two(st.integers(1, 4)),
        "conv_padding": two(st.integers(0, 3)),
        "conv_dilation": two(st.sampled_from((1, 1, 2))),
        "pool_size": two(st.sampled_from((2, 3))),
        "pool_stride": two(st.integers(1, 3)),
        "pool_padding": two(st.integers(0, 1)),
        "ceil_mode": draw(st.booleans()),
    }
    kernel = two(st.integers(1, 5))
    smallest = [  # that leaves a map on which one window fits
        max(1, dilation * (taps - 1) + 1 + stride * (max(1, window - 2 * pool_padding) - 1) - 2 * padding)
        for taps, stride, padding, dilation, window, pool_padding in zip(
            kernel,
            *(geometry[k] for k in ("conv_stride", "conv_padding", "conv_dilation", "pool_size", "pool_padding")),
        )
    ]
    size = tuple(draw(st.integers(least, least + 11)) for least in smallest)
    return Case(
        plan=draw(st.lists(st.sampled_from(tuple(POOLINGS)), min_size=3, max_size=3).map(tuple)),
        images=draw(st.sampled_from((1, 1, 2, 0))),
        size=size,
        kernel=kernel,
        geometry=geometry,
        act=draw(st.sampled_from(sorted(ACTIVATIONS))),
    )


@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases(), seed=st.integers(0, 2**20), optional=st.sampled_from(sorted(DROPPED)))
def test_mixpool2d_is_the_definition(case: Case, seed: int, optional: str):
    torch.manual_seed(seed)
    arguments, options = random_problem(case.plan, case.size, case.images, case.kernel, **case.geometry)
    options = {name: value for name, value in options.items() if name not in DROPPED[optional]}
    act, act_of_arrays = ACTIVATIONS[case.act]
    expected = definition(*arguments, **options, act=act_of_arrays)
    out = mixpool2d(*arguments, **options, act=act)
    assert_close("output", out, expected)


def test_the_definition_agrees_with_torch_on_max_pooling():
    """The loops of support.py are held against torch once, so that both cannot be wrong together."""
    for ceil_mode in (False, True):
        arguments, options = random_problem(ALL_MAX, ceil_mode=ceil_mode, pool_padding=(1, 0), conv_stride=(1, 2))
        x, weight = arguments
        y = F.conv2d(x, weight, options["bias"], (1, 2), (2, 2))
        y = F.relu(y * options["scale"][:, None, None] + options["shift"][:, None, None])
        expected = F.max_pool2d(y, 3, 2, (1, 0), ceil_mode=ceil_mode)
        assert_close("definition", torch.from_numpy(definition(*arguments, **options)), expected)


def test_positions_outside_the_map_count_for_nothing():
    """A map of negative values: zeros from padding would win the maxima, and would lower the means."""
    x, weight = torch.ones(1, 1, 9, 9), torch.full((2, 1, 1, 1), -2.0)
    for ceil_mode in (False, True):
        for padding in (0, 1):
            out = mixpool2d(
                x,
                weight,
                pooling=["max", "modulus"],
                weight_imag=torch.zeros_like(weight),
                act=lambda v: v,
                pool_padding=padding,
                ceil_mode=ceil_mode,
            )
            assert_close("max", out[:, 0], torch.full_like(out[:, 0], -2.0), (0, 0))
            assert_close("modulus", out[:, 1], torch.full_like(out[:, 1], 2.0), (0, 1e-6))


def test_numbers_stand_for_pairs_and_defaults_are_those_of_the_signature():
    x, weight = torch.randn(1, 2, 20, 20), torch.randn(2, 2, 3, 3)
    options = {"pooling": ["modulus", "max"], "weight_imag": torch.randn_like(weight)}
    pairs = mixpool2d(
        x, weight, **options, conv_stride=(2, 2), conv_padding=(1, 1), pool_padding=(1, 1), pool_size=(2, 2)
    )
    numbers = mixpool2d(x, weight, **options, conv_stride=2, conv_padding=1, pool_padding=1, pool_size=2)
    assert_close("numbers", numbers, pairs, (0, 0))
    assert_close("defaults", mixpool2d(x, weight, **options), definition(x, weight, **options))


def test_the_default_imaginary_part_is_the_analytic_partner():
    x, weight = torch.randn(2, 3, 24, 22, dtype=torch.float64), torch.randn(7, 3, 5, 5, dtype=torch.float64)
    scale = torch.randn(7, dtype=torch.float64)
    partner = analytic_partner(weight)
    expected = definition(x, weight, pooling=MIXED, weight_imag=partner, scale=scale, conv_stride=(2, 2))
    assert_close("output", mixpool2d(x, weight, pooling=MIXED, scale=scale, conv_stride=2), expected)


def test_an_image_shifted_by_the_total_stride_shifts_the_interior_of_the_output():
    (x, weight), options = random_problem(EVERY, (40, 41), conv_stride=(2, 2))
    out, moved = (mixpool2d(image, weight, **options) for image in (x, x.roll((4, 8), dims=(2, 3))))
    assert_close("interior", moved[..., 4:-3, 5:-3], out[..., 3:-4, 3:-5])


# --- derivatives ------------------------------------------------------------------------------------------------------

GRADIENT_CASES = {
    "all-max": (ALL_MAX, {}),
    "blurpool": (("blurpool",) * 4, {}),
    "cmod": (("cmod",) * 4, {}),
    "modulus": (ALL_MODULUS, {}),
    "energy": (("energy",) * 4, {}),
    "cmod and blurpool": (plan_of("cmod", "blurpool"), {"pool_padding": (0, 0), "ceil_mode": True}),
    "modulus and max": (MIXED, {"pool_padding": (0, 1), "ceil_mode": True}),
    "all five": (("energy", "cmod", "blurpool", "modulus", "max")[:4], {"ceil_mode": True}),
    "nearest centres": (plan_of("cmod"), {"pool_size": (2, 2), "pool_padding": (1, 1)}),
}


def as_function(arguments, options, act):
    """f(x, weight, bias, weight_imag, scale, shift) and its inputs as leaves, for gradcheck."""
    names = ("bias", "weight_imag", "scale", "shift")
    fixed = {name: value for name, value in options.items() if name not in names}

    def function(x, weight, *tensors):
        return mixpool2d(x, weight, **fixed, **dict(zip(names, tensors)), act=act)

    return function, tuple(t.clone().requires_grad_() for t in (*arguments, *(options[name] for name in names)))


@pytest.mark.parametrize("case", GRADIENT_CASES.values(), ids=GRADIENT_CASES)
def test_gradients(case):
    plan, geometry = case
    arguments, options = random_problem(plan[:4], (7, 6), 1, (2, 3), in_channels=2, **geometry)
    options["scale"] = torch.tensor([-0.8, 1.1, 0.6, -1.3], dtype=torch.float64)  # |a| has a kink at 0
    assert torch.autograd.gradcheck(*as_function(arguments, options, F.relu))


@pytest.mark.parametrize("pooling", ["modulus", "energy"])
def test_second_derivatives(pooling):
    arguments, options = random_problem((pooling, "max"), (6, 5), 1, (2, 2), in_channels=1, conv_padding=(1, 1))
    options["scale"] = torch.tensor([-0.8, 1.1], dtype=torch.float64)
    assert torch.autograd.gradgradcheck(*as_function(arguments, options, torch.tanh))


@pytest.mark.parametrize("pooling", ["cmod", "modulus", "energy"])
def test_gradients_on_black_patches(pooling):
    """Where z = 0 the derivative is 0, the symmetric difference quotient of the modulus there, so gradcheck applies."""
    (x, weight), options = random_problem((pooling,) * 2, (12, 11), 1, (3, 3), in_channels=1)
    x[..., :9, :9] = 0
    fixed = {name: value for name, value in options.items() if name != "weight_imag"}

    def function(x, weight, weight_imag):
        return mixpool2d(x, weight, weight_imag=weight_imag, **fixed, act=torch.tanh)

    inputs = tuple(t.requires_grad_() for t in (x, weight, options["weight_imag"]))
    assert torch.autograd.gradcheck(function, inputs)
    out = function(*inputs)
    grad_x, grad_weight, _ = torch.autograd.grad(out, inputs, torch.randn_like(out))
    assert grad_weight.abs().max() > 0
    assert not grad_x[..., :4, :4].any(), "the derivative of the modulus at 0 is 0"
    assert grad_x[..., 9:, 9:].abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("image", ["black", "constant"])
@pytest.mark.parametrize("pooling", ["cmod", "modulus", "energy"])
def test_gradients_of_black_and_constant_images_are_finite(image, pooling, dtype):
    """Kernels of integers that sum to 0: a constant image gives z = 0 exactly, but for the padded border."""
    weight = torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]]).expand(2, 3, 3, 3).to(dtype).contiguous()
    x = torch.full((1, 3, 12, 12), 0.0 if image == "black" else 0.5, dtype=dtype)
    inputs = [t.requires_grad_() for t in (x, weight, weight.mT.clone(), torch.ones(2, dtype=dtype))]
    out = mixpool2d(*inputs[:2], pooling=[pooling, "max"], weight_imag=inputs[2], scale=inputs[3])
    assert not out.any()
    grads = torch.autograd.grad(out, inputs, torch.randn_like(out))
    assert all(torch.isfinite(grad).all() for grad in grads)
    assert not grads[1][0].any() and not grads[2].any(), "no gradient where the modulus is 0"
    if image == "constant":
        tied = torch.autograd.grad(mixpool2d(*inputs[:2], pooling=pooling), inputs[:2], torch.randn_like(out))
        assert all(torch.isfinite(grad).all() for grad in tied)


# --- precision, layouts, sizes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_precision_of_output_and_gradients(plan, dtype):
    """Output against the definition, gradients against float64, on numbers that the dtype can hold."""
    arguments, options = random_problem(plan, (22, 19), 2, (7, 7), conv_padding=(3, 3), dtype=dtype)
    out = mixpool2d(*arguments, **options)
    assert out.dtype == dtype
    assert_close("output", out, definition(*arguments, **options))

    upstream = torch.randn(out.shape, dtype=torch.float64).to(dtype)
    grads = {}
    for wide in (dtype, torch.float64):
        function, inputs = as_function(
            [t.to(wide) for t in arguments],
            {name: value.to(wide) if isinstance(value, torch.Tensor) else value for name, value in options.items()},
            torch.sigmoid,  # no kink, so that rounding moves no gradient
        )
        grads[wide] = torch.autograd.grad(function(*inputs), inputs, upstream.to(wide), materialize_grads=True)
    names = ("x", "weight", "bias", "weight_imag", "scale", "shift")
    for name, grad, truth in zip(names, grads[dtype], grads[torch.float64]):
        # In the norm: because rounding may choose another position of a window for its maximum.
        limit = {torch.float32: 1e-5, torch.float16: 0.03, torch.bfloat16: 0.15}[dtype]
        error = (grad.double() - truth).norm()
        assert error <= limit * truth.norm(), f"gradient of {name}: error {error:.3g}, norm {truth.norm():.3g}"


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_autocast(plan):
    arguments, options = random_problem(plan, (22, 19), 2, (7, 7), conv_padding=(3, 3), dtype=torch.float32)
    expected = definition(*arguments, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = mixpool2d(*arguments, **options)
    assert out.dtype == torch.bfloat16
    assert_close("output", out, expected)


LAYOUTS = {
    "contiguous": (lambda x: x, torch.contiguous_format),
    "channels_last": (lambda x: x.contiguous(memory_format=torch.channels_last), torch.channels_last),
    "crop": (lambda x: F.pad(x, (3, 2, 1, 4))[..., 1:-4, 3:-2], torch.contiguous_format),
    "crop of channels_last": (
        lambda x: F.pad(x, (3, 2, 1, 4)).contiguous(memory_format=torch.channels_last)[..., 1:-4, 3:-2],
        torch.channels_last,
    ),
    "every second image": (lambda x: x.repeat_interleave(2, dim=0)[::2], torch.contiguous_format),
    "three of five channels": (lambda x: torch.cat([x[:, :2], x], dim=1)[:, 2:], torch.contiguous_format),
}


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(layout, plan):
    rearrange, memory_format = layout
    (x, weight), options = random_problem(plan, (20, 17), dtype=torch.float32)
    rearranged = rearrange(x)
    assert torch.equal(rearranged, x)
    before = rearranged.clone()
    assert memory_format_of(rearranged) == memory_format
    out = mixpool2d(rearranged, weight, **options)
    assert out.is_contiguous(memory_format=memory_format)
    assert_close("output", out, definition(x, weight, **options))
    assert torch.equal(rearranged, before), "the input was changed"


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_an_empty_batch(plan):
    (x, weight), options = random_problem(plan, (20, 17), 0)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    out = mixpool2d(x, weight, **options)
    assert out.shape == (0, 7, 5, 5)
    grad_x, grad_weight = torch.autograd.grad(out, (x, weight), torch.randn_like(out))
    assert grad_x.shape == x.shape and not grad_weight.any()


def test_cmod_convolves_at_the_total_stride():
    (x, weight), options = random_problem(("cmod",) * 7, (64, 60), 1, (7, 7), dtype=torch.float32, conv_padding=(3, 3))
    with FlopCounterMode(display=False) as counter:
        out = mixpool2d(x, weight, **options)
    assert counter.get_total_flops() == 2 * 2 * out.numel() * weight[0].numel()  # W and V, multiply and add


# --- errors -----------------------------------------------------------------------------------------------------------

ERRORS = {
    "3-D image": (lambda a: a.update(x=torch.randn(3, 9, 9)), r"expected x \(N, C, H, W\)"),
    "other channels": (lambda a: a.update(x=torch.randn(1, 4, 9, 9)), r"x\.shape=torch\.Size\(\[1, 4, 9, 9\]\)"),
    "2-D weight": (lambda a: a.update(weight=torch.randn(2, 3)), "expected x"),
    "names too few": (lambda a: a.update(pooling=["max"]), "expected 2 poolings, one per output channel, got 1"),
    "booleans": (lambda a: a.update(pooling=[True, False]), "expected poolings of .*, got True"),
    "imaginary part": (lambda a: a.update(weight_imag=torch.randn(1, 3, 3, 3)), "expected weight_imag of the shape"),
    "bias": (lambda a: a.update(bias=torch.randn(3)), r"expected bias of shape \(2,\), got \(3,\)"),
    "scale": (lambda a: a.update(scale=torch.randn(2, 1)), r"expected scale of shape \(2,\), got \(2, 1\)"),
    "shift": (lambda a: a.update(shift=torch.tensor(1.0)), r"expected shift of shape \(2,\), got \(\)"),
    "window of 4": (lambda a: a.update(pool_size=4), r"expected a pooling window of 2 or 3, got \(4, 4\)"),
    "padding": (lambda a: a.update(pool_padding=2), "expected a pooling padding from 0 to half the window"),
    "negative padding": (lambda a: a.update(pool_padding=-1), "expected a pooling padding"),
    "pooling stride": (lambda a: a.update(pool_stride=0), "expected a positive pooling stride"),
    "triple": (lambda a: a.update(conv_stride=(1, 2, 3)), "expected one integer or a pair of them, got"),
    "pooling": (lambda a: a.update(pooling="median"), "expected poolings of .*'energy'.*, got 'median'"),
}


@pytest.mark.parametrize("change, message", ERRORS.values(), ids=ERRORS)
def test_errors(change, message):
    arguments = {"x": torch.randn(1, 3, 9, 9), "weight": torch.randn(2, 3, 3, 3), "pooling": ["modulus", "max"]}
    mixpool2d(**arguments)
    change(arguments)
    with pytest.raises(ValueError, match=message):
        mixpool2d(**arguments)


def test_the_docstring_example():
    out = mixpool2d(
        torch.randn(2, 3, 32, 32),
        torch.randn(4, 3, 7, 7),
        pooling=["modulus", "max"] * 2,
        conv_stride=2,
        conv_padding=3,
    )
    assert out.shape == (2, 4, *(pooled_length(16, 3, 2, 0, False),) * 2)
    assert out.shape == nn.Sequential(nn.Conv2d(3, 4, 7, 2, 3), nn.MaxPool2d(3, 2))(torch.randn(2, 3, 32, 32)).shape


@pytest.mark.parametrize(
    "old, now",
    [
        ({"is_modulus": [True]}, r'pooling=\["max", "modulus", ...\]'),
        ({"blur": 1}, 'pooling="cmod"'),
        ({"blur": 3}, 'pooling="modulus"'),
        ({"max_blur": 3}, r'pooling=\["blurpool", ...\]'),
        ({"max_blur": 1}, r'pooling=\["max", ...\]'),
        (
            {"is_modulus": [True], "blur": 1},
            r'pooling=\["max", "modulus", ...\], a name .*; instead of blur=1 write pooling="cmod"',
        ),
    ],
    ids=str,
)
def test_old_keywords_are_refused_with_the_new_spelling(old, now):
    with pytest.raises(TypeError, match=f"mixpool2d.. has no .* any more; instead of .* write {now}"):
        mixpool2d(torch.randn(1, 3, 9, 9), torch.randn(1, 3, 3, 3), **old)
    with pytest.raises(TypeError, match="unexpected keyword argument 'colour'"):
        mixpool2d(torch.randn(1, 3, 9, 9), torch.randn(1, 3, 3, 3), colour=1)


# --- a pooling of one's own -------------------------------------------------------------------------------------------


def test_a_pooling_with_a_wider_low_pass_is_one_function_and_one_entry(monkeypatch):
    """[1 4 6 4 1] / 16 twice, cut at the border: what it takes to try another low-pass."""

    def wide_modulus(z, pool: PoolGeometry, with_moments: bool) -> Pooled:
        envelope = modulus(z)
        tap = torch.tensor([1.0, 4, 6, 4, 1], dtype=envelope.dtype) / 16
        kernel = (tap[:, None] * tap).expand(envelope.shape[1], 1, 5, 5)
        padding = tuple(p + 1 for p in pool.padding)
        sums = [
            F.conv2d(v, kernel, None, pool.stride, padding, groups=envelope.shape[1])
            for v in (envelope, torch.ones_like(envelope))
        ]
        return Pooled(sums[0] / sums[1], modulus_moments(envelope) if with_moments else None)

    monkeypatch.setitem(POOLINGS, "wide_modulus", Pooling(is_complex=True, pool=wide_modulus))
    (x, weight), options = random_problem(("wide_modulus", "max"), (21, 21), 1, (3, 3))
    out = mixpool2d(x, weight, **options)
    z = [F.conv2d(x, w[:1], None, 2, 2) for w in (weight, options["weight_imag"])]
    envelope = torch.hypot(*z)[0, 0]
    tap = torch.tensor([1.0, 4, 6, 4, 1], dtype=torch.float64) / 16
    by_hand = (tap[:, None] * tap * envelope[2:7, 2:7]).sum()  # the window about (4, 4), output (2, 2)
    a, b = options["scale"][0].abs(), options["scale"][0] * options["bias"][0] + options["shift"][0]
    assert_close("centre", out[0, 0, 2, 2], (a * by_hand + b).relu())

    stem = MixPoolStem(nn.Conv2d(3, 4, 7, 2, 3), nn.BatchNorm2d(4), nn.ReLU(), pooling=["wide_modulus", "max"] * 2)
    assert stem.plan[:, 0].tolist() == [5, 0, 5, 0] and "2 wide_modulus" in repr(stem)
    stem(torch.randn(2, 3, 32, 32)).sum().backward()
    twin = MixPoolStem(nn.Conv2d(3, 4, 7, 2, 3), nn.BatchNorm2d(4), nn.ReLU())
    twin.load_state_dict(stem.state_dict())
    assert twin.poolings == ("wide_modulus", "max") * 2
    model = nn.Sequential(nn.Conv2d(3, 4, 7, 2, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    assert convert(model, select="all", pooling="wide_modulus").poolings == ("wide_modulus",) * 4


@pytest.mark.parametrize("pooling", ["cmod", "modulus", "energy"])
@pytest.mark.parametrize("decay", [1e-20, 1e-30, 1e-37, 1e-38, 1e-40, 1e-42, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_filters_that_have_decayed_have_finite_gradients(pooling, decay, dtype):
    x, weight = torch.randn(2, 3, 20, 20).to(dtype), torch.randn(4, 3, 7, 7)
    weight[0] *= decay
    weight = weight.to(dtype).requires_grad_()
    scale = torch.full((4,), 316.0, dtype=dtype)  # of a batch norm whose variance is 0
    out = mixpool2d(x, weight, pooling=pooling, scale=scale, act=lambda v: v)
    (grad,) = torch.autograd.grad(out, weight, torch.randn_like(out))
    assert torch.isfinite(out).all() and torch.isfinite(grad).all() and grad[1:].abs().amax() > 0
