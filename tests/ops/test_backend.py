"""Which path runs, and why: every reason, the environment variable; and that both paths agree.

Without a GPU the fused path runs in Triton's interpreter on CPU tensors (conftest.py), so everything here is tiny.
"""

from __future__ import annotations

import copy
import csv
import logging
import pickle

import pytest
import torch
import torch.nn.functional as F
from support import (
    ALL_MAX,
    ALL_MODULUS,
    EVERY,
    MIXED,
    assert_close,
    data_parallel_worker,
    plan_of,
    run_on_two_processes,
    stem_parts,
    sync_batch_norm_worker,
    two_training_steps,
)
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

import mixpool
from mixpool import MixPoolStem, mixpool2d
from mixpool.ops import backend
from mixpool.ops import norm as norm_rule
from mixpool.ops.backend import Call, obstacle, takes_fused, why_reference
from mixpool.ops.geometry import ConvGeometry, PoolGeometry
from mixpool.ops.reference import groups_of

ops = pytest.importorskip("mixpool.ops.fused.ops")
pytest.importorskip("triton")

# Because the interpreter computes both sides of tl.where.
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning", "ignore:invalid value:RuntimeWarning")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Because the products are TF32 on a GPU, and a gradient sums hundreds of products in another order.
CLOSE = (2e-2, 2e-2) if DEVICE == "cuda" else (1e-4, 1e-4)


@pytest.fixture(autouse=True)
def fresh_backend(monkeypatch):
    """Nothing logged, no wish in the environment; TF32 where there is a GPU."""
    monkeypatch.setattr(backend, "_logged", set())
    monkeypatch.delenv("MIXPOOL_BACKEND", raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", DEVICE == "cuda")


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
    return MixPoolStem(*stem_parts(kernel_size=3, padding=1, **parts), **{"pooling": plan, **options}).to(DEVICE)


def images(*shape: int, **options) -> Tensor:
    """Two small images: a map of 5 x 4, pooled to 3 x 2."""
    return torch.randn(shape or (2, 3, 9, 8), **options).to(DEVICE)


def make_call(**changes) -> Call:
    """A call without obstacles, in the interpreter; `changes` are what a test is about."""
    parts = {
        "x": torch.zeros(2, 3, 33, 30),
        "weight": torch.zeros(7, 3, 5, 5),
        "groups": groups_of(MIXED),
        "conv": ConvGeometry((2, 2), (2, 2)),
        "pool": PoolGeometry(padding=(1, 1)),
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
    "no kernels": ({"groups": groups_of(plan_of("energy", "blurpool"))}, "no kernel for blurpool and energy"),
    "centres outside": (
        {"groups": groups_of(plan_of("cmod")), "pool": PoolGeometry(padding=(1, 1), ceil_mode=True)},
        "centre",
    ),
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
    "no padding": {"pool": PoolGeometry(ceil_mode=True), "groups": groups_of(plan_of("cmod"))},
    "blurpool beside modulus": {"groups": groups_of(plan_of("modulus", "blurpool"))},
    "max alone": {"groups": groups_of(ALL_MAX), "pool": PoolGeometry(padding=(1, 1), ceil_mode=True)},
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


@pytest.mark.parametrize("pooling", ("cmod", "modulus"))
@pytest.mark.parametrize("stem", CENSUS, ids=str)
def test_the_stems_of_all_models_pass(interpreted, stem, pooling):
    kernel, stride, padding, pool_padding, ceil_mode = stem
    conv, pool = (
        ConvGeometry((stride,) * 2, (padding,) * 2),
        PoolGeometry(padding=(pool_padding,) * 2, ceil_mode=ceil_mode),
    )
    call = make_call(weight=torch.zeros(7, 3, kernel, kernel), conv=conv, pool=pool)
    assert obstacle(call._replace(groups=groups_of(plan_of(pooling)))) is None


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
        mixpool2d(images(), torch.zeros(2, 3, 3, 3).to(DEVICE), pooling="max", backend="fast")
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
    assert why_reference("fused", call) is None and "never measured" in why_reference("auto", call)
    monkeypatch.setenv("MIXPOOL_BACKEND", "fused")
    assert why_reference("auto", call) is None
    assert why_reference("reference", call) == "backend='reference' was asked for"
    with pytest.raises(RuntimeError, match="by the environment variable MIXPOOL_BACKEND, but it has no kernel"):
        takes_fused("auto", call._replace(groups=groups_of(["blurpool"])))
    monkeypatch.setenv("MIXPOOL_BACKEND", "reference")
    assert "MIXPOOL_BACKEND" in why_reference("auto", call) and not takes_fused("auto", call)
    assert takes_fused("fused", call)
    monkeypatch.setenv("MIXPOOL_BACKEND", "")
    assert why_reference("auto", call) == backend.NOT_DEFAULT


def test_fused_by_name_runs_or_raises(calls, monkeypatch):
    stem, x = make_stem(backend="fused").eval(), images()
    with torch.no_grad():
        stem(x)
        assert len(calls) == 2, "one for each pooling"
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
    assert mixpool.why_not_fused(make_stem("blurpool"), x) == "it has no kernel for blurpool"
    stem.backend = "reference"
    assert mixpool.why_not_fused(stem, x) == "backend='reference' was asked for"
    with pytest.raises(ValueError, match="expected a MixPoolStem, got torch.nn.modules.conv.Conv2d"):
        mixpool.why_not_fused(nn.Conv2d(3, 4, 3), x)
    with pytest.raises(ValueError, match=r"\(N, 3, H, W\), got \(2, 4, 9, 8\)"):
        mixpool.why_not_fused(stem, images(2, 4, 9, 8))


def test_a_reason_is_logged_once_and_on_gpus_only(fake_gpu, interpreted, caplog):
    caplog.set_level(logging.INFO, logger="mixpool")
    assert not takes_fused("auto", make_call(groups=groups_of(["energy"]))) and not takes_fused("auto", make_call())
    assert caplog.messages == []
    call = fake_cuda_call()
    for _ in range(2):
        assert not takes_fused("auto", call) and not takes_fused("auto", call._replace(groups=groups_of(["energy"])))
        assert not takes_fused("reference", call)
    assert [record.levelname for record in caplog.records] == ["INFO", "INFO"]
    assert backend.NOT_DEFAULT in caplog.text and "it has no kernel for energy" in caplog.text


# --- several processes ------------------------------------------------------------------------------------------------


@pytest.mark.skipif(DEVICE == "cuda", reason="the processes run in the interpreter")
@pytest.mark.slow
def test_sync_batch_norm_on_two_processes():
    """Uneven parts of the batch on the fused path are the whole batch on the reference, outputs and gradients."""
    batches, upstreams = [torch.randn(3, 3, 9, 10)], [torch.randn(3, 7, 3, 3)]
    stem = make_stem(plan_of("cmod"), bias=True)
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


@pytest.mark.parametrize("rest", ("max", "blurpool"))
def test_both_paths_sum_the_same_over_processes(monkeypatch, rest):
    """Processes may differ in their path, where one has an empty part of a batch; then their sums have to match."""
    sums, x, start = [], images(), make_stem(plan_of("cmod", rest), bias=True).train()
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
@pytest.mark.slow
def test_distributed_data_parallel():
    """Each process gets the mean of both gradients, as on the reference."""
    stems = {name: make_stem(plan_of("cmod")).eval() for name in ("fused", "reference")}
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
    "centres": {"plan": plan_of("cmod")},
    "all-max": {"plan": ALL_MAX, "act": nn.ReLU(inplace=True)},
    "all-modulus": {"plan": ALL_MODULUS, "pool": nn.MaxPool2d(3, 2, ceil_mode=True)},
    "no norm": {"norm": False, "bias": True},
    "nothing but the convolution": {"norm": False, "act": nn.Identity()},
    "leaky": {"act": nn.LeakyReLU(0.2, inplace=True)},
    "every pooling": {"plan": EVERY, "bias": True},
    "centres and blurpool, no norm": {"plan": plan_of("cmod", "blurpool"), "norm": False, "bias": True},
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
    with_kernel = {"max", "cmod", "modulus"} & set(stem.poolings)
    assert len(calls) == 2 * len(with_kernel), "with gradients and without"
    for name, buffer in stem.named_buffers():
        assert_close(name, buffer.float(), other.get_buffer(name).float(), CLOSE)


@pytest.mark.parametrize(
    "options",
    ({"norm": False, "bias": True}, {}, {"plan": plan_of("modulus", "blurpool")}),
    ids=("without norm", "batch norm", "blurpool"),
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


@pytest.mark.parametrize("rest", ("max", "blurpool"))
def test_half_precision_agrees(rest):
    """In float16, by autocast and by the dtype of the stem; not bfloat16, which the interpreter does not compute."""
    stem, x = make_stem(plan_of("modulus", rest)).eval(), images()
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
@pytest.mark.parametrize("rest", ("max", "blurpool"))
def test_mixpool2d_agrees(needs_grad, act, rest, calls):
    scale, bias, shift = torch.randn(3, 7)
    tensors = {"weight": torch.randn(7, 3, 3, 3) / 5, "bias": bias, "scale": scale, "shift": shift}
    outs, grads = [], []
    for name in ("reference", "fused"):
        leaves = {key: t.to(DEVICE).clone().requires_grad_(needs_grad) for key, t in tensors.items()}
        torch.manual_seed(2)
        x = images(requires_grad=needs_grad)
        options = {"conv_stride": 2, "conv_padding": 1, "pool_padding": 1, "backend": name}
        options["pooling"] = plan_of("modulus", rest)
        out = mixpool2d(x, act=act, **leaves, **options)
        outs.append(out)
        if needs_grad:
            grads.append(torch.autograd.grad(out.square().sum(), leaves.values()))
    assert len(calls) == (2 if rest == "max" else 1)
    assert_close("out", outs[1], outs[0], CLOSE)
    for name, actual, expected in zip(tensors, *grads[::-1]) if needs_grad else ():
        assert_close(f"grad {name}", actual, expected, CLOSE)


def test_frozen_weights_and_trained_norm(calls):
    stem, x = make_stem(backend="fused"), images()
    stem.weight.requires_grad_(False)
    stem(x).sum().backward()
    assert stem.bn.weight.grad is not None and stem.weight.grad is None
    assert len(calls) == 2


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


def test_the_backend_is_passed_on():
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
    backend: str, name: str, shapes: list[tuple[int, ...]], dynamic: bool | None, plan=MIXED
) -> None:
    """Forward and backward of a compiled stem are those of the eager reference, images of one shape after the other."""
    stem = make_stem(plan, backend=name).train()
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


@pytest.mark.parametrize(("name", "dynamic"), [("reference", True), ("fused", True), ("fused", None)])
@pytest.mark.slow
def test_compiled_in_one_graph(compiler, calls, name, dynamic):
    """Traced by dynamo and differentiated by AOTAutograd."""
    shapes = [(2, 3, 9, 8), (3, 3, 11, 10)]
    assert_compiled_step("aot_eager", name, shapes if dynamic else shapes[:1], dynamic)
    assert bool(calls) == (name == "fused")


@pytest.mark.slow
def test_every_pooling_is_compiled_in_one_graph(compiler, calls):
    assert_compiled_step("aot_eager", "fused", [(2, 3, 9, 8), (3, 3, 11, 10)], True, EVERY)
    assert calls


@pytest.mark.slow
def test_inductor(compiler):
    assert_compiled_step("inductor", "fused", [(2, 3, 9, 8)], None)


@pytest.mark.parametrize("strict", (False, True), ids=("", "strict"))
def test_export_keeps_one_operator(compiler, strict):
    stem = make_stem("cmod", backend="fused").eval().requires_grad_(False)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(stem, (images(),), dynamic_shapes={"x": {0: batch}}, strict=strict)
    targets = [str(node.target) for node in program.graph.nodes]
    assert targets.count("mixpool.convolve_and_pool.default") == 1 and not any("conv2d" in name for name in targets)
    x = images(3, 3, 9, 8)
    stem.backend = "reference"
    assert_close("output", program.module()(x), stem(x), CLOSE)
