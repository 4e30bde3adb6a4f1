"""Checkpoints written by mixpool 0.1 (commit d77d984, see tests/fixtures/README.md) load unchanged."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from support import assert_close, assert_same_bits
from torch import Tensor, nn

from mixpool import convert, revert, stock_state_dict

FOLDER = Path(__file__).parent.parent / "fixtures"
POOLINGS = {
    "cmod": ("cmod",) * 8,
    "modulus_max": tuple("modulus" if i % 3 > 0 else "max" for i in range(8)),
    "modulus_blurpool": ("blurpool",) * 3 + ("modulus",) * 5,
}
PLANS = {
    "max": {"select": "none"},
    "energy": {"select": "all", "pooling": "energy"},
    "cmod and blurpool": {"select": [True, False] * 4, "pooling": "cmod", "rest": "blurpool"},
}
ROUNDING = (1e-6, 1e-5)  # of float32, and of other orders of the same sums


class Old:
    """One file: the state, the stock state, an image, and what the model of that time made of it."""

    def __init__(self, name: str) -> None:
        self.poolings = POOLINGS[name]
        tensors = safetensors.torch.load_file(FOLDER / f"{name}.safetensors")
        self.x, self.y = tensors["x"], tensors["y"]
        self.state, self.stock = (
            {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            for prefix in ("state.", "stock.")
        )


@pytest.fixture(params=POOLINGS)
def old(request) -> Old:
    return Old(request.param)


def network() -> nn.Sequential:
    stem = nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
    return nn.Sequential(*stem, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 5)).eval()


def converted(**options) -> nn.Sequential:
    model = network()
    convert(model, **options or PLANS["max"])
    return model


def output(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_it_loads_whatever_the_plan_was(old: Old, plan: dict):
    model = converted(**plan)
    keys = model.load_state_dict(old.state)
    assert not keys.missing_keys and not keys.unexpected_keys
    assert model[0].poolings == old.poolings
    assert_close("y", output(model, old.x), old.y, ROUNDING)
    assert model.state_dict().keys() == old.state.keys()
    for key, value in old.state.items():
        assert_same_bits(key, model.state_dict()[key], value)


def test_the_test_of_outputs_can_fail(old: Old):
    """The same weights on other poolings give other outputs."""
    model = converted()
    model.load_state_dict(old.state)
    for pooling in {"max", "modulus", "energy"} - set(old.poolings):
        model[0].lay([pooling if name in ("cmod", "modulus") else name for name in old.poolings])
        assert (output(model, old.x) - old.y).abs().max() > 100 * ROUNDING[0]


def test_its_stock_weights(old: Old):
    model = converted()
    model.load_state_dict(old.state)
    stock = stock_state_dict(model)
    assert stock.keys() == old.stock.keys()
    for key, value in old.stock.items():
        assert_close(key, stock[key], value, ROUNDING)
    plain = network()
    plain.load_state_dict(old.stock)
    assert_close("reverted", output(revert(model), old.x), output(plain, old.x), ROUNDING)


def test_it_loads_as_timm_loads(old: Old, tmp_path):
    safetensors.torch.save_file(old.state, tmp_path / "model.safetensors")
    torch.save({"state_dict": {f"module.{key}": value for key, value in old.state.items()}}, tmp_path / "model.pth.tar")
    for name in ("model.safetensors", "model.pth.tar"):
        model = converted()
        timm.models.load_checkpoint(model, str(tmp_path / name), strict=True)
        assert model[0].poolings == old.poolings
        assert_close(name, output(model, old.x), old.y, ROUNDING)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_precision(old: Old, dtype: torch.dtype):
    """The plan survives rounding: into a half model, and as a checkpoint that was halved itself."""
    halved = {key: value.to(dtype) if value.is_floating_point() else value for key, value in old.state.items()}
    rounding = 4 * torch.finfo(dtype).eps
    for model, state in ((converted().to(dtype), old.state), (converted().to(dtype), halved), (converted(), halved)):
        model.load_state_dict(state)
        assert model[0].poolings == old.poolings
        y = output(model, old.x.to(model[0].weight.dtype))
        assert_close("y", y.float(), old.y, (rounding, rounding))


def test_with_assign(old: Old):
    model = converted()
    state = copy.deepcopy(old.state)
    model.load_state_dict(state, assign=True)
    assert model[0].plan.data_ptr() == state["0.plan"].data_ptr()
    assert model[0].poolings == old.poolings
    assert_close("y", output(model, old.x), old.y, ROUNDING)
    empty = converted().to("meta")
    empty.load_state_dict(state, assign=True)
    assert_close("y", output(empty, old.x), old.y, ROUNDING)


@pytest.mark.parametrize("strict", [True, False])
def test_free_imaginary_filters_are_refused(old: Old, strict: bool):
    model = converted()
    state = {**old.state, "0.weight_imag": torch.zeros(8, 3, 7, 7)}
    with pytest.raises(RuntimeError, match='0.weight_imag.*imag="free".*no free imaginary filters.*mixpool 0.1'):
        model.load_state_dict(state, strict=strict)
