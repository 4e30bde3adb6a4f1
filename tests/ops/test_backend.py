"""Which path runs, and why: every reason, the environment variable, trials, measured speeds; and that both paths agree.

Without a GPU the fused path runs in Triton's interpreter on CPU tensors (conftest.py), so everything here is tiny.
"""

from __future__ import annotations

import copy
import csv
import itertools
import logging
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from support import (
    ALL_MAX,
    ALL_MODULUS,
    MIXED,
    assert_close,
    data_parallel_worker,
    run_on_two_processes,
    stem_parts,
    sync_batch_norm_worker,
    two_training_steps,
)
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import FrozenBatchNorm2d

import mixpool
from mixpool import BlurPoolStem, CModStem, MixPoolStem, mixpool2d
from mixpool.ops import backend, reference, trial
from mixpool.ops import norm as norm_rule
from mixpool.ops.backend import Call, obstacle, takes_fused, why_reference
from mixpool.ops.functional import split_channels
from mixpool.ops.geometry import ConvGeometry, PoolGeometry

ops = pytest.importorskip("mixpool.ops.fused.ops")
pytest.importorskip("triton")

# Because the interpreter computes both sides of tl.where.
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning", "ignore:invalid value:RuntimeWarning")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Because the products are TF32 on a GPU, and a gradient sums hundreds of products in another order.
CLOSE = (2e-2, 2e-2) if DEVICE == "cuda" else (1e-4, 1e-4)


@pytest.fixture(autouse=True)
def fresh_backend(monkeypatch):
    """Nothing tried, nothing logged, no wish in the environment; TF32 where there is a GPU."""
    monkeypatch.setattr(trial, "_reasons", {})
    monkeypatch.setattr(trial, "SIZE", (16, 16))
    monkeypatch.setattr(backend, "_logged", set())
    monkeypatch.delenv("MIXPOOL_BACKEND", raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", DEVICE == "cuda")


@pytest.fixture
def measured(monkeypatch):
    """A table in which every kernel was measured, at twice the speed unless a test writes something else."""
    gpu = torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"
    names = itertools.product(
        ("max", "modulus1", "modulus3"),
        ("inference", "training"),
        ("float32", "float16", "bfloat16"),
        ("NCHW", "channels_last"),
    )
    table = {(gpu, *row): 2.0 for row in names}
    monkeypatch.setattr(backend, "_measured_speedups", lambda: table)
    return table


@pytest.fixture
def calls(monkeypatch):
    """The calls of the fused operator, as they come."""
    seen, original = [], ops.convolve_and_pool

    def recorded(*args, **kwargs):
        seen.append(kwargs)
        return original(*args, **kwargs)

    monkeypatch.setattr(ops, "convolve_and_pool", recorded)
    return seen


def make_stem(plan=MIXED, **options) -> MixPoolStem:
    parts = {name: options.pop(name) for name in ("norm", "bias", "pool") if name in options}
    return MixPoolStem(*stem_parts(kernel_size=3, padding=1, **parts), **{"select": plan, **options}).to(DEVICE)


def images(*shape: int, **options) -> Tensor:
    """Two small images: a map of 5 x 4, pooled to 3 x 2."""
    return torch.randn(shape or (2, 3, 9, 8), **options).to(DEVICE)


def make_call(**changes) -> Call:
    """A call without obstacles, in the interpreter; `changes` are what a test is about."""
    parts = {
        "x": torch.zeros(2, 3, 33, 30),
        "weight": torch.zeros(7, 3, 5, 5),
        "num_modulus": 4,
        "conv": ConvGeometry((2, 2), (2, 2)),
        "pool": PoolGeometry(padding=(1, 1)),
        "blur": 3,
        "max_blur": 1,
        "needs_grad": False,
    }
    return Call(**parts | changes)


@pytest.fixture
def interpreted(monkeypatch):
    """CPU tensors count, also where there is a GPU."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert obstacle(make_call()) is None  # so whatever reason a test finds is that of its change


# --- every reason -----------------------------------------------------------------------------------------------------

OBSTACLES = {
    "meta tensor": ({"x": torch.zeros(2, 3, 33, 30, device="meta")}, "needs a CUDA device"),
    "float64": ({"x": torch.zeros(2, 3, 33, 30).double(), "weight": torch.zeros(7, 3, 5, 5).double()}, "float64"),
    "two dtypes": ({"weight": torch.zeros(7, 3, 5, 5).half()}, "to torch.float32"),
    "float32 weights": ({"x": torch.zeros(2, 3, 33, 30).half()}, "differ in dtype"),
    "wrapped tensor": ({"x": TwoTensor(torch.zeros(2, 3, 33, 30), torch.zeros(2, 3, 33, 30))}, "wrapped"),
    "5 channels": ({"x": torch.zeros(2, 5, 33, 30), "weight": torch.zeros(7, 5, 5, 5)}, "up to 4 input"),
    "oblong kernel": ({"weight": torch.zeros(7, 3, 5, 3)}, "square kernel"),
    "two strides": ({"conv": ConvGeometry((2, 1), (2, 2))}, "one stride"),
    "two paddings": ({"conv": ConvGeometry((2, 2), (2, 1))}, "one padding"),
    "small kernel": ({"weight": torch.zeros(7, 3, 2, 2)}, "3 to 11"),
    "large kernel": ({"weight": torch.zeros(7, 3, 13, 13)}, "3 to 11"),
    "stride 3": ({"conv": ConvGeometry((3, 3), (2, 2))}, "stride 1, 2 or 4"),
    "dilation": ({"conv": ConvGeometry((2, 2), (2, 2), (2, 2))}, "without dilation"),
    "window of 2": ({"pool": PoolGeometry((2, 2))}, "window of 3"),
    "pool stride 3": ({"pool": PoolGeometry(stride=(3, 3))}, "stride 2"),
    "two pool paddings": ({"pool": PoolGeometry(padding=(0, 1))}, "padding 0 or 1"),
    "max_blur": ({"max_blur": 3, "num_modulus": 0}, "max_blur"),
    "centres outside": ({"blur": 1, "pool": PoolGeometry(padding=(1, 1), ceil_mode=True)}, "centre"),
    "empty batch": ({"x": torch.zeros(0, 3, 33, 30)}, "empty"),
    "small images": ({"x": torch.zeros(2, 3, 1, 30), "conv": ConvGeometry((2, 2), (1, 1))}, "smaller than the kernel"),
    "small map": ({"x": torch.zeros(2, 3, 3, 30), "pool": PoolGeometry()}, "smaller than the pooling window"),
    "every second pixel": ({"x": torch.zeros(2, 3, 33, 60)[..., ::2]}, "side by side"),
    "three of four channels": (
        {"x": torch.zeros(2, 4, 33, 30).contiguous(memory_format=torch.channels_last)[:, :3]},
        "side by side",
    ),
    "misaligned": ({"x": torch.zeros(2 * 3 * 33 * 30 + 1)[1:].reshape(2, 3, 33, 30)}, "16 bytes"),
    "many outputs": ({"x": torch.zeros(1, 3, 33, 30).expand(2**23, -1, -1, -1)}, "2**31"),
    "many places of maxima": ({"x": torch.zeros(1, 3, 33, 30).expand(2**21, -1, -1, -1), "needs_grad": True}, "2**31"),
    "bfloat16 in the interpreter": (
        {"x": torch.zeros(2, 3, 33, 30).bfloat16(), "weight": torch.zeros(7, 3, 5, 5).bfloat16()},
        "interpreter",
    ),
    "many gradients": (
        {"x": torch.zeros(1, 3, 33, 30, requires_grad=True).expand(2**20, -1, -1, -1), "needs_grad": True},
        "2**31",
    ),
}


@pytest.mark.parametrize(("changes", "fragment"), OBSTACLES.values(), ids=OBSTACLES)
def test_reason(interpreted, changes, fragment):
    assert fragment in obstacle(make_call(**changes))


# One step beside each obstacle, or what looks like one.
NO_OBSTACLES = {
    "half precision": {"x": torch.zeros(2, 3, 33, 30).half(), "weight": torch.zeros(7, 3, 5, 5).half()},
    "4 channels": {"x": torch.zeros(2, 4, 33, 30), "weight": torch.zeros(7, 4, 5, 5)},
    "1 channel": {"x": torch.zeros(2, 1, 33, 30), "weight": torch.zeros(7, 1, 5, 5)},
    "kernel 3": {"weight": torch.zeros(7, 3, 3, 3)},
    "kernel 11": {"weight": torch.zeros(7, 3, 11, 11), "conv": ConvGeometry((4, 4), (2, 2))},
    "no padding": {"pool": PoolGeometry(ceil_mode=True), "blur": 1},
    "max_blur without max": {"num_modulus": 7, "max_blur": 3},
    "max_blur beside modulus": {"max_blur": 3},
    "blur=1 without modulus": {"num_modulus": 0, "blur": 1, "pool": PoolGeometry(padding=(1, 1), ceil_mode=True)},
    "channels_last": {"x": torch.zeros(2, 3, 33, 30).contiguous(memory_format=torch.channels_last)},
    "a crop": {"x": torch.zeros(2, 3, 40, 40)[:, :, 4:, 4:]},
    "one image for all": {"x": torch.zeros(1, 3, 33, 30).expand(2**20, -1, -1, -1)},
}


@pytest.mark.parametrize("changes", NO_OBSTACLES.values(), ids=NO_OBSTACLES)
def test_no_reason(interpreted, changes):
    assert obstacle(make_call(**changes)) is None


# kernel, stride, padding, pool padding, ceil_mode: all stems of the 77 models with a max pool (tests/test_models.py)
CENSUS = (
    (7, 2, 3, 1, False),
    (7, 2, 3, 0, True),
    (7, 2, 0, 0, True),
    (11, 4, 2, 0, False),
    (3, 2, 1, 1, False),
    (3, 2, 0, 0, True),
)


@pytest.mark.parametrize("blur", (1, 3))
@pytest.mark.parametrize("stem", CENSUS, ids=str)
def test_the_stems_of_all_models_pass(interpreted, stem, blur):
    kernel, stride, padding, pool_padding, ceil_mode = stem
    conv, pool = (
        ConvGeometry((stride,) * 2, (padding,) * 2),
        PoolGeometry(padding=(pool_padding,) * 2, ceil_mode=ceil_mode),
    )
    call = make_call(weight=torch.zeros(7, 3, kernel, kernel), conv=conv, pool=pool)
    assert obstacle(call._replace(blur=blur)) is None


def test_the_census_is_complete(shared_data):
    with open(shared_data / "stems.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["tier"].split(":")[0] in ("A", "A3")]
    found = {
        (
            int(r["kernel"].split("x")[0]),
            int(r["stride"]),
            int(r["padding"][1]),
            int(r["pool_padding"]),
            r["pool_ceil"] == "True",
        )
        for r in rows
    }
    assert len(rows) == 77 and found == set(CENSUS)


def test_autocast_decides_the_dtype(interpreted):
    half = torch.zeros(2, 3, 33, 30).half()
    with torch.autocast("cpu", dtype=torch.float16):
        assert obstacle(make_call()) is None
        assert obstacle(make_call(x=half)) is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert "to torch.bfloat16" in obstacle(make_call(x=half))


def fake_cuda_call(dtype: torch.dtype = torch.float16) -> Call:
    with FakeTensorMode():
        tensors = {
            "x": torch.empty(2, 3, 33, 30, device="cuda", dtype=dtype),
            "weight": torch.empty(7, 3, 5, 5, device="cuda", dtype=dtype),
        }
    return make_call(**tensors)


@pytest.fixture
def fake_gpu(monkeypatch):
    """A GPU that answers questions; a dictionary to change the answers."""
    gpu = {"capability": (9, 0), "name": "Fake GPU"}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: gpu["capability"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: gpu["name"])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return gpu


def test_reasons_of_the_device(fake_gpu, monkeypatch):
    call = fake_cuda_call()
    assert obstacle(call) is None
    fake_gpu["capability"] = (7, 5)
    assert "this one has 7.5" in obstacle(call)
    fake_gpu["capability"] = (8, 0)
    assert obstacle(call) is None
    with monkeypatch.context() as changed:
        changed.setattr(backend, "HAS_TRITON", False)
        assert "Triton" in obstacle(call)
    with monkeypatch.context() as changed:
        changed.setattr(torch.version, "hip", "7.0")
        assert "AMD" in obstacle(call)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "needs a CUDA device" in obstacle(make_call())


def test_float32_wants_tf32(fake_gpu, monkeypatch):
    call = fake_cuda_call(torch.float32)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert obstacle(call) is None
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert "TF32" in obstacle(call)


def test_reasons_of_transformations(interpreted, monkeypatch):
    call, seen = make_call(), []

    def ask(values: Tensor) -> Tensor:
        seen.append(obstacle(call))
        return values.sum()

    torch.func.grad(ask)(torch.ones(2))
    torch.func.vmap(ask)(torch.ones(2, 2))
    assert [reason == "torch.func transforms the call" for reason in seen] == [True, True]
    with torch.autograd.forward_ad.dual_level():
        assert "forward-mode" in obstacle(call)
    with monkeypatch.context() as changed:
        changed.setattr(torch.jit, "is_tracing", lambda: True)
        assert "torch.jit.trace" in obstacle(call)
    with monkeypatch.context() as changed:
        changed.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
        assert "ONNX" in obstacle(call)
    assert obstacle(call) is None


# --- the wish ---------------------------------------------------------------------------------------------------------


def test_unknown_backends(monkeypatch):
    expected = r"\('auto', 'reference', 'fused'\), got 'fast'"
    with pytest.raises(ValueError, match=expected):
        make_stem(backend="fast")
    with pytest.raises(ValueError, match=expected):
        mixpool2d(images(), torch.zeros(2, 3, 3, 3).to(DEVICE), is_modulus=[False, False], backend="fast")
    stem = make_stem()
    stem.backend = "fast"
    with pytest.raises(ValueError, match=expected):
        stem(images())
    stem.backend = "auto"
    monkeypatch.setenv("MIXPOOL_BACKEND", "fast")
    with pytest.raises(ValueError, match=f"MIXPOOL_BACKEND of {expected}"):
        stem(images())


def test_environment_is_what_auto_means(monkeypatch, interpreted):
    call = make_call()
    assert why_reference("fused", call) is None and "not measured" in why_reference("auto", call)
    monkeypatch.setenv("MIXPOOL_BACKEND", "fused")
    assert why_reference("auto", call) is None
    assert why_reference("reference", call) == "backend='reference' was asked for"
    with pytest.raises(RuntimeError, match="by the environment variable MIXPOOL_BACKEND, but it has no max_blur"):
        takes_fused("auto", call._replace(max_blur=3, num_modulus=0))
    monkeypatch.setenv("MIXPOOL_BACKEND", "reference")
    assert "MIXPOOL_BACKEND" in why_reference("auto", call) and not takes_fused("auto", call)
    assert takes_fused("fused", call)
    monkeypatch.setenv("MIXPOOL_BACKEND", "")
    assert "not measured" in why_reference("auto", call)


def test_fused_by_name_runs_or_raises(calls, monkeypatch):
    stem, x = make_stem(backend="fused").eval(), images()
    with torch.no_grad():
        stem(x)
        assert len(calls) == 1
        with pytest.raises(
            RuntimeError, match="backend='fused' was asked for, but it has no products in torch.float64"
        ):
            stem.double()(x.double())
        monkeypatch.setattr(ops, "convolve_and_pool", lambda *a, **k: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            stem.float()(x)


def test_why_not_fused():
    stem, x = make_stem(backend="fused"), images()
    assert mixpool.why_not_fused(stem, x) is None
    assert (
        mixpool.why_not_fused(BlurPoolStem(*stem_parts()).to(DEVICE), x)
        == "it has no max_blur=3, and no channel takes the modulus"
    )
    stem.backend = "reference"
    assert mixpool.why_not_fused(stem, x) == "backend='reference' was asked for"
    with pytest.raises(ValueError, match="expected a MixPoolStem, got torch.nn.modules.conv.Conv2d"):
        mixpool.why_not_fused(nn.Conv2d(3, 4, 3), x)
    with pytest.raises(ValueError, match=r"\(N, 3, H, W\), got \(2, 4, 9, 8\)"):
        mixpool.why_not_fused(stem, images(2, 4, 9, 8))


def test_a_reason_is_logged_once_and_on_gpus_only(fake_gpu, interpreted, caplog):
    caplog.set_level(logging.INFO, logger="mixpool")
    assert not takes_fused("auto", make_call(max_blur=3, num_modulus=0)) and not takes_fused("auto", make_call())
    assert caplog.messages == []
    call = fake_cuda_call()
    for _ in range(2):
        assert not takes_fused("auto", call) and not takes_fused("auto", call._replace(max_blur=3, num_modulus=0))
        assert not takes_fused("reference", call)
    assert [record.levelname for record in caplog.records] == ["INFO", "INFO"]
    assert "max kernel in inference in float16, NCHW was not measured on Fake GPU; backend='fused'" in caplog.text
    assert "it has no max_blur=3" in caplog.text


# --- measured speeds --------------------------------------------------------------------------------------------------


def test_only_what_was_measured_faster_is_the_default(fake_gpu, monkeypatch):
    rows = [
        {"gpu": "Fake GPU", "kernel": kernel, "mode": mode, "dtype": "float16", "layout": "NCHW", "speedup": speedup}
        for kernel, mode, speedup in (
            ("max", "inference", 1.15),
            ("modulus3", "inference", 3.0),
            ("modulus3", "inference", 1.149),
            ("modulus1", "inference", 2.0),
            ("modulus1", "training", 2.0),
        )
    ]
    table = backend._slowest(rows)
    monkeypatch.setattr(backend, "_measured_speedups", lambda: table)
    monkeypatch.setattr(trial, "_largest_error", lambda case: 0.0)
    call = fake_cuda_call()
    assert why_reference("auto", call._replace(num_modulus=0)) is None
    assert why_reference("auto", call._replace(blur=1)) is None
    assert "modulus3 kernel in inference in float16, NCHW was measured at 1.149 times" in why_reference("auto", call)
    assert why_reference("auto", call._replace(num_modulus=7, blur=1, with_moments=True)) is None
    assert "max kernel in training" in why_reference("auto", call._replace(blur=1, needs_grad=True))
    fake_gpu["name"] = "Other GPU"
    assert "not measured on Other GPU" in why_reference("auto", call._replace(blur=1))


def test_the_table_in_the_package_can_be_read():
    for key, speedup in backend._measured_speedups().items():
        assert len(key) == 5 and all(isinstance(name, str) for name in key) and speedup > 0


# --- the first trial --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", (False, True), ids=("inference", "training"))
def test_auto_tries_once_and_then_takes_the_fused_path(measured, calls, training):
    stem, x = make_stem().train(training), images(requires_grad=training)
    random_state = torch.get_rng_state()
    with torch.set_grad_enabled(training):
        for _ in range(2):
            stem(x)
        assert mixpool.why_not_fused(stem, x) is None
    assert len(calls) == 3, "one trial and two passes"
    assert torch.equal(torch.get_rng_state(), random_state)
    stem(images())  # without a gradient for x, or in training mode with one: another case
    assert len(calls) == 5


def test_many_sizes_of_images_are_the_references(measured, calls, monkeypatch):
    monkeypatch.setattr(trial, "MAX_SIZES", 2)
    stem = make_stem().eval().requires_grad_(False)
    for width in (10, 11, 12, 13):
        stem(images(2, 3, 9, width))
    assert "2 sizes" in mixpool.why_not_fused(stem, images(2, 3, 9, 12))
    assert mixpool.why_not_fused(stem, images(2, 3, 9, 11)) is None
    assert len(calls) == 4, "two trials and two passes"
    assert len(trial._reasons) == 2


FAULTS = {
    "raises": (lambda out: 1 / 0, "a trial of it failed (ZeroDivisionError: division by zero)"),
    "wrong": (lambda out: (out[0] * 1.1, out[1]), "a trial of it gave wrong numbers (relative error 0.1"),
    "NaN": (lambda out: (out[0] * math.nan, out[1]), "a trial of it gave wrong numbers (relative error inf)"),
}


@pytest.mark.parametrize(("fault", "reason"), FAULTS.values(), ids=FAULTS)
def test_a_failed_trial_lands_on_the_reference(measured, monkeypatch, caplog, fault, reason):
    original, calls = ops.convolve_and_pool, []

    def faulty(*args, **kwargs):
        calls.append(kwargs)
        return fault(original(*args, **kwargs))

    monkeypatch.setattr(ops, "convolve_and_pool", faulty)
    stem, x = make_stem(ALL_MODULUS, blur=1).eval(), images()
    with torch.no_grad():
        for _ in range(2):
            out = stem(x)
        stem.backend = "reference"
        assert torch.equal(out, stem(x))
    stem.backend = "auto"
    assert len(calls) == 1
    assert [record.levelname for record in caplog.records] == ["WARNING"] and reason in caplog.text
    with torch.no_grad():
        assert mixpool.why_not_fused(stem, x).startswith(reason)


def test_no_trial_inside_a_capture(measured, calls, monkeypatch):
    stem, x = make_stem(ALL_MODULUS, blur=1).eval(), images()
    with torch.no_grad():
        with monkeypatch.context() as changed:
            changed.setattr(trial, "_is_capturing", lambda device: True)
            assert "capture of a CUDA graph" in mixpool.why_not_fused(stem, x)
        assert calls == []
        assert mixpool.why_not_fused(stem, x) is None, "the next call may come outside"
        monkeypatch.setattr(trial, "_is_capturing", lambda device: True)
        assert mixpool.why_not_fused(stem, x) is None, "tried before"
    assert len(calls) == 1


def test_a_trial_is_not_seen_from_outside(measured):
    """Not by hooks on saved tensors (checkpointing counts them), nor by modes, and the caller's autocast is not its."""
    stem, x = make_stem(ALL_MODULUS, blur=1).train(), images()
    seen = []
    for _ in range(2):
        saved, flops = [], FlopCounterMode(display=False)
        keep = torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: s.append(t.shape) or t, lambda t: t)
        with keep, flops, torch.autocast(DEVICE, dtype=torch.float16):
            stem(x)
        seen.append((saved, flops.get_total_flops()))
    assert seen[0] == seen[1] and len(seen[0][0]) > 3
    assert list(trial._reasons.values()) == [None]


def test_the_trial_of_every_kind(measured):
    """Exact numbers: a trial's error is rounding in the last step, far below the bound."""
    for plan, blur, dtype in ((ALL_MAX, 3, torch.float32), (MIXED, 3, torch.float16), (ALL_MODULUS, 1, torch.float16)):
        stem = make_stem(plan, blur=blur).to(dtype)
        call = stem._call(images(2, 3, 9, 8, dtype=dtype, requires_grad=True))
        assert trial._largest_error(backend._case_of(call)) < 5e-3


# --- the norm layer as two vectors ------------------------------------------------------------------------------------

NORMS = {
    "batch norm": {},
    "cumulative average": {"momentum": None},
    "no running statistics": {"track_running_stats": False},
    "no parameters": {"affine": False},
    "none": {"norm": False},
    "frozen": "frozen",
}


def norm_problem(variant, bias: bool) -> tuple[nn.Conv2d, nn.Module | None]:
    options = {} if variant == "frozen" else variant
    conv, norm, *_ = stem_parts(bias=bias, **options)
    if variant == "frozen":
        state = {name: v for name, v in norm.state_dict().items() if name != "num_batches_tracked"}
        norm = FrozenBatchNorm2d(7)
        norm.load_state_dict(state)
    return conv, norm


@pytest.mark.parametrize("blur", (1, 3))
@pytest.mark.parametrize("bias", (False, True), ids=("", "bias"))
@pytest.mark.parametrize("training", (False, True), ids=("evaluation", "training"))
@pytest.mark.parametrize("variant", NORMS.values(), ids=NORMS)
def test_the_affine_map_is_the_norm_layer(variant, training, bias, blur):
    conv, norm = norm_problem(variant, bias)
    geometry = (ConvGeometry((2, 2), (2, 2)), PoolGeometry(padding=(1, 1)))
    channels = split_channels(MIXED)
    x, weight_imag = torch.randn(2, 3, 17, 14), torch.randn(4, 3, 5, 5) / 9
    results = []
    for is_fused in (False, True):
        layer = copy.deepcopy(norm)
        layer = layer.train(training) if layer is not None else None
        leaves = {name: p.clone().detach().requires_grad_() for name, p in conv.named_parameters()}
        sign = norm_rule.sign_of_scale(layer)
        signs = torch.ones(7) if sign is None else sign
        weight = leaves["weight"] * signs[:, None, None, None]
        imag = weight_imag * signs[channels.modulus][:, None, None, None]
        with_moments = norm_rule.uses_batch_statistics(layer)
        own_bias = leaves.get("bias")
        inner_bias = None if is_fused or own_bias is None else own_bias * signs
        options = {"blur": blur, "with_moments": with_moments}
        pooled = reference.convolve_and_pool(x, weight, inner_bias, imag, channels, *geometry, **options)
        if is_fused:
            moments = counts = None
            if with_moments:
                kinds = (pooled.max_moments, pooled.modulus_moments)
                counts = tuple(kind.count for kind in kinds)
                moments = torch.zeros(2, 7)
                for kind, index in zip(kinds, channels):
                    moments = moments.index_copy(1, index, torch.stack(kind[:2]))
            scale, shift = norm_rule.affine_of_pooled(moments, counts, layer, own_bias, sign, channels)
            assert scale.dtype == shift.dtype == torch.float32 and bool((scale >= 0).all())
            parts = [reference.affine(p, scale[i], shift[i]) for p, i in zip(pooled[:2], channels)]
        else:
            parts = norm_rule.normalize_pooled(pooled, layer, own_bias, sign, channels)
        generator = torch.Generator().manual_seed(3)
        sum((p * torch.randn(p.shape, generator=generator)).sum() for p in parts).backward()
        leaves |= {} if layer is None else dict(layer.named_parameters())
        state = {} if layer is None else dict(layer.named_buffers())
        results.append(
            {"max": parts[0], "modulus": parts[1], **state, **{f"grad {n}": v.grad for n, v in leaves.items()}}
        )
    for name, expected in results[0].items():
        if expected is None:  # a bias that the batch mean takes away again has no gradient
            assert results[1][name] is None or not results[1][name].any(), name
        elif results[1][name] is None:
            assert_close(name, expected, torch.zeros_like(expected), (1e-4, 0))  # because of rounding in that mean
        else:
            assert_close(name, results[1][name].float(), expected, (1e-4, 1e-4))  # because gradients sum hundreds


def test_one_value_per_channel_is_an_error():
    layer = nn.BatchNorm2d(7)
    moments, channels = torch.ones(2, 7), split_channels(MIXED)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        norm_rule.affine_of_pooled(moments, (1, 1), layer, None, None, channels)


@pytest.mark.skipif(DEVICE == "cuda", reason="the processes run in the interpreter")
def test_sync_batch_norm_on_two_processes():
    """Uneven parts of the batch on the fused path are the whole batch on the reference, outputs and gradients."""
    batches, upstreams = [torch.randn(3, 3, 9, 10)], [torch.randn(3, 7, 3, 3)]
    stem = make_stem(blur=1, bias=True)
    expected = two_training_steps(copy.deepcopy(stem).train(), batches, upstreams)
    stem.bn = nn.SyncBatchNorm.convert_sync_batchnorm(stem.bn)
    stem.backend = "fused"
    answers = run_on_two_processes(sync_batch_norm_worker, stem, batches, upstreams, [1])
    for name, value in expected.items():
        parts = [answer[name] for answer in answers]
        if name.startswith(("out", "grad x")):
            assert_close(name, torch.cat(parts), value, CLOSE)
        elif name.startswith("grad"):
            assert_close(name, parts[0] + parts[1], value, CLOSE)
        else:
            assert_close(name, parts[0].float(), value.float(), CLOSE)
            assert torch.equal(*parts)


@pytest.mark.parametrize("max_blur", (1, 3))
def test_both_paths_sum_the_same_over_processes(monkeypatch, max_blur):
    """Processes may differ in their path, where one has an empty part of a batch; then their sums have to match."""
    sums, x, start = [], images(), make_stem(bias=True, blur=1, max_blur=max_blur).train()
    start.bn = nn.SyncBatchNorm.convert_sync_batchnorm(start.bn)
    monkeypatch.setattr(norm_rule, "_spans_processes", lambda norm: True)
    monkeypatch.setattr(norm_rule.dist, "all_reduce", lambda total, group: sums[-1].append(total.clone()))
    for name in ("reference", "fused"):
        stem = copy.deepcopy(start)
        stem.backend = name
        sums.append([])
        one_step(stem, x)
    assert len(sums[0]) == len(sums[1]) == 4 + 3
    for i, (expected, actual) in enumerate(zip(*sums)):
        assert_close(f"sum {i}", actual, expected, CLOSE)


@pytest.mark.skipif(DEVICE == "cuda", reason="the processes run in the interpreter")
def test_distributed_data_parallel():
    """Each process gets the mean of both gradients, as on the reference."""
    stems = {name: make_stem(blur=1).eval() for name in ("fused", "reference")}
    for name, stem in stems.items():
        stem.backend = name
    x, upstream = torch.randn(4, 3, 9, 10), torch.randn(4, 7, 3, 3)
    for answer in run_on_two_processes(data_parallel_worker, stems, x, upstream):
        expected = {name.split()[1]: grad for name, grad in answer.items() if name.startswith("reference")}
        assert len(expected) >= 3
        for name, grad in expected.items():
            assert_close(name, answer[f"fused: {name}"], grad, CLOSE)


# --- both paths agree -------------------------------------------------------------------------------------------------


def one_step(stem: nn.Module, x: Tensor, seed: int = 5) -> dict[str, Tensor]:
    """Output, gradients and buffers after a forward and backward pass."""
    x = x.clone().requires_grad_()
    out = stem(x)
    generator = torch.Generator().manual_seed(seed)
    out.backward(torch.randn(out.shape, generator=generator).to(out))
    grads = {f"grad {name}": p.grad for name, p in stem.named_parameters()}
    return {"out": out, "grad x": x.grad, **grads, **{name: b.clone() for name, b in stem.named_buffers()}}


STEMS = {
    "mixed": {},
    "centres": {"blur": 1, "imag": "free"},
    "all-max": {"plan": ALL_MAX, "act": nn.ReLU(inplace=True)},
    "all-modulus": {"plan": ALL_MODULUS, "pool": nn.MaxPool2d(3, 2, ceil_mode=True)},
    "no norm": {"norm": False, "bias": True},
    "nothing but the convolution": {"norm": False, "act": nn.Identity()},
    "leaky": {"act": nn.LeakyReLU(0.2, inplace=True)},
    "blurred maxima": {"max_blur": 3},
    "blurred maxima, free partner": {"max_blur": 3, "imag": "free", "bias": True},
    "blurred maxima, centres, no norm": {"max_blur": 3, "blur": 1, "norm": False, "bias": True},
    "blurred maxima without any": {"max_blur": 3, "plan": ALL_MODULUS},
}


@pytest.mark.parametrize("training", (False, True), ids=("evaluation", "training"))
@pytest.mark.parametrize("options", STEMS.values(), ids=STEMS)
def test_stems_agree(options, training, calls):
    options = dict(options)
    act = options.pop("act", None)
    stem = make_stem(**options).train(training)
    stem.act = stem.act if act is None else act
    stem.backend = "fused"
    other = copy.deepcopy(stem)
    other.backend = "reference"
    x = images().contiguous(memory_format=torch.channels_last if training else torch.contiguous_format)
    expected = one_step(other, x)
    assert len(calls) == 0
    actual = one_step(stem, x)
    for name, value in expected.items():
        if value is not None:
            assert_close(name, actual[name].float(), value.float(), CLOSE)
    assert actual["out"].stride() == expected["out"].stride()
    with torch.no_grad():
        assert_close("without gradients", stem(x), other(x), CLOSE)
    is_half = stem.max_blur == 3 and 0 < stem.num_modulus < 7  # whose affine step is the reference's
    assert len(calls) == 2 and (calls[-1].get("scale") is None) == (is_half or training and stem.bn is not None)
    for name, buffer in stem.named_buffers():
        assert_close(name, buffer.float(), other.get_buffer(name).float(), CLOSE)


@pytest.mark.parametrize(
    "options",
    ({"norm": False, "bias": True}, {}, {"max_blur": 3}),
    ids=("tied without norm", "batch norm", "blurred maxima"),
)
def test_a_gradient_of_the_gradient(options):
    """create_graph=True: V is a function of W, the shift of the scale; neither counts twice, in any order."""
    results, x = [], images().requires_grad_()
    for name in ("fused", "reference"):
        stem = make_stem(**options).train()
        stem.backend = name
        inputs = [x, *stem.parameters()]
        grads = torch.autograd.grad(stem(x).square().sum(), inputs, create_graph=True)
        results.append((*grads, *torch.autograd.grad(sum(grad.square().sum() for grad in grads), inputs)))
    for i, (actual, expected) in enumerate(zip(*results)):
        size = expected.abs().max().clamp(min=1.0)
        assert_close(f"{i}", actual / size, expected / size, CLOSE)


@pytest.mark.parametrize("max_blur", (1, 3))
def test_half_precision_agrees(max_blur):
    """In float16, by autocast and by the dtype of the stem; not bfloat16, which the interpreter does not compute."""
    stem, x = make_stem(max_blur=max_blur).eval(), images()
    with torch.no_grad():
        expected = stem(x)
        stem.backend = "fused"
        with torch.autocast(DEVICE, dtype=torch.float16):
            out = stem(x)
        assert out.dtype == torch.float16
        assert_close("autocast", out, expected)
        assert_close("half", stem.half()(x.half()), expected)


@pytest.mark.parametrize("needs_grad", (False, True), ids=("", "gradients"))
@pytest.mark.parametrize("act", (F.relu, torch.sigmoid))
@pytest.mark.parametrize("max_blur", (1, 3))
def test_mixpool2d_agrees(needs_grad, act, max_blur, calls):
    scale, bias, shift = torch.randn(3, 7)
    tensors = {"weight": torch.randn(7, 3, 3, 3) / 5, "bias": bias, "scale": scale, "shift": shift}
    outs, grads = [], []
    for name in ("reference", "fused"):
        leaves = {key: t.to(DEVICE).clone().requires_grad_(needs_grad) for key, t in tensors.items()}
        torch.manual_seed(2)
        x = images(requires_grad=needs_grad)
        options = {"conv_stride": 2, "conv_padding": 1, "pool_padding": 1, "is_modulus": MIXED, "backend": name}
        options["max_blur"] = max_blur
        out = mixpool2d(x, act=act, **leaves, **options)
        outs.append(out)
        if needs_grad:
            grads.append(torch.autograd.grad(out.square().sum(), leaves.values()))
    assert len(calls) == 1
    assert_close("out", outs[1], outs[0], CLOSE)
    for name, actual, expected in zip(tensors, *grads[::-1]) if needs_grad else ():
        assert_close(f"grad {name}", actual, expected, CLOSE)


def test_frozen_weights_and_trained_norm(calls):
    stem, x = make_stem(backend="fused"), images()
    stem.weight.requires_grad_(False)
    stem(x).sum().backward()
    assert stem.bn.weight.grad is not None and stem.weight.grad is None
    assert calls[0].get("scale") is None


def test_replicas_of_data_parallel_need_gradients():
    stem = make_stem(norm=False)
    replica = stem._replicate_for_data_parallel()
    assert not list(replica.parameters())
    replica.weight = stem.weight * 1  # as broadcast to another device
    assert replica._call(images()).needs_grad


# --- the attribute ----------------------------------------------------------------------------------------------------


def test_the_backend_is_kept():
    stem = make_stem(backend="fused")
    assert "backend='fused'" in repr(stem) and "backend" not in repr(make_stem())
    for other in (copy.deepcopy(stem), pickle.loads(pickle.dumps(stem))):
        assert other.backend == "fused"
    assert "backend" not in " ".join(stem.state_dict())
    del stem.__dict__["backend"]  # a stem from before there was a choice
    assert pickle.loads(pickle.dumps(stem)).backend == "auto"


def test_the_backend_is_passed_on():
    assert BlurPoolStem(*stem_parts(), backend="fused").backend == "fused"
    assert CModStem(*stem_parts(), backend="fused").backend == "fused"
    assert mixpool.conversion.initialize(*stem_parts(), backend="reference").backend == "reference"

    def model() -> nn.Sequential:
        return nn.Sequential(*stem_parts(), nn.Flatten())

    for change in (mixpool.convert, mixpool.initialize):
        changed = model()
        change(changed, backend="reference")
        assert changed[0].backend == "reference"
        stock = model()
        with pytest.raises(ValueError, match="expected a backend"):
            change(stock, backend="fast")
        assert type(stock[0]) is nn.Conv2d


# --- torch.compile ----------------------------------------------------------------------------------------------------


@pytest.fixture
def compiler():
    """No graph of one test serves another."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def assert_compiled_step(
    backend: str, name: str, shapes: list[tuple[int, ...]], dynamic: bool | None, **options
) -> None:
    """Forward and backward of a compiled stem are those of the eager reference, images of one shape after the other."""
    stem = make_stem(MIXED, blur=1, backend=name, **options).train()
    other = copy.deepcopy(stem)
    other.backend = "reference"
    compiled = torch.compile(stem, fullgraph=True, backend=backend, dynamic=dynamic)
    for shape in shapes:
        x = images(*shape)
        actual, expected = compiled(x), other(x)
        assert_close(f"{shape}", actual, expected, CLOSE)
        stem.zero_grad(), other.zero_grad()
        actual.square().sum().backward(), expected.square().sum().backward()
        assert_close("grad weight", stem.weight.grad, other.weight.grad, CLOSE)
        for buffer, value in stem.bn.named_buffers():
            assert_close(buffer, value.float(), other.bn.get_buffer(buffer).float(), CLOSE)


@pytest.mark.parametrize(("name", "dynamic"), [("reference", True), ("fused", True), ("auto", None), ("auto", True)])
def test_compiled_in_one_graph(compiler, measured, calls, name, dynamic):
    """Traced by dynamo and differentiated by AOTAutograd; "auto" makes its trial while tracing."""
    shapes = [(2, 3, 9, 8), (3, 3, 11, 10)]
    assert_compiled_step("aot_eager", name, shapes if dynamic else shapes[:1], dynamic)
    assert len(trial._reasons) == (name == "auto") and set(trial._reasons.values()) <= {None}
    assert bool(calls) == (name != "reference")


def test_blurred_maxima_are_compiled_in_one_graph(compiler, calls):
    assert_compiled_step("aot_eager", "fused", [(2, 3, 9, 8), (3, 3, 11, 10)], True, max_blur=3)
    assert calls


@pytest.mark.slow
def test_inductor(compiler):
    assert_compiled_step("inductor", "fused", [(2, 3, 9, 8)], None)


@pytest.mark.parametrize("strict", (False, True), ids=("", "strict"))
def test_export_keeps_one_operator(compiler, measured, strict):
    stem = make_stem(ALL_MODULUS, blur=1).eval().requires_grad_(False)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(stem, (images(),), dynamic_shapes={"x": {0: batch}}, strict=strict)
    targets = [str(node.target) for node in program.graph.nodes]
    assert targets.count("mixpool.convolve_and_pool.default") == 1 and not any("conv2d" in name for name in targets)
    x = images(3, 3, 9, 8)
    stem.backend = "reference"
    assert_close("output", program.module()(x), stem(x), CLOSE)
