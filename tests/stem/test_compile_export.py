"""The stem through PyTorch's compilers and exporters: the same numbers as eager, in one graph."""

from __future__ import annotations

import copy

import pytest
import torch
from support import EVERY, MIXED, PLANS, assert_close, plan_of, stem_parts
from torch import Tensor, nn

from mixpool import MixPoolStem

GEOMETRIES = {
    "padding 1": nn.MaxPool2d(3, 2, 1),
    "padding 0, ceil_mode": nn.MaxPool2d(3, 2, ceil_mode=True),
}


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Not here: dynamo cannot trace the wrappers of conftest.py, and compiled code allocates by other means."""


@pytest.fixture(autouse=True)
def fresh_compiler():
    """No graph of one test serves another."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def mixed_stem(pool: nn.MaxPool2d = GEOMETRIES["padding 1"], plan=MIXED, **options) -> MixPoolStem:
    return MixPoolStem(*stem_parts(pool=pool), **{"pooling": plan, **options})


def training_step(function, stem: MixPoolStem, x: Tensor, upstream: Tensor) -> dict[str, Tensor]:
    """Output, gradients and buffers after one forward and backward pass."""
    x = x.clone().requires_grad_()
    out = function(x)
    out.backward(upstream)
    grads = {f"gradient of {name}": p.grad for name, p in stem.named_parameters()}
    return {"output": out, "gradient of x": x.grad, **grads, **{n: b.clone() for n, b in stem.bn.named_buffers()}}


def assert_same_step(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        # because a gradient sums hundreds of products, in another order
        assert_close(name, tensor.float(), expected[name].float(), (2e-4, 2e-4))


@pytest.mark.slow
def test_inductor_in_evaluation():
    stem = mixed_stem(plan=EVERY).eval()
    compiled = torch.compile(copy.deepcopy(stem), fullgraph=True)
    x = torch.randn(2, 3, 33, 30)
    with torch.no_grad():
        assert_close("output", compiled(x), stem(x))


@pytest.mark.slow
def test_inductor_in_training():
    stem = mixed_stem(plan=EVERY).train()
    other = copy.deepcopy(stem)
    x = torch.randn(2, 3, 33, 30)
    upstream = torch.randn(2, 7, 9, 8)
    compiled = training_step(torch.compile(other, fullgraph=True), other, x, upstream)
    assert_same_step(compiled, training_step(stem, stem, x, upstream))


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("pool", GEOMETRIES.values(), ids=GEOMETRIES)
def test_one_graph_in_training_and_evaluation(plan, pool):
    """Traced by dynamo and differentiated by AOTAutograd, without the code generator."""
    stem = mixed_stem(pool, plan).train()
    other = copy.deepcopy(stem)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 33, 30)
    upstream = torch.randn_like(stem.eval()(x))
    stem.train()
    assert_same_step(training_step(compiled, other, x, upstream), training_step(stem, stem, x, upstream))
    stem.eval(), other.eval()
    assert_close("evaluation", compiled(x), stem(x))


@pytest.mark.slow
def test_compiled_without_a_break_for_every_size():
    stem = mixed_stem().eval()
    compiled = torch.compile(stem, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in ((2, 3, 33, 30), (3, 3, 40, 51), (5, 3, 64, 64)):
        x = torch.randn(shape)
        assert_close(f"{shape}", compiled(x), stem(x))


def test_compiled_under_autocast():
    stem = mixed_stem(plan=EVERY).eval()
    compiled = torch.compile(stem, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 33, 30)
    expected = stem(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = compiled(x)
    assert out.dtype == torch.bfloat16
    assert_close("output", out, expected, (0.08, 0.03))  # as eager under autocast, in test_module.py


class EveryVariant(nn.Module):
    """Stems of every pooling and both geometries side by side, so that one export covers them."""

    def __init__(self) -> None:
        super().__init__()
        self.stems = nn.ModuleList(
            mixed_stem(pool, plan) for pool in GEOMETRIES.values() for plan in (EVERY, plan_of("cmod", "blurpool"))
        )

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(stem(x) for stem in self.stems)


def test_export_with_a_dynamic_batch():
    model = EveryVariant().eval()
    batch = torch.export.Dim("batch", min=1, max=1024)
    program = torch.export.export(model, (torch.randn(2, 3, 33, 30),), dynamic_shapes={"x": {0: batch}})
    for count in (1, 5):
        x = torch.randn(count, 3, 33, 30)
        for out, expected in zip(program.module()(x), model(x), strict=True):
            assert_close(f"batch of {count}", out, expected)


@pytest.mark.slow
def test_onnx():
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra mixpool[onnx]")
    pytest.importorskip("onnxscript", reason="needs the extra mixpool[onnx]")
    model = EveryVariant().eval()
    program = torch.onnx.export(
        model, (torch.randn(2, 3, 33, 30),), dynamo=True, dynamic_shapes={"x": {0: "batch"}}, verbose=False
    )
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    for count in (1, 5):
        x = torch.randn(count, 3, 33, 30)
        outs = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        for out, expected in zip(outs, model(x), strict=True):
            assert_close(f"batch of {count}", torch.from_numpy(out), expected)


def test_fx_takes_the_stem_as_one_node():
    model = nn.Sequential(mixed_stem(), nn.Conv2d(7, 4, 3), nn.ReLU()).eval()
    traced = torch.fx.symbolic_trace(model)
    calls = [(node.op, node.target) for node in traced.graph.nodes if node.op.startswith("call")]
    assert calls == [("call_module", "0"), ("call_module", "1"), ("call_module", "2")]
    x = torch.randn(2, 3, 33, 30)
    assert_close("output", traced(x), model(x))


# Because torch's own forward-mode rules still go through torch.jit.
@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning", "ignore:.torch.jit:DeprecationWarning")
def test_forward_mode_derivatives():
    stem = MixPoolStem(*stem_parts(dtype=torch.float64), pooling=EVERY).eval()
    x, tangent = torch.randn(2, 2, 3, 17, 14, dtype=torch.float64)
    out, derivative = torch.func.jvp(stem, (x,), (tangent,))
    assert_close("output", out, stem(x))
    step = 1e-6
    difference = (stem(x + step * tangent) - stem(x - step * tangent)) / (2 * step)
    assert_close("derivative", derivative, difference, (1e-6, 1e-6))  # because of the difference quotient


def test_functional_gradients():
    stem = MixPoolStem(*stem_parts(dtype=torch.float64), pooling=EVERY).eval()
    parameters = dict(stem.named_parameters())
    x = torch.randn(2, 3, 17, 14, dtype=torch.float64)
    upstream = torch.randn_like(stem(x))

    def loss(values):
        return (torch.func.functional_call(stem, values, (x,)) * upstream).sum()

    expected = torch.autograd.grad(stem(x), list(parameters.values()), upstream)
    for (name, grad), other in zip(torch.func.grad(loss)(parameters).items(), expected, strict=True):
        assert_close(name, grad, other)


def test_per_sample_gradients():
    stem = MixPoolStem(*stem_parts(dtype=torch.float64), pooling=EVERY).eval()
    parameters = dict(stem.named_parameters())
    x = torch.randn(3, 3, 17, 14, dtype=torch.float64)
    upstream = torch.randn_like(stem(x))

    def loss(values, image, weights):
        return (torch.func.functional_call(stem, values, (image[None],)) * weights).sum()

    together = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, x, upstream)
    for sample in range(len(x)):
        alone = torch.autograd.grad(stem(x[sample : sample + 1]), list(parameters.values()), upstream[sample][None])
        for (name, grads), expected in zip(together.items(), alone, strict=True):
            assert_close(f"{name} of {sample}", grads[sample], expected)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning", "ignore:.torch.jit:FutureWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("plan", [MIXED, EVERY], ids=["two groups of one convolution", "every"])
def test_a_trace_passes_torchs_own_check_and_serves_other_sizes(plan):
    """The check runs without gradients, where groups are otherwise convolved together."""
    stem = mixed_stem(plan=plan).eval()
    traced = torch.jit.trace(stem, torch.randn(1, 3, 32, 32))
    x = torch.randn(2, 3, 41, 56)
    assert_close("another size", traced(x), stem(x))
