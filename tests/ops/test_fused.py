"""The fused operators against float64: on a GPU where there is one, else in Triton's interpreter on the CPU.

Legend: N images, C channels, (H, W) pixels, k kernel side, m stride of the convolution, p its padding, pp the pool's.
"""

from __future__ import annotations

import copy
import importlib.util
import itertools
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from support import TOLERANCE, assert_close, assert_same_bits
from torch import Tensor, nn

from mixpool import MixPoolStem
from mixpool.ops import reference
from mixpool.ops.fused import blocks, groups, ops
from mixpool.ops.fused.geometry import COLUMNS, KINDS, Channels, StemGeometry, padded_places
from mixpool.ops.geometry import ConvGeometry, PoolGeometry
from mixpool.ops.merge import affine

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton"),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# On a GPU, float32 is multiplied as TF32, which the reference does not do here (conftest.py).
DTYPES = (torch.bfloat16, torch.float16) + (() if DEVICE == "cuda" else (torch.float32,))
ids = str


class Case(NamedTuple):
    name: str
    N: int
    C_in: int
    H: int
    W: int
    k: int
    m: int
    p: int
    pp: int
    ceil: bool
    plan: str  # of the channels: x max, o modulus
    channels_last: bool


CASES = [
    Case("resnet, odd sizes, mixed, one off a power of 2", 2, 3, 13, 22, 7, 2, 3, 1, False, "oxxooxo", True),
    Case("the same in NCHW", 2, 3, 13, 22, 7, 2, 3, 1, False, "oxxooxo", False),
    Case("resnet, all max", 2, 3, 18, 21, 7, 2, 3, 1, False, "xxxxxxx", True),
    Case("resnet, all modulus, one image", 1, 3, 21, 18, 7, 2, 3, 1, False, "ooooooo", False),
    Case("alexnet: windows at the border, rows that no window covers", 2, 3, 27, 24, 11, 4, 2, 0, False, "xo", True),
    Case("squeezenet: ceil_mode, windows hanging over", 2, 3, 24, 25, 7, 2, 0, 0, True, "oxo", True),
    Case("googlenet: padding of the convolution, ceil_mode of the pool", 2, 3, 22, 19, 7, 2, 3, 0, True, "xo", True),
    Case("squeezenet 1.1: kernel 3, ceil_mode", 2, 3, 16, 17, 3, 2, 0, 0, True, "oxx", False),
    Case("ceil_mode and padding", 2, 3, 14, 15, 3, 2, 1, 1, True, "xox", False),
    # 66 columns of cells in tiles of 64, 34 and 17 channels in groups of 32 and 16; and 16 cells in strips of 14.
    Case("several tiles and groups", 6, 3, 7, 21, 3, 1, 1, 1, False, "xox" * 17, True),
    Case("several tiles and strips in NCHW", 5, 1, 33, 29, 3, 1, 1, 0, False, "xo", False),
    Case("four channels, even kernel, much padding", 2, 4, 13, 16, 4, 4, 6, 1, False, "xo", True),
    Case("one channel in, stride 1, no padding", 2, 1, 9, 8, 5, 1, 0, 0, False, "oox", False),
    # One value per image and channel: of 3 images eager's rounding is too much a matter of luck to compare with.
    Case("an image as small as the kernel", 12, 3, 7, 8, 7, 2, 0, 1, False, "xo", True),
    Case("one pixel", 2, 3, 1, 1, 3, 1, 1, 1, False, "xo", True),
]
BY_NAME = {case.name: case for case in CASES}
SEVERAL, ONE_IN = BY_NAME["several tiles and groups"], BY_NAME["one channel in, stride 1, no padding"]


def name_of(value: object) -> str:
    return value.name if isinstance(value, Case) else str(value)


class Stem(NamedTuple):
    """Inputs of a pass, float32 values that fit into the dtype of the test."""

    x: Tensor
    weight: Tensor
    weight_imag: Tensor | None
    channels: Channels
    conv: ConvGeometry
    pool: PoolGeometry
    blur: int

    def leaves(self, dtype: torch.dtype) -> list[Tensor | None]:
        return [t if t is None else t.detach().to(dtype).requires_grad_() for t in self[:3]]


def channels_of(plan: str) -> Channels:
    return Channels(
        *(torch.tensor([i for i, own in enumerate(plan) if own == kind]).long().to(DEVICE) for kind in "xo")
    )


def stem_of(case: Case, blur: int, dtype: torch.dtype) -> Stem:
    channels = channels_of(case.plan)
    size = (case.C_in, case.k, case.k)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype).float().to(DEVICE)

    x = random(case.N, case.C_in, case.H, case.W)
    weight = random(len(case.plan), *size) / case.k
    imag = random(len(channels.modulus), *size) / case.k if len(channels.modulus) else None
    x, weight, imag = (t if t is None else t.to(dtype).float() for t in (x, weight, imag))
    if case.channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    pool = PoolGeometry(padding=(case.pp,) * 2, ceil_mode=case.ceil)
    return Stem(x, weight, imag, channels, ConvGeometry((case.m,) * 2, (case.p,) * 2), pool, blur)


def run_reference(stem: Stem, leaves: list[Tensor | None]) -> tuple[Tensor, Tensor]:
    """What ops.convolve_and_pool returns, in plain PyTorch."""
    x, weight, imag = leaves
    names = ("max", "cmod" if stem.blur == 1 else "modulus")
    own = [reference.Group(name, index) for name, index in zip(names, stem.channels) if len(index)]
    parts = reference.convolve_and_pool(x, weight, None, imag, own, stem.conv, stem.pool, with_moments=True)
    order = torch.cat(list(stem.channels)).argsort()
    out = torch.cat([part.values for part in parts], dim=1).index_select(1, order)
    moments = [torch.stack([part.moments.mean, part.moments.var]) for part in parts]
    return out, torch.cat(moments, dim=1).index_select(1, order)


def run_fused(stem: Stem, leaves: list[Tensor | None]) -> tuple[Tensor, Tensor]:
    return ops.convolve_and_pool(
        *leaves, stem.channels, stem.conv, stem.pool, blur=stem.blur, with_moments=True, dtype=leaves[0].dtype
    )


def training_pass(run, stem: Stem, dtype: torch.dtype, upstream: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    leaves = stem.leaves(dtype)
    out, moments = run(stem, leaves)
    torch.autograd.backward([out, moments], [upstream[0].to(out.dtype), upstream[1].to(moments.dtype)])
    names = ("gradient of x", "gradient of weight", "gradient of weight_imag")
    grads = {name: leaf.grad for name, leaf in zip(names, leaves) if leaf is not None}
    return {"output": out.detach(), "moments": moments.detach(), **grads}


def upstream_of(truth: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Random gradients; those of the moments large enough to matter, since they are spread over all positions."""
    out, moments = truth
    return torch.randn_like(out), torch.randn_like(moments) * out.numel() ** 0.5


def assert_as_good(actual: dict, eager: dict, truth: dict, dtype: torch.dtype) -> None:
    """flash-attention's criterion: at most twice the error of eager PyTorch in the same dtype, plus one rounding."""
    assert actual.keys() == eager.keys() == truth.keys()
    for name, true in truth.items():
        assert actual[name].dtype == eager[name].dtype, name
        assert actual[name].shape == true.shape, name
        size = true.abs().max().item()
        rounding = torch.finfo(actual[name].dtype).eps * size
        error, eager_error = ((values[name].double() - true).abs() for values in (actual, eager))
        assert torch.isfinite(error).all(), f"{name}: not finite or not written"
        worst = error.max().item()
        assert worst <= 2 * eager_error.max().item() + rounding, (
            f"{name}: worst at {tuple(int(i) for i in (error == worst).nonzero()[0])}: error {worst:.3g}, eager's "
            f"{eager_error.max():.3g}, rms {error.square().mean().sqrt():.3g} and "
            f"{eager_error.square().mean().sqrt():.3g}, largest value {size:.3g}"
        )
        rms, eager_rms = (e.square().mean().sqrt().item() for e in (error, eager_error))
        assert rms <= 2 * eager_rms + rounding, f"{name}: rms error {rms:.3g}, eager's {eager_rms:.3g}"
        atol, rtol = TOLERANCE[dtype]
        assert worst <= (atol + rtol) * max(size, 1.0), f"{name}: error {worst:.3g} of {size:.3g}"


def check(case: Case, blur: int, dtype: torch.dtype) -> None:
    stem = stem_of(case, blur, dtype)
    upstream = upstream_of(run_reference(stem, stem.leaves(torch.float64)))
    upstream = (upstream[0].to(dtype).double(), upstream[1].float().double())
    truth = training_pass(run_reference, stem, torch.float64, upstream)
    eager = training_pass(run_reference, stem, dtype, upstream)
    fused = training_pass(run_fused, stem, dtype, upstream)
    assert fused["output"].is_contiguous(
        memory_format=torch.channels_last if case.channels_last else torch.preserve_format
    )
    assert_as_good(fused, eager, truth, dtype)


def with_centers(case: Case) -> Case:
    """The case for blur=1, "cmod", which has kernels of its own: without max channels, whose kernels are the same."""
    return case if case is CASES[0] else case._replace(plan=case.plan.replace("x", ""))


# blur=1 is the reference's where a centre may lie outside of the map
RUNS = [(case, 3) for case in CASES] + [
    (with_centers(case), 1) for case in CASES if "o" in case.plan and not (case.ceil and case.pp == 1)
]


@pytest.mark.parametrize(("case", "blur"), RUNS, ids=[f"{case.name}-{blur}" for case, blur in RUNS])
def test_output_statistics_and_gradients(case, blur, interpret_bfloat16):
    check(case, blur, DTYPES[-1])


# A layout each, and the geometry is the same code in all dtypes.
@pytest.mark.parametrize("blur", (1, 3))
@pytest.mark.parametrize(
    ("case", "dtype"), list(zip(CASES, DTYPES[:2] if DEVICE == "cpu" else DTYPES[:1])), ids=name_of
)
def test_output_statistics_and_gradients_in_half_precision(case, dtype, blur, interpret_bfloat16):
    check(case, blur, dtype)


@pytest.fixture
def interpret_bfloat16(monkeypatch):
    """Triton's interpreter multiplies bfloat16 matrices as the integers that hold their bits: widen them first."""
    if DEVICE == "cuda":
        return
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    create_dot = interpreter.InterpreterBuilder.create_dot

    def widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_wide_dot(self, a, b, *others):
        return create_dot(self, widened(a), widened(b), *others)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_wide_dot)


@pytest.mark.parametrize("blur", (1, 3))
# The interpreter cuts float32 to bfloat16 where a GPU rounds.
@pytest.mark.parametrize("dtype", DTYPES[:2] if DEVICE == "cuda" else (torch.float16,), ids=ids)
def test_float32_images_and_filters_in_half_precision(dtype, blur, interpret_bfloat16):
    """As under autocast: the kernel reads float32 and rounds, as a cast in front would."""
    stem = stem_of(CASES[0], blur, torch.float32)
    leaves, rounded = stem.leaves(torch.float32), stem.leaves(dtype)
    arguments = (stem.channels, stem.conv, stem.pool)
    out, _ = ops.convolve_and_pool(*leaves, *arguments, blur=blur, dtype=dtype)
    expected, _ = ops.convolve_and_pool(*rounded, *arguments, blur=blur)
    assert out.dtype == dtype
    assert_same_bits("output", out, expected)
    upstream = torch.randn_like(out)
    out.backward(upstream)
    expected.backward(upstream)
    for leaf, other in zip(leaves, rounded):
        assert leaf.grad.dtype == torch.float32
        # because the gradient of a filter is rounded once more where the filter itself is in half precision
        assert_close("gradient", leaf.grad, other.grad.float(), (2e-2, 2e-2))


def test_gradients_of_a_pass_that_was_recorded_without(interpret_bfloat16):
    """As a graph that was exported from frozen parameters: no places of the maxima were kept."""
    stem, dtype = stem_of(CASES[0], 3, DTYPES[-1]), DTYPES[-1]
    geometry = (stem.conv.stride[0], stem.conv.padding[0], stem.pool.padding[0], stem.pool.ceil_mode, stem.blur)
    upstream = torch.randn(run_reference(stem, stem.leaves(torch.float64))[0].shape, device=DEVICE).to(dtype)

    def gradients(run, of: torch.dtype) -> dict[str, Tensor]:
        leaves = stem.leaves(of)
        run(leaves).backward(upstream.to(of))
        return {str(i): leaf.grad for i, leaf in enumerate(leaves) if leaf is not None}

    def fused(leaves):
        return torch.ops.mixpool.convolve_and_pool(*leaves, *stem.channels, *geometry, False, False, dtype)[0]

    def plain(leaves):
        return run_reference(stem, leaves)[0]

    assert_as_good(gradients(fused, dtype), gradients(plain, dtype), gradients(plain, torch.float64), dtype)


# --- hard images ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blur", (1, 3))
@pytest.mark.parametrize("value", (0.0, 1.5), ids=("black", "constant"))
def test_flat_images(value, blur, interpret_bfloat16):
    """Moduli of 0 have gradient 0, and of maxima that are equal the first one counts, as in torch (black images)."""
    stem, dtype = stem_of(CASES[0], blur, DTYPES[-1]), DTYPES[-1]
    stem.x.fill_(value)
    upstream = upstream_of(run_reference(stem, stem.leaves(torch.float64)))
    upstream = (upstream[0].to(dtype).double(), upstream[1] * 0)
    truth = training_pass(run_reference, stem, torch.float64, upstream)
    fused = training_pass(run_fused, stem, dtype, upstream)
    for name in truth:
        assert torch.isfinite(fused[name]).all(), name
    if value == 0:
        for name in ("output", "moments", "gradient of weight", "gradient of weight_imag"):
            assert (fused[name] == 0).all(), name
        max_only = stem.weight.index_select(0, stem.channels.max)
        expected = torch.zeros_like(truth["gradient of x"])
        # The gradient of a max channel's input at a tie: all of it goes to the window's first position on the map.
        y = F.conv2d(stem.x.double().requires_grad_(), max_only.double(), None, stem.conv.stride, stem.conv.padding)
        y_leaf = y.detach().requires_grad_()
        reference.max_pool(y_leaf, stem.pool).backward(upstream[0].index_select(1, stem.channels.max))
        expected = torch.nn.grad.conv2d_input(
            stem.x.shape, max_only.double(), y_leaf.grad, stem.conv.stride, stem.conv.padding
        )
        assert_close("gradient of x", fused["gradient of x"], expected, TOLERANCE[dtype])


@pytest.mark.parametrize("value", (float("nan"), float("inf")), ids=("nan", "inf"))
@pytest.mark.parametrize("blur", (1, 3))
def test_pixels_that_are_not_finite(value, blur, interpret_bfloat16):
    """No output loses them that has them in the reference, and few others get them."""
    stem, dtype = stem_of(CASES[2], blur, DTYPES[-1]), DTYPES[-1]
    stem = stem._replace(
        x=stem.x.clone(memory_format=torch.preserve_format),
        channels=channels_of("oxoxoxo"),
        weight_imag=torch.randn_like(stem.weight[:4]),
    )
    stem.x[0, 1, 6, 7] = value
    with torch.no_grad():
        fused, _ = ops.convolve_and_pool(*stem.leaves(dtype), *stem[3:6], blur=blur, dtype=dtype)
        expected, _ = run_reference(stem, stem.leaves(torch.float64))
    wrong, expected_wrong = ~fused.isfinite(), ~expected.isfinite()
    assert expected_wrong.any() and (wrong | ~expected_wrong).all(), "swallowed"
    # The taps of weight 0 beside a filter reach one window further: 0 * NaN is NaN.
    nearby = F.max_pool2d(expected_wrong.float(), (1, 3), 1, (0, 1)) > 0
    assert (nearby | ~wrong).all(), "spread"
    if value != value:
        out = training_pass(run_fused, stem, dtype, upstream_of(run_reference(stem, stem.leaves(dtype))))
        assert out["moments"][1].isnan().all(), "statistics of a batch with a NaN"


def test_strides_that_are_neither_layout():
    """One pixel in channels_last strides, and channels that overlap."""
    stem = stem_of(CASES[0], 3, DTYPES[-1])
    signal = torch.randn(2, 24, 16, device=DEVICE, dtype=DTYPES[-1])
    for x in (
        torch.randn(2, 1, 1, 3, device=DEVICE, dtype=DTYPES[-1]).permute(0, 3, 1, 2),
        signal.unfold(2, 3, 1).permute(0, 3, 1, 2),
    ):
        weight, imag = (t.to(DTYPES[-1]) for t in stem[1:3])
        outs = [
            ops.convolve_and_pool(images, weight, imag, *stem[3:6], blur=3, dtype=DTYPES[-1])[0]
            for images in (x, x.clone(memory_format=torch.contiguous_format))
        ]
        assert_close("output", outs[0], outs[1].double())


@pytest.mark.parametrize("channels_last", (True, False), ids=("channels_last", "NCHW"))
def test_a_crop_of_a_larger_image(channels_last, interpret_bfloat16):
    """Rows that lie apart in memory and a first pixel that is not aligned."""
    stem = stem_of(CASES[0]._replace(H=20, W=27, channels_last=channels_last), 3, DTYPES[-1])
    crop = stem._replace(x=stem.x[:, :, 3:17, 5:24])
    copy = stem._replace(
        x=crop.x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    )
    outs = []
    for images in (crop, copy):
        _, weight, imag = images.leaves(DTYPES[-1])
        x = images.x.to(DTYPES[-1]) if images is copy else stem.x.to(DTYPES[-1])[:, :, 3:17, 5:24]
        out, _ = ops.convolve_and_pool(x, weight, imag, *stem[3:6], blur=3)
        out.backward(torch.ones_like(out))
        outs.append((out.detach(), weight.grad, imag.grad))
    for name, a, b in zip(("output", "gradient of weight", "gradient of weight_imag"), *outs):
        assert_same_bits(name, a, b)


@pytest.mark.parametrize("offset", (0.0, 30.0, 300.0))
def test_statistics_about_a_large_mean(offset):
    """They lose nothing where images vary little about a large value; the first image is unlike the others."""
    stem = stem_of(CASES[0]._replace(p=0, plan="xxx"), 3, torch.float32)
    x = stem.x + offset
    x[0] *= 1.1
    stem = stem._replace(x=x)
    if DEVICE == "cuda":
        stem = stem._replace(x=x.to(DTYPES[0]).float(), weight=stem.weight.to(DTYPES[0]).float())
    dtype = DTYPES[0] if DEVICE == "cuda" else torch.float32
    with torch.no_grad():
        truth, actual, eager = (
            run(stem, stem.leaves(of))[1]
            for run, of in ((run_reference, torch.float64), (run_fused, dtype), (run_reference, dtype))
        )
    for name, row in {"mean": 0, "variance": 1}.items():
        error, eager_error = (((m[row] - truth[row]) / truth[row]).abs().max() for m in (actual, eager))
        assert error <= 2 * eager_error + 1e-5, f"{name}: relative error {error:.2g}, eager's {eager_error:.2g}"


# --- the poolings of a stem -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_bias", (True, False), ids=("bias", "no bias"))
def test_every_pooling_of_a_stem(with_bias):
    """Those that have a kernel and those that have none, each in its place, with gradients of all that was given."""
    own = reference.groups_of(("energy", "max", "blurpool", "modulus", "cmod", "max", "energy"), torch.device(DEVICE))
    geometry = (ConvGeometry((2, 2), (3, 3)), PoolGeometry(padding=(1, 1)))
    sizes = ((2, 3, 13, 22), (7, 3, 7, 7), (7,), (4, 3, 7, 7))
    tensors = [torch.randn(size) / size[-1] for size in sizes]
    results = []
    for compute, dtype in (
        (groups.convolve_and_pool, DTYPES[-1]),
        (reference.convolve_and_pool, DTYPES[-1]),
        (reference.convolve_and_pool, torch.float64),
    ):
        x, weight, bias, imag = (t.to(DTYPES[-1]).to(DEVICE, dtype, copy=True).requires_grad_() for t in tensors)
        parts = compute(x, weight, bias if with_bias else None, imag, own, *geometry, with_moments=True)
        result = {}
        for group, part in zip(own, parts, strict=True):
            result |= {f"{group.pooling}": part.values, f"variance of {group.pooling}": part.moments.var}
            result |= {f"mean of {group.pooling}": part.moments.mean}
            assert part.moments.count == 2 * (4 * 6 if group.pooling == "cmod" else 7 * 11), group.pooling
        sum(value.double().square().sum() for value in result.values()).backward()
        result |= {"gradient of x": x.grad, "gradient of weight": weight.grad, "gradient of imag": imag.grad}
        results.append({name: value.detach() for name, value in result.items()})
    fused, eager, truth = results
    assert_as_good(fused, eager, truth, DTYPES[-1])


# --- the operators' contract ------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("blur", (1, 3))
def test_two_runs_give_the_same_bits(blur):
    stem = stem_of(SEVERAL, blur, DTYPES[-1])
    upstream = upstream_of(run_reference(stem, stem.leaves(DTYPES[-1])))
    first, second = (training_pass(run_fused, stem, DTYPES[-1], upstream) for _ in range(2))
    for name in first:
        assert_same_bits(name, first[name], second[name])


def small_arguments(with_grad: bool) -> tuple:
    stem = stem_of(ONE_IN, 3, torch.float32)
    x, weight, imag = (t if t is None else t.detach().requires_grad_(with_grad) for t in stem[:3])
    geometry = (stem.conv.stride[0], stem.conv.padding[0], stem.pool.padding[0], stem.pool.ceil_mode, 3)
    return x, weight, imag, *stem.channels, *geometry, True, with_grad, torch.float32


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck reads it
@pytest.mark.parametrize("with_grad", (True, False), ids=("training", "inference"))
def test_opcheck_of_the_pooling(with_grad, monkeypatch):
    monkeypatch.undo()  # dynamo cannot trace the poisoned allocators
    torch.library.opcheck(torch.ops.mixpool.convolve_and_pool.default, small_arguments(with_grad))


def test_opcheck_of_the_backward_pass(monkeypatch):
    monkeypatch.undo()
    x, weight, imag, *rest = small_arguments(True)
    out, argmax, moments = (t.detach() for t in torch.ops.mixpool.convolve_and_pool(x, weight, imag, *rest))
    tensors = (torch.randn_like(out), torch.randn_like(moments), *(t.detach() for t in (x, weight, imag)))
    arguments = (*tensors, *rest[:2], argmax, moments, *rest[2:7], True, True)
    torch.library.opcheck(torch.ops.mixpool.convolve_and_pool_backward.default, arguments)


def test_differentiating_twice_goes_through_the_reference():
    """A gradient penalty: the gradient of a gradient, for all inputs."""
    stem = stem_of(ONE_IN, 3, torch.float32)
    results = []
    for run in (run_fused, run_reference):
        leaves = stem.leaves(torch.float32)
        scale, shift = (torch.linspace(low, 1, 3, device=DEVICE).requires_grad_() for low in (0.5, -0.5))
        pooled, moments = run(stem, leaves)
        out = F.relu(affine(pooled, scale, shift))
        inputs = [*leaves, scale, shift]
        grads = torch.autograd.grad(out.square().sum() + moments.square().sum(), inputs, create_graph=True)
        penalty = sum(grad.square().sum() for grad in grads)
        results.append((*grads, *torch.autograd.grad(penalty, inputs)))
    for i, (actual, expected) in enumerate(zip(*results)):
        size = expected.abs().max().item()
        assert_close(str(i), actual / size, expected.double() / size, (1e-4, 1e-4))


def test_only_the_gradients_that_are_asked_for():
    stem, dtype = stem_of(ONE_IN, 3, torch.float32), DTYPES[-1]
    upstream = upstream_of(run_reference(stem, stem.leaves(dtype)))
    everything = training_pass(run_fused, stem, dtype, upstream)
    names = ("gradient of x", "gradient of weight", "gradient of weight_imag")
    for wanted in names:
        leaves = [leaf.detach().requires_grad_(name == wanted) for leaf, name in zip(stem.leaves(dtype), names)]
        out, moments = run_fused(stem, leaves)
        torch.autograd.backward([out, moments], [upstream[0].to(dtype), upstream[1].float()])
        for name, leaf in zip(names, leaves):
            assert (leaf.grad is not None) == (name == wanted)
            if name == wanted:
                assert_same_bits(name, leaf.grad, everything[name])


def test_what_is_kept_for_the_backward_pass():
    """The images, the filters, and a byte per position of a max channel."""
    stem, dtype = stem_of(SEVERAL, 3, DTYPES[-1]), DTYPES[-1]
    x, weight, imag = stem.leaves(dtype)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out, _ = ops.convolve_and_pool(x.detach(), weight, imag, *stem[3:6], blur=3, with_moments=True)
    parameters = sum(t.numel() * t.element_size() for t in (weight, imag)) + 16 * len(weight)
    images = x.numel() * x.element_size()
    places = padded_places(len(stem.channels.max)) * out.numel() // out.shape[1]
    assert sum(kept.values()) <= parameters + images + places


def test_what_is_kept_against_the_stock_stem():
    """At most a quarter of eager PyTorch's activations (y, its copies, int64 indices), images and parameters apart."""
    conv, norm = nn.Conv2d(3, 16, 7, 2, 3, bias=False, dtype=torch.float16), nn.BatchNorm2d(16)
    stock = nn.Sequential(conv, norm, nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)).to(DEVICE).train()
    mixed = MixPoolStem(*copy.deepcopy(stock), pooling=["modulus", "max"] * 8, backend="fused").train()
    x = torch.randn(2, 3, 32, 32, device=DEVICE, dtype=torch.float16)

    def kept(module: nn.Module) -> int:
        own = {t.untyped_storage().data_ptr() for t in (x, *module.parameters(), *module.buffers())}
        sizes = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own and tensor.ndim == 4 and tensor.shape[0] == len(x):
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = module(x)
        assert out.requires_grad
        return sum(sizes.values())

    assert 0 < kept(mixed) <= 0.25 * kept(stock)


def test_checkpointing_repeats_the_pass():
    from torch.utils.checkpoint import checkpoint

    stem, dtype = stem_of(ONE_IN, 3, torch.float32), torch.float32
    upstream = upstream_of(run_reference(stem, stem.leaves(dtype)))
    expected = training_pass(run_fused, stem, dtype, upstream)
    again = training_pass(
        lambda stem, leaves: checkpoint(run_fused, stem, leaves, use_reentrant=False), stem, dtype, upstream
    )
    for name in expected:
        assert_same_bits(name, again[name], expected[name])


def test_compiled_in_one_graph(monkeypatch):
    monkeypatch.undo()
    torch.compiler.reset()
    stem, dtype = stem_of(ONE_IN, 3, torch.float32), torch.float32
    upstream = upstream_of(run_reference(stem, stem.leaves(dtype)))
    channels, conv, pool = stem[3:6]

    def function(x, weight, imag, max_index, modulus_index):
        out, moments = ops.convolve_and_pool(
            x, weight, imag, Channels(max_index, modulus_index), conv, pool, blur=3, with_moments=True
        )
        return F.relu(affine(out, moments[1] + 1, moments[0])), moments

    def run(function):
        return lambda stem, leaves: function(*leaves, *channels)

    expected = training_pass(run(function), stem, dtype, upstream)
    compiled = torch.compile(function, fullgraph=True, backend="inductor" if DEVICE == "cuda" else "aot_eager")
    actual = training_pass(run(compiled), stem, dtype, upstream)
    for name in expected:
        assert_close(name, actual[name], expected[name].double())
    torch.compiler.reset()


@pytest.mark.parametrize("kind", KINDS)
def test_every_stem_that_is_let_through_finds_blocks(kind):
    """All kernels, strides and channels that `backend` allows, in what the smallest GPU has of shared memory."""
    for k, m, p, pp, c, n, itemsize in itertools.product(
        range(3, 12), (1, 2, 4), range(4), (0, 1), range(1, 5), (1, 25, 64, 200), (2, 4)
    ):
        depth = StemGeometry(k, m, p, pp, False, c, 64, 64).depth(kind)
        for purpose in ("inference", "training", "backward"):
            cut = blocks.blocks_for(kind, purpose, n, depth, itemsize)
            size = blocks.shared_bytes(kind, purpose, cut, depth, itemsize)
            assert size <= blocks.SMALLEST_SHARED_MEMORY, f"{(k, m, p, pp, c, n, itemsize)}: {size} bytes for {cut}"
            assert min(cut.rows, COLUMNS[kind] * cut.group, cut.slice) >= 16 and cut.chunk >= 1


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_in_a_cuda_graph():
    stem = stem_of(CASES[0], 3, torch.bfloat16)
    x, weight, imag = (t.to(torch.bfloat16) for t in stem[:3])

    def run():
        with torch.no_grad():
            return ops.convolve_and_pool(x, weight, imag, *stem[3:6], blur=3)[0]

    expected = run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    out.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    assert_same_bits("output", out, expected)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=ids)
@pytest.mark.parametrize("blur", (1, 3))
@pytest.mark.parametrize(
    "case",
    (
        Case("resnet", 8, 3, 224, 224, 7, 2, 3, 1, False, "xo" * 32, True),
        Case("resnet in NCHW, 225 pixels", 3, 3, 225, 192, 7, 2, 3, 1, False, "xxo" * 21, False),
        Case("alexnet", 8, 3, 224, 224, 11, 4, 2, 0, False, "xo" * 32, True),
        Case("squeezenet", 2, 3, 227, 227, 7, 2, 0, 0, True, "xo" * 48, True),
    ),
    ids=lambda case: case.name,
)
def test_real_sizes(case, blur, dtype):
    check(case, blur, dtype)
