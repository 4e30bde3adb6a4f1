"""A plan as numbers, and what follows from it: never another plan than the buffer's, whoever wrote it."""

from __future__ import annotations

import copy

import pytest
import torch
from support import ALL_MAX, EVERY, MIXED, assert_close, assert_same_bits, plan_of, stem_parts
from torch import nn
from torch.func import functional_call, stack_module_state, vmap

from mixpool import MixPoolStem
from mixpool.ops.reference import POOLINGS
from mixpool.stem.state import decode_direction, decode_poolings, encode, structure_of


def make_stem(pooling=EVERY, seed: int = 1, **options) -> MixPoolStem:
    return MixPoolStem(*stem_parts(seed=seed, dtype=torch.float64, **options), pooling=pooling).eval()


def x() -> torch.Tensor:
    return torch.randn(2, 3, 20, 17, dtype=torch.float64)


# --- the numbers ------------------------------------------------------------------------------------------------------


def test_a_plan_survives_as_small_integers():
    direction = torch.randn(len(POOLINGS), 2, dtype=torch.float64)
    plan = encode(tuple(POOLINGS), direction)
    assert plan.dtype == torch.float32 and torch.equal(plan, plan.round()) and plan.abs().max() < 256
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        assert decode_poolings(plan.to(dtype)) == tuple(POOLINGS)
        angle = torch.nn.functional.cosine_similarity(decode_direction(plan.to(dtype)), direction)
        assert (1 - angle).abs().max() < 1e-8  # within 0.005 degree


@pytest.mark.parametrize("wrong", [5.0, -1.0, float("nan"), float("inf")])
def test_damaged_numbers_are_named(wrong):
    plan = encode(("max", "energy"), torch.ones(2, 2))
    plan[0, 0] = wrong
    with pytest.raises(ValueError, match="expected the plan to hold poolings 0 to 4 and directions"):
        decode_poolings(plan)


def test_what_follows_from_a_plan():
    direction = torch.randn(7, 2, dtype=torch.float64)
    found = structure_of(encode(EVERY, direction), (5, 4), torch.device("cpu"), torch.float32)
    assert found.poolings == EVERY
    assert {group.pooling: group.index.tolist() for group in found.groups} == {
        "max": [1, 5],
        "cmod": [4],
        "blurpool": [2],
        "modulus": [3],
        "energy": [0, 6],
    }
    assert found.complex_index.tolist() == [4, 3, 0, 6] and found.partner_map.shape == (4, 20, 20)
    assert structure_of(encode(ALL_MAX, direction), (5, 4), torch.device("cpu"), torch.float32).partner_map is None


# --- plan and computation never disagree ------------------------------------------------------------------------------


def test_no_structure_lies_among_the_buffers():
    names = {name for name, buffer in make_stem().named_buffers() if not buffer.is_floating_point()}
    assert names == {"bn.num_batches_tracked"}
    assert set(dict(make_stem().named_buffers(recurse=False))) == {"plan", "calibration"}


@pytest.mark.parametrize("write", ["copy_", "data", "slices", "setattr", "functional_call"])
def test_a_plan_written_in_any_way_is_what_is_computed(write):
    source, stem, images = make_stem(EVERY), make_stem(MIXED, seed=2), x()
    expected, before = source(images), stem(images)
    state = source.state_dict()
    with torch.no_grad():
        if write == "functional_call":
            everything = {**dict(source.named_parameters()), **dict(source.named_buffers())}
            assert_close("output", functional_call(stem, everything, (images,)), expected)
            assert_close("afterwards", stem(images), before)
            return
        for name, value in stem.state_dict(keep_vars=True).items():
            if write == "data":
                value.data.copy_(state[name])
            elif write == "slices" and value.ndim > 0:
                value[:3], value[3:] = state[name][:3], state[name][3:]
            elif write == "setattr" and name == "plan":
                stem.plan = state[name].clone()
            else:
                value.copy_(state[name])
    assert_same_bits("output", stem(images), expected)
    assert stem.poolings == EVERY


def test_a_damaged_plan_raises_at_the_next_pass():
    stem = make_stem()
    stem.plan[2, 0] = 17
    with pytest.raises(ValueError, match="expected the plan to hold poolings 0 to 4"):
        stem(x())


def test_a_moving_average_of_buffers_keeps_the_plan():
    stem = make_stem()
    average = copy.deepcopy(stem)
    for decay in (0.9, 0.9999, 0.99998):
        for _ in range(20):
            for own, new in zip(average.buffers(), stem.buffers()):
                own.copy_(own * decay + new * (1 - decay))
    images = x()
    assert_close("output", average(images), stem(images))
    assert average.poolings == EVERY


def test_laying_a_plan():
    stem, images = make_stem("max"), x()
    assert stem.lay("energy") is stem and stem.poolings == ("energy",) * 7 and stem.num_complex == 7
    energy = stem(images)
    assert_same_bits("back on max", stem.lay("max")(images), make_stem("max")(images))
    assert (energy - stem(images)).abs().max() > 0.01
    direction = decode_direction(make_stem("energy").plan)
    assert_close("given directions", stem.lay("energy", direction)(images), energy)
    for wrong in ("mean", ["max"] * 6, [True] * 7):
        with pytest.raises(ValueError, match="poolings"):
            stem.lay(wrong)
    assert stem.poolings == ("energy",) * 7, "a refused plan changes nothing"


def test_ensembles_of_models():
    """torch.func.vmap over stacked models: other weights and directions; other poolings are refused."""
    stems = [make_stem(EVERY, seed) for seed in (1, 2, 3)]
    images = x()
    parameters, buffers = stack_module_state(stems)
    base = copy.deepcopy(stems[0])

    def call(own_parameters, own_buffers):
        return functional_call(base, (own_parameters, own_buffers), (images,))

    outs = vmap(call)(parameters, buffers)
    for out, stem in zip(outs, stems, strict=True):
        assert_close("output", out, stem(images))
    parameters, buffers = stack_module_state([make_stem(EVERY), make_stem(MIXED)])
    with pytest.raises(ValueError, match="same poolings under torch.func.vmap, got several plans"):
        vmap(call)(parameters, buffers)


def test_made_in_nobodys_mode():
    with torch.inference_mode():
        stem = MixPoolStem(*stem_parts(), pooling=plan_of("energy"))
        state = stem.state_dict()
        stem.load_state_dict(state)
    torch.set_default_device("meta")
    try:
        conv = nn.Conv2d(3, 7, 5, 2, 2, device="cpu")
        other = MixPoolStem(conv, pool=nn.MaxPool2d(3, 2, 1), pooling="modulus")
        assert other.plan.device.type == other.calibration.device.type == "cpu"
        out = other(torch.randn(1, 3, 20, 20, device="cpu"))
    finally:
        torch.set_default_device(None)
    assert torch.isfinite(out).all() and not stem.imaginary_weight().is_inference()


def test_a_stem_on_the_meta_device_takes_a_state():
    """As transformers and accelerate build models: without memory first, then with the checkpoint's own tensors."""
    state, images = make_stem(EVERY).state_dict(), x()
    with torch.device("meta"):
        stem = MixPoolStem(*stem_parts(), pooling="max").eval()
    with pytest.raises(ValueError, match="weights to exist, got a meta tensor"):
        stem.lay("modulus")
    stem.load_state_dict(state, assign=True)
    assert_same_bits("assign", stem(images), make_stem(EVERY)(images))
    empty = make_stem(MIXED).to_empty(device="cpu")
    empty.load_state_dict(state)
    assert_same_bits("to_empty", empty(images), make_stem(EVERY)(images))


@pytest.mark.slow
def test_a_compiled_stem_raises_or_follows():
    torch.compiler.reset()
    stem, images = make_stem(MIXED), x()
    compiled = torch.compile(stem, backend="aot_eager", fullgraph=True)
    assert_close("compiled", compiled(images), stem(images))
    with torch.no_grad():
        stem.plan[0, 0] = 0
    with pytest.raises(RuntimeError, match="plan was written to after torch.compile"):
        compiled(images)
    stem.lay(EVERY)
    assert_close("laid anew", compiled(images), make_stem(EVERY)(images))
    stem.load_state_dict(make_stem("energy").state_dict())
    assert_close("loaded", compiled(images), make_stem("energy")(images))
    torch.compiler.reset()
