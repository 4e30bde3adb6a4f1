"""Stabilized networks through PyTorch's compilers and exporters: the same numbers, no reflected border in the graph.

Kept apart from the file of `stabilize`, because the poisoned memory of conftest.py has to stay outside.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from cheap_weights import make_cheap
from strided_net import SIZE, TREATED, images, trained
from support import assert_close
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

from mixpool import stabilize
from mixpool.stabilization.treat import treated_layers

SIDE = 47


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Not here: dynamo cannot trace the wrappers of conftest.py, and compiled code allocates by other means."""


@pytest.fixture(autouse=True)
def fresh_compiler():
    """No graph of one test serves another."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def small() -> nn.Module:
    model = trained()
    stabilize(model, images(), size=SIZE)
    assert treated_layers(model) == TREATED
    return model


def small_behind() -> nn.Module:
    model = trained()
    stabilize(model, images(), size=SIZE, order="behind")
    return model


def large(name: str, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    make_cheap(monkeypatch)
    model = torchvision.models.get_model(name, weights=None, num_classes=7).eval()
    stabilize(model, torch.randn(4, 3, SIDE + 8, SIDE + 8), size=SIDE, repair="statistics")
    monkeypatch.undo()
    return model


MODELS = {
    "small": lambda _: small(),
    "small, behind": lambda _: small_behind(),
    "squeezenet1_1": lambda monkeypatch: large("squeezenet1_1", monkeypatch),
    "resnet50": lambda monkeypatch: large("resnet50", monkeypatch),
}
NAMES = [pytest.param(name, marks=() if name.startswith("small") else pytest.mark.slow) for name in MODELS]
BATCHES = (1, 3)


def inputs(name: str, count: int) -> Tensor:
    side = SIZE if name.startswith("small") else SIDE
    return torch.randn(count, 3, side, side)


def close(title: str, actual: Tensor, expected: Tensor) -> None:
    """Relative to the logits, because random weights make them as large or small as they like."""
    scale = expected.abs().max().item()
    assert_close(title, actual / scale, expected / scale, (1e-4, 1e-4))


@pytest.fixture(params=NAMES)
def case(request, monkeypatch):
    return request.param, MODELS[request.param](monkeypatch)


@torch.no_grad()
def test_export_with_a_dynamic_batch(case):
    name, model = case
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (inputs(name, 2),), dynamic_shapes=({0: batch},))
    targets = {str(node.target) for node in program.graph.nodes}
    assert not any("reflect" in target or "replicat" in target for target in targets), targets
    for count in BATCHES:
        x = inputs(name, count)
        close(f"batch of {count}", program.module()(x), model(x))


@torch.no_grad()
def test_compiled_in_one_graph(case):
    name, model = case
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    for count in BATCHES:
        x = inputs(name, count)
        close(f"batch of {count}", compiled(x), model(x))
    x = inputs(name, 2).contiguous(memory_format=torch.channels_last)
    close("channels last", compiled(x), model(x))


def test_compiled_training_step():
    model = small().train()
    other = copy.deepcopy(model)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    x = inputs("small", 4)
    upstream = torch.randn(4, 4)
    model(x).backward(upstream), compiled(x).backward(upstream)
    for (key, parameter), own in zip(model.named_parameters(), other.parameters(), strict=True):
        assert_close(f"gradient of {key}", own.grad, parameter.grad, (2e-4, 2e-4))  # because of hundreds of products


# Because torch no longer develops torch.jit, and its tracer sees sizes become numbers.
@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore::torch.jit.TracerWarning")
@torch.no_grad()
def test_traced():
    model = small()
    x = inputs("small", 2)
    traced = torch.jit.trace(model, x)
    close("traced", traced(x), model(x))


@torch.no_grad()
def test_fx_takes_treated_layers_as_nodes():
    model = small()
    traced = torch.fx.symbolic_trace(model)
    nodes = {node.target for node in traced.graph.nodes if node.op == "call_module"}
    assert TREATED.keys() <= nodes
    x = inputs("small", 2)
    close("output", traced(x), model(x))


@torch.no_grad()
def test_feature_extractor_of_torchvision():
    model = small()
    x = inputs("small", 2)
    maps = create_feature_extractor(model, {"pool": "pooled", "head": "logits"})(x)
    close("logits", maps["logits"], model(x))
    close("pooled", maps["pooled"], model.pool(model.relu(model.norm(model.conv(x)))))


@torch.no_grad()
def test_vmap():
    model = small()
    x = inputs("small", 4)
    close("output", torch.func.vmap(model)(x[:, None])[:, 0], model(x))


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_onnx(name, monkeypatch):
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra mixpool[onnx]")
    pytest.importorskip("onnxscript", reason="needs the extra mixpool[onnx]")
    model = MODELS[name](monkeypatch)
    program = torch.onnx.export(model, (inputs(name, 2),), dynamo=True, dynamic_shapes=({0: "batch"},), verbose=False)
    pads = [a for node in program.model_proto.graph.node if node.op_type == "Pad" for a in node.attribute]
    assert not any(attribute.s in (b"reflect", b"edge") for attribute in pads)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    for count in BATCHES:
        x = inputs(name, count)
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        close(f"batch of {count}", torch.from_numpy(found), model(x))
