"""On a CPU, inference computes a large batch in parts: the same numbers, and only where parts are allowed.

Legend: N images. Parts are seen by the sizes of the batches that are convolved.
"""

from __future__ import annotations

import copy

import pytest
import torch
from support import ALL_MAX, EVERY, MIXED, PLANS, assert_close, assert_same_bits, stem_parts
from torch import Tensor

from mixpool import MixPoolStem, mixpool2d
from mixpool.ops import functional, reference
from mixpool.ops.reference import POOLINGS

WHOLE = 2**40  # bytes
SIZE = (18, 22)  # of the images: 9 x 11 positions at stride 2
REAL_ONLY = [name for name, plan in PLANS.items() if not any(POOLINGS[pooling].is_complex for pooling in plan)]


@pytest.fixture
def sizes(monkeypatch) -> list[int]:
    """Of the batches that were convolved, one after the other."""
    seen = []

    def recorded(x: Tensor, *arguments):
        seen.append(len(x))
        return convolved(x, *arguments)

    convolved = reference._convolved
    monkeypatch.setattr(reference, "_convolved", recorded)
    return seen


@pytest.fixture
def at_a_time(monkeypatch):
    """Sets how many images of SIZE are computed at a time by a stem of this plan."""

    def set_to(count: int, plan: tuple[str, ...], itemsize: int = 4) -> None:
        filters = sum(2 if POOLINGS[name].is_complex else 1 for name in plan)
        monkeypatch.setattr(functional, "MAP_BYTES", count * filters * 9 * 11 * itemsize)

    return set_to


def stem_of(plan: tuple[str, ...], dtype: torch.dtype = torch.float32) -> MixPoolStem:
    return MixPoolStem(*stem_parts(dtype=dtype), pooling=plan).eval()


def images(count: int, dtype: torch.dtype = torch.float32, memory_format=torch.contiguous_format) -> Tensor:
    return torch.randn(count, 3, *SIZE, dtype=dtype).contiguous(memory_format=memory_format)


# --- the same numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("plan", [name for name in PLANS if name not in REAL_ONLY])
def test_parts_give_what_the_whole_gives(plan, dtype, memory_format, sizes, at_a_time):
    stem, x = stem_of(PLANS[plan], dtype), images(5, dtype, memory_format)
    with torch.no_grad():
        at_a_time(5, PLANS[plan], dtype.itemsize)
        whole = stem(x)
        assert sizes == [5]
        at_a_time(2, PLANS[plan], dtype.itemsize)
        parts = stem(x)
        assert sizes == [5, 2, 2, 1]
    assert_close("output", parts, whole)
    for out in (whole, parts):
        assert out.is_contiguous(memory_format=memory_format)


def test_mixpool2d_has_parts_too(sizes, at_a_time):
    x, weight = images(5), torch.randn(7, 3, 5, 5)
    options = {"pooling": EVERY, "scale": torch.randn(7), "shift": torch.randn(7), "bias": torch.randn(7)}
    options |= {"conv_stride": 2, "conv_padding": 2, "pool_padding": 1}
    whole = mixpool2d(x, weight, **options)
    at_a_time(3, EVERY)
    assert_close("output", mixpool2d(x, weight, **options), whole)
    assert sizes == [5, 3, 2]


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7])
def test_batches_of_all_sizes(count, sizes, at_a_time):
    stem, x = stem_of(EVERY), images(count)
    with torch.no_grad():
        whole = stem(x)
        at_a_time(2, EVERY)
        parts = stem(x)
    assert_close("output", parts, whole)
    assert parts.shape == (count, 7, 5, 6)
    assert sizes[1:] == {0: [0], 1: [1], 2: [2], 3: [2, 1], 7: [2, 2, 2, 1]}[count]


def test_an_image_larger_than_the_limit_is_one_part(sizes, monkeypatch):
    monkeypatch.setattr(functional, "MAP_BYTES", 1)
    stem, x = stem_of(MIXED), images(3)
    with torch.no_grad():
        parts = stem(x)
        monkeypatch.setattr(functional, "MAP_BYTES", WHOLE)
        assert_close("output", parts, stem(x))
    assert sizes == [1, 1, 1, 3]


# --- where a batch stays whole ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", [ALL_MAX, ("blurpool",) * 7, ("max", "blurpool") * 3 + ("max",)], ids=str)
def test_real_poolings_alone_stay_whole(plan, sizes, monkeypatch):
    """So that they repeat the stock convolution bit by bit."""
    stem, x = stem_of(plan), images(5)
    with torch.no_grad():
        whole = stem(x)
        monkeypatch.setattr(functional, "MAP_BYTES", 1)
        assert_same_bits("output", stem(x), whole)
    assert sizes == [5, 5]


def test_what_will_be_differentiated_stays_whole(sizes, monkeypatch):
    monkeypatch.setattr(functional, "MAP_BYTES", 1)
    stem, x = stem_of(MIXED), images(5)
    stem(x)
    assert sizes == [5], "gradients of the parameters"
    stem.requires_grad_(False)
    stem(x.clone().requires_grad_())
    assert sizes == [5, 5], "gradients of the images"
    stem(x)
    assert sizes == [5, 5, 1, 1, 1, 1, 1], "a frozen stem"


def test_statistics_of_a_batch_are_those_of_the_whole(sizes, monkeypatch):
    stem, x = stem_of(MIXED).train(), images(5)
    other = copy.deepcopy(stem)
    with torch.no_grad():
        expected = other(x)
        monkeypatch.setattr(functional, "MAP_BYTES", 1)
        assert_same_bits("output", stem(x), expected)
    assert sizes == [5, 5]
    for name, buffer in stem.named_buffers():
        assert torch.equal(buffer, other.get_buffer(name)), name


def test_transformed_calls_stay_whole(sizes, monkeypatch):
    stem, x = stem_of(MIXED).requires_grad_(False), images(6)
    expected = stem(x)
    monkeypatch.setattr(functional, "MAP_BYTES", 1)
    out = torch.vmap(stem)(x.reshape(2, 3, 3, *SIZE)).flatten(0, 1)
    assert_close("output", out, expected)
    assert sizes == [6, 3]


# --- compiled ---------------------------------------------------------------------------------------------------------


class Compiled:
    """A stem compiled by aot_eager, and in how many parts each of its graphs convolves the images."""

    def __init__(self, stem: MixPoolStem, **options) -> None:
        from torch._dynamo.backends.registry import lookup_backend

        def backend(graph: torch.fx.GraphModule, inputs):
            convolutions = [node for node in graph.graph.nodes if "conv2d" in str(node.target)]
            channels = [node.args[1].meta["example_value"].shape[1] for node in convolutions]  # 1: a low-pass
            self.parts.append(channels.count(3))
            return lookup_backend("aot_eager")(graph, inputs)

        self.parts: list[int] = []
        torch.compiler.reset()
        self.call = torch.compile(stem, backend=backend, fullgraph=True, **options)


@pytest.fixture
def compiler(monkeypatch):
    """Dynamo, which cannot trace the poisoned allocators of conftest.py; no graph of one test serves another."""
    monkeypatch.undo()
    yield
    torch.compiler.reset()


ENERGY = ("energy", "modulus") * 3 + ("energy",)  # one convolution for all of them


@pytest.mark.slow
def test_a_graph_for_one_size_has_few_parts(compiler, at_a_time):
    """More than four would make the graph long."""
    stem, x = stem_of(ENERGY), images(8)
    with torch.no_grad():
        for count, parts in ((8, 1), (4, 2), (2, 4), (1, 1)):
            at_a_time(count, ENERGY)
            compiled = Compiled(stem, dynamic=False)
            assert_close(f"{count} at a time", compiled.call(x), stem(x))
            assert compiled.parts == [parts], count


@pytest.mark.slow
def test_a_graph_for_many_sizes_has_no_parts(compiler, at_a_time):
    stem = stem_of(ENERGY)
    at_a_time(2, ENERGY)
    seen = None
    with torch.no_grad():
        compiled = Compiled(stem, dynamic=True)
        for count, size in ((8, SIZE), (3, SIZE), (11, SIZE), (4, (30, 25))):
            x = torch.randn(count, 3, *size)
            assert_close(f"{count} images of {size}", compiled.call(x), stem(x))
            seen = list(compiled.parts) if seen is None else seen  # the compiler may start over in its first call
    assert compiled.parts == seen and set(seen) == {1}, "one graph for all"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("memory_format", "dynamic"),
    [(torch.contiguous_format, True), (torch.channels_last, False), (torch.channels_last, True)],
    ids=str,
)
def test_every_pooling_compiled_in_parts(memory_format, dynamic, compiler, at_a_time):
    stem, x = stem_of(EVERY), images(5, memory_format=memory_format)
    with torch.no_grad():
        expected = stem(x)
        at_a_time(2, EVERY)
        out = Compiled(stem, dynamic=dynamic).call(x)
    assert_close("output", out, expected)
    assert out.is_contiguous(memory_format=memory_format)
