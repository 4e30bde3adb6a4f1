"""`convert` and `revert`: all or nothing, the same Parameters, nothing lost, and a report that says what was done."""

from __future__ import annotations

import contextlib
import copy
import importlib
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from small_net import CHANNELS, STEMS, STRIPES, Net, assert_unchanged, smooth_images, snapshot
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import mixpool
from mixpool import StemError, convert, revert, stock_state_dict
from mixpool.conversion.swap import Placeholder
from mixpool.selection.stats import FilterStats

conversion = importlib.import_module("mixpool.conversion.convert")  # `mixpool.convert` is the function
swapping = importlib.import_module("mixpool.conversion.swap")


@pytest.fixture
def images() -> Tensor:
    return smooth_images()


# --- all or nothing ---------------------------------------------------------------------------------------------------


class Failure(Exception):
    pass


def fail(*args, **kwargs):
    raise Failure


@pytest.mark.parametrize(
    "place",
    [
        "mixpool.conversion.convert.find_stem",
        "mixpool.conversion.convert.first_batches",
        "mixpool.conversion.convert.module_inputs",
        "mixpool.conversion.convert.outputs_of",
        "mixpool.conversion.convert.MixPoolStem",
        "mixpool.conversion.convert.choose",
        "mixpool.conversion.convert.calibrate",
        "mixpool.conversion.convert.swap",
        "mixpool.conversion.convert.agreement_of",
        "mixpool.conversion.swap.Placeholder",
        "mixpool.conversion.swap.move_hooks",
        "mixpool.conversion.swap.set_submodule",
        "mixpool.conversion.swap.key_holder",
        "mixpool.conversion.swap.StockKeys",
        "mixpool.conversion.swap.feature_entries",
        "mixpool.stem.module.encode",
        "mixpool.stem.state.analytic_partner_map",
        "mixpool.selection.rules.measure",
        "mixpool.selection.calibrate._least_squares",
    ],
)
def test_a_failure_anywhere_changes_nothing(monkeypatch, images, place: str):
    model = Net()
    model.feature_info = [{"num_chs": CHANNELS, "reduction": 2, "module": "relu"}]
    model.bn1.eval()
    model.conv1.register_forward_hook(lambda *args: None)
    before = snapshot(model)
    module, name = place.rsplit(".", 1)
    monkeypatch.setattr(importlib.import_module(module), name, fail)
    with pytest.raises(Failure):
        convert(model, select=STRIPES, images=images)
    assert_unchanged(model, before)
    assert model.feature_info[0]["reduction"] == 2
    monkeypatch.undo()
    convert(model, select=STRIPES, images=images)  # and the next attempt works


@pytest.mark.parametrize("calls_before_failure", range(6))
def test_a_failure_after_some_swaps_changes_nothing(monkeypatch, images, calls_before_failure: int):
    """The modules are swapped one by one; whichever swap fails, all come back."""
    model = Net()
    before, calls = snapshot(model), []
    original = swapping.set_submodule

    def flaky(*args):
        calls.append(args)
        if len(calls) == calls_before_failure + 1:
            raise Failure
        return original(*args)

    monkeypatch.setattr(swapping, "set_submodule", flaky)
    with pytest.raises(Failure) if calls_before_failure < 4 else contextlib.nullcontext():
        convert(model, select="all", images=images)
    if calls_before_failure < 4:
        assert_unchanged(model, before)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("call", range(5))
def test_a_failing_forward_changes_nothing(images, error: type, call: int):
    """The model runs on the images before and after the swap; it may fail (out of memory, Ctrl-C) at any call."""

    class Fails(Net):
        calls = -1

        def forward(self, x: Tensor) -> Tensor:
            if isinstance(x, Tensor):  # not the symbolic trace
                Fails.calls += 1
                if Fails.calls == call:
                    raise error("in forward")
            return super().forward(x)

    model = Fails()
    before = snapshot(model)
    seen = ValueError if error is RuntimeError else error  # it then says which images the model could not run on
    with pytest.raises(seen, match="in forward") if call < 3 else contextlib.nullcontext():
        convert(model, select="all", images=images)
    if call < 3:
        assert_unchanged(model, before)
    else:  # one batch: outputs before, inputs of the stem, outputs after
        assert Fails.calls == 2


def test_a_failure_after_the_calibration_restores_every_bit(monkeypatch, images):
    for options in STEMS.values():
        model = Net(**options)
        model.eval()
        before = snapshot(model)
        expected = model(images)
        with monkeypatch.context() as patch:
            patch.setattr(swapping, "key_holder", fail)
            with pytest.raises(Failure):
                convert(model, select="all", images=images)
        assert_unchanged(model, before)
        assert torch.equal(model(images), expected)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"select": "modulus"}, ["'modulus'", '"auto"', '"all"', '"none"']),
        ({"select": [True] * 7}, ["8 booleans", "7"]),
        ({"select": torch.ones(9, dtype=torch.bool)}, ["8 booleans", "9"]),
        ({"select": [0, 1, 2, 0, 0, 0, 0, 0]}, ["8 booleans", "2"]),
        ({"select": lambda stats: [True]}, ["8 booleans", "1"]),
        ({"select": 3}, ["select"]),
        ({"select": None}, ["select"]),
        ({"select": torch.ones(8, 2)}, ["8 booleans"]),
        ({"select": lambda stats: None}, ["select"]),
        ({"select": ["modulus"] * 7}, ["8 booleans", "7"]),
        ({"select": ["modulus"] * 7 + ["mean"]}, ["8 booleans", "'mean'"]),
        ({"pooling": "mean"}, ["pooling", "'cmod', 'modulus', 'energy'", "'mean'"]),
        ({"pooling": "max"}, ["pooling", "'cmod', 'modulus', 'energy'", "'max'"]),
        ({"rest": "modulus"}, ["rest", "'max', 'blurpool'", "'modulus'"]),
        ({"backend": "cuda"}, ["backend", "'cuda'"]),
        ({"images": []}, ["at least one image"]),
        ({"images": torch.empty(0, 3, 32, 32)}, ["at least one image"]),
        ({"images": torch.zeros(2, 3, 32, 32, dtype=torch.uint8)}, ["float", "uint8"]),
        ({"images": torch.zeros(32, 32)}, ["(N, ", "(32, 32)"]),
        ({"images": ["photo.jpg"]}, ["float tensors", "str"]),
        ({"images": 7}, ["images", "7"]),
        ({"images": np.zeros((2, 3, 32, 32), dtype=np.float32)}, ["tensors", "ndarray"]),
        ({"images": [{"image": torch.zeros(2, 3, 32, 32)}]}, ["tensors", "dict"]),
    ],
    ids=lambda value: str(next(iter(value))) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_named(options: dict, words: list[str]):
    model = Net()
    before = snapshot(model)
    with pytest.raises(ValueError) as caught:
        convert(model, **{"select": "all"} | options)
    assert [word for word in words if word not in str(caught.value)] == [], caught.value
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("old", "now"),
    [
        ({"blur": 1}, 'pooling="cmod"'),
        ({"blur": 3}, 'pooling="modulus"'),
        ({"max_blur": 1}, 'rest="max"'),
        ({"max_blur": 3}, 'rest="blurpool"'),
        ({"imag": "tied"}, "nothing"),
        ({"imag": "free"}, "nothing: free imaginary filters"),
        ({"plan": "all"}, "unexpected keyword argument 'plan'"),
    ],
    ids=str,
)
def test_old_keywords_are_refused_with_the_present_spelling(old: dict, now: str):
    model = Net()
    before = snapshot(model)
    with pytest.raises(TypeError, match=r"convert\(\).*" + re.escape(now)):
        convert(model, select="all", **old)
    assert_unchanged(model, before)


def test_images_that_the_model_refuses():
    model = Net()
    before = snapshot(model)
    with pytest.raises((ValueError, RuntimeError), match="3 channels.*1 channel"):  # the model's own words
        convert(model, select="all", images=torch.zeros(2, 1, 32, 32))
    assert_unchanged(model, before)


def test_not_finite_weights_and_images(images):
    model = Net()
    with torch.no_grad():
        model.conv1.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="finite"):
        convert(model)
    model = Net()
    before = snapshot(model)
    images[0, 0, 0, 0] = float("inf")
    with pytest.raises(ValueError, match="finite"):
        convert(model, select="all", images=images)
    assert_unchanged(model, before)


# --- what stays -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["modulus", "energy", "cmod"])
def test_an_optimizer_built_before_keeps_training(pooling: str):
    model = Net(bias=True).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    parameters = dict(model.named_parameters())
    convert(model, select="all", pooling=pooling)
    stem = model.conv1
    assert isinstance(stem, mixpool.MixPoolStem)
    assert stem.weight is parameters["conv1.weight"] and stem.bias is parameters["conv1.bias"]
    assert stem.bn.weight is parameters["bn1.weight"] and stem.bn.bias is parameters["bn1.bias"]
    assert model.fc.weight is parameters["fc.weight"]
    assert {id(parameter) for parameter in model.parameters()} == {id(parameter) for parameter in parameters.values()}
    old = stem.weight.detach().clone()
    F.cross_entropy(model(torch.randn(4, 3, 48, 48)), torch.tensor([0, 1, 2, 3])).backward()
    optimizer.step()
    assert (stem.weight != old).flatten(1).any(dim=1).all()
    trained = {name: value.clone() for name, value in model.named_parameters()}
    revert(model)
    assert model.conv1.weight is parameters["conv1.weight"] and model.bn1.weight is parameters["bn1.weight"]
    assert torch.equal(model.conv1.weight, trained["conv1.weight"])  # training is not undone
    assert torch.equal(model.bn1.weight, trained["conv1.bn.weight"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtype(dtype: torch.dtype):
    model = Net().to(dtype).eval()
    x = torch.randn(2, 3, 48, 48, dtype=dtype)
    expected = model(x)
    convert(model, select="none")
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert torch.equal(model(x), expected)
    revert(model)
    convert(model, select="all", images=x.float())
    assert {p.dtype for p in model.parameters()} == {dtype}
    out = model(x)
    assert out.dtype == dtype and out.isfinite().all()
    assert not torch.equal(out, expected)
    revert(model)
    assert torch.equal(model(x), expected)


def test_dtype_changed_after_conversion():
    model = Net().eval()
    convert(model, select=STRIPES)
    x = torch.randn(2, 3, 48, 48)
    expected = model(x)
    torch.testing.assert_close(model.double()(x.double()), expected.double(), rtol=1e-4, atol=1e-5)
    assert model.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    model.float()
    assert revert(model)(x).dtype == torch.float32


def test_meta_device_is_refused():
    """The filters decide, and there are none yet."""
    model = Net().to("meta")
    with pytest.raises(ValueError, match="meta"):
        convert(model)
    assert isinstance(model.conv1, nn.Conv2d)


def test_training_flags_and_frozen_parameters():
    model = Net().train()
    model.bn1.eval()  # frozen statistics in a training model
    model.conv2.eval()
    model.conv1.weight.requires_grad_(False)
    model.bn1.bias.requires_grad_(False)
    flags = {name: module.training for name, module in model.named_modules()}
    convert(model, select=STRIPES, images=torch.randn(4, 3, 48, 48))
    stem = model.conv1
    assert stem.training and not stem.bn.training and model.training and not model.conv2.training
    assert not stem.weight.requires_grad and not stem.bn.bias.requires_grad and stem.bn.weight.requires_grad
    mean = stem.bn.running_mean.clone()
    model(torch.randn(4, 3, 48, 48)).sum().backward()
    assert torch.equal(stem.bn.running_mean, mean)
    assert stem.weight.grad is None and stem.bn.bias.grad is None and stem.bn.weight.grad is not None
    revert(model)
    assert {name: module.training for name, module in model.named_modules()} == flags
    assert not model.conv1.weight.requires_grad and not model.bn1.bias.requires_grad


def test_modes_changed_after_conversion_reach_the_stock_modules():
    model = Net().train()
    convert(model, select="none")
    model.eval()
    revert(model)
    assert not any(module.training for module in model.modules())


# --- select -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "select",
    [
        STRIPES,
        tuple(STRIPES),
        torch.tensor(STRIPES),
        np.array(STRIPES),
        [int(flag) for flag in STRIPES],
        torch.tensor(STRIPES).int(),
        lambda stats: torch.tensor([channel in (1, 2, 5) for channel in range(len(stats))]),
        lambda stats: np.array(STRIPES),
        lambda stats: (flag for flag in STRIPES),
    ],
    ids=["list", "tuple", "tensor", "numpy", "ints", "int tensor", "function", "function numpy", "function generator"],
)
def test_select(select):
    assert convert(Net(), select=select).plan.is_complex == tuple(STRIPES)


def test_select_by_name():
    assert convert(Net(), select="all").num_complex == CHANNELS
    assert convert(Net(), select="none").num_complex == 0
    model = Net()
    with torch.no_grad():
        model.conv1.weight.fill_(1 / 49)  # low-pass: no modulus
    assert convert(model).num_complex == 0


def test_select_by_a_function_of_the_stats():
    model = Net()
    seen = []

    def fast(stats: FilterStats) -> Tensor:
        seen.append(stats)
        return stats.frequency > stats.frequency.median()

    report = convert(model, select=fast)
    assert len(seen) == 1 and len(seen[0]) == CHANNELS and seen[0].stride == (2, 2)
    assert report.num_complex == CHANNELS // 2
    assert report.plan.is_complex == tuple((seen[0].frequency > seen[0].frequency.median()).tolist())


@pytest.mark.parametrize("pooling", ["modulus", "energy", "cmod"])
@pytest.mark.parametrize("rest", ["max", "blurpool"])
def test_pooling_of_the_chosen_and_of_the_rest(pooling: str, rest: str):
    wanted = tuple(pooling if flag else rest for flag in STRIPES)
    model = Net()
    assert convert(model, select=STRIPES, pooling=pooling, rest=rest).poolings == model.conv1.poolings == wanted
    model = Net()
    assert convert(model, select=wanted).poolings == model.conv1.poolings == wanted


# --- images -----------------------------------------------------------------------------------------------------------


def test_images_in_all_shapes_say_the_same(images):
    """A tensor, lists of images or batches, a data loader with labels, a generator: the same measurement."""
    labels = torch.arange(len(images))
    forms = {
        "tensor": images,
        "list of images": list(images),
        "list of batches": list(images.split(4)),
        "loader with labels": DataLoader(TensorDataset(images, labels), batch_size=2),
        "loader": DataLoader(images, batch_size=3),
        "generator": (image for image in images),
        "double": images.double(),
        "channels last": images.contiguous(memory_format=torch.channels_last),
        "with grad": images.clone().requires_grad_(),
    }
    state = Net().state_dict()
    results = {}
    for name, form in forms.items():
        model = Net()
        model.load_state_dict(state)
        report = convert(model, select="all", images=form)
        assert report.agreement.num_images == len(images), name
        assert all(p.grad is None for p in model.parameters())
        results[name] = report, model.conv1.calibration.clone()
    for name, (report, calibration) in results.items():
        reference, expected = results["tensor"]
        assert report.poolings == reference.poolings, name
        assert report.agreement.kl == pytest.approx(reference.agreement.kl, rel=0.2, abs=1e-4), name
        torch.testing.assert_close(calibration, expected, rtol=0.1, atol=0.05)


def test_one_image_is_enough(images):
    assert convert(Net(), select="all", images=images[0]).agreement.num_images == 1


def test_images_of_several_sizes():
    batches = [torch.randn(2, 3, 48, 48), torch.randn(1, 3, 40, 64)]
    assert convert(Net(), select="all", images=batches).agreement.num_images == 3


def test_no_more_than_512_images_are_read():
    read = []

    def endless():
        while True:
            read.append(1)
            yield torch.randn(64, 3, 16, 16)

    assert convert(Net(), select="all", images=endless()).agreement.num_images == 512
    assert len(read) <= 9


def test_a_model_with_other_outputs_is_converted_without_agreement(images):
    class Features(Net):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"features": self.maxpool(self.relu(self.bn1(self.conv1(x))))}

    model = Features()
    report = convert(model, select="all", images=images)
    assert report.agreement is None
    assert (model.conv1.calibration[:, 0] != 1).any()


# --- calibration ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["modulus", "energy", "cmod"])
@pytest.mark.parametrize("options", STEMS.values(), ids=STEMS)
def test_revert_undoes_the_calibration_to_the_bit(images, options: dict, pooling: str):
    model = Net(**options).eval()
    state = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        expected = model(images)
    report = convert(model, select=STRIPES, images=images, pooling=pooling)
    is_calibrated = (model.conv1.calibration[:, 0] != 1).tolist()
    if options != STEMS["norm without affine"]:  # where there is nothing to fold a gain into
        assert [s or not c for s, c in zip(STRIPES, is_calibrated)] == [True] * CHANNELS
        assert any(is_calibrated)
    assert report.plan.fidelity is not None
    assert torch.equal(report.plan.fidelity.isnan(), ~torch.tensor(STRIPES))

    restored = stock_state_dict(model)
    assert list(restored) == list(state)
    for name, value in state.items():
        assert torch.equal(restored[name], value), name
    revert(model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    with torch.no_grad():
        assert torch.equal(model(images), expected)


@pytest.mark.parametrize("options", STEMS.values(), ids=STEMS)
def test_max_channels_are_not_touched_by_the_calibration(images, options: dict):
    model = Net(**options)
    old = copy.deepcopy(model.state_dict())
    convert(model, select=STRIPES, images=images)
    keep = ~torch.tensor(STRIPES)
    state = model.state_dict()
    for name in ("conv1.weight", "conv1.bias", "bn1.weight", "bn1.bias"):
        if name in old:
            new = state[name.replace("bn1", "conv1.bn")]
            assert torch.equal(new[keep], old[name][keep]), name


@pytest.mark.parametrize("options", STEMS.values(), ids=STEMS)
def test_calibration_brings_the_stem_closer_to_the_stock_stem(images, options: dict):
    """On the images themselves, mean squared difference to max pooling, of the swapped channels."""
    torch.manual_seed(1)
    errors = []
    for calibrating in (None, images):
        model = Net(**options).eval()
        model.load_state_dict(copy.deepcopy(errors[0][1]) if errors else model.state_dict())
        state = copy.deepcopy(model.state_dict())
        with torch.no_grad():
            stock = model.maxpool(model.bn1(model.conv1(images)))
            convert(model, select="all", images=calibrating)
            model.conv1.act = nn.Identity()  # the fit is before the activation
            errors.append(((model.conv1(images) - stock).square().mean().item(), state))
    (plain, _), (calibrated, _) = errors
    if options == STEMS["norm without affine"]:
        assert calibrated == plain
    else:
        assert calibrated < 0.9 * plain


@pytest.mark.parametrize("options", STEMS.values(), ids=STEMS)
def test_a_reloaded_calibration_is_undone_within_rounding(images, options: dict):
    """A fresh process has the gains and offsets in the checkpoint, but not the bits before."""
    stock = Net(**options).eval()
    with torch.no_grad():
        expected = stock(images)
    model = copy.deepcopy(stock)
    convert(model, select=STRIPES, images=images)
    fresh = Net(**options).eval()
    convert(fresh, select="none")
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(fresh(images), model.eval()(images))
        state = stock_state_dict(fresh)
        revert(fresh)
        torch.testing.assert_close(fresh(images), expected, rtol=1e-4, atol=1e-5)
    for name, value in stock.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=1e-5, atol=1e-5)
        assert torch.equal(fresh.state_dict()[name], state[name]), name


def test_training_after_calibration_is_kept_by_revert(images):
    """The calibration is an affine step; what training added on top of it stays, in the stock model's units."""
    model = Net().eval()
    convert(model, select=STRIPES, images=images)
    stem = model.conv1
    gain, offset = stem.calibration.clone().unbind(dim=1)
    assert (gain != 1).any()
    with torch.no_grad():
        stem.bn.weight.mul_(1.25)
        stem.bn.bias.add_(0.5)
    weight, bias = stem.bn.weight.detach().clone(), stem.bn.bias.detach().clone()
    revert(model)
    torch.testing.assert_close(model.bn1.weight, weight / gain)
    torch.testing.assert_close(model.bn1.bias, (bias - offset) / gain)


# --- revert -----------------------------------------------------------------------------------------------------------


def test_revert_gives_back_the_same_modules_and_returns_the_model():
    model = Net()
    before = snapshot(model)
    convert(model, select=STRIPES)
    assert isinstance(model.bn1, Placeholder) and isinstance(model.maxpool, Placeholder)
    assert revert(model) is model
    assert_unchanged(model, before)


def test_revert_of_a_model_that_is_not_converted():
    with pytest.raises(ValueError, match="expected a converted model"):
        revert(Net())
    with pytest.raises(ValueError, match="expected a converted model"):
        stock_state_dict(Net())
    convert(model := Net())
    revert(model)
    with pytest.raises(ValueError, match="expected a converted model"):
        revert(model)
    stem = mixpool.MixPoolStem(nn.Conv2d(3, 8, 5, 2), None, nn.ReLU())
    with pytest.raises(ValueError, match="built directly"):
        revert(nn.Sequential(stem, nn.Flatten()))


def test_revert_follows_training_device_moves_and_dtype():
    model = Net().train()
    convert(model, select=STRIPES)
    model.double()
    for _ in range(3):
        model(torch.randn(4, 3, 48, 48, dtype=torch.float64))
    tracked = model.conv1.bn.num_batches_tracked.clone()
    mean = model.conv1.bn.running_mean.clone()
    revert(model)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert model.bn1.num_batches_tracked == tracked == 3
    assert torch.equal(model.bn1.running_mean, mean)
    assert model(torch.randn(2, 3, 48, 48, dtype=torch.float64)).dtype == torch.float64


def test_the_pretrained_order_load_then_convert():
    """What the docstring tells users to do, on a torchvision model; the keys are those it promises."""
    model = torchvision.models.resnet18()
    keys = set(model.state_dict())
    report = convert(model)
    moved = {key for key in keys if key.startswith("bn1.")}
    new = {"conv1.bn." + key.removeprefix("bn1.") for key in moved} | {"conv1.plan", "conv1.calibration"}
    assert set(model.state_dict()) == keys - moved | new
    assert str(report).count("\n") >= 64
    with pytest.raises(StemError, match="converted already"):
        convert(model)


class TwoBranches(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = Net(), Net()

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x)


def test_two_stems_are_converted_and_reverted_one_by_one(images):
    model = TwoBranches().eval()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    before = model(images)
    first = next(name for name, module in model.a.named_modules() if isinstance(module, nn.Conv2d))
    convert(model, select="all")
    with pytest.raises(ValueError, match="converted already.*another stem"):
        convert(model)
    convert(model, select="all", stem=f"b.{first}")
    assert len([m for m in model.modules() if isinstance(m, mixpool.MixPoolStem)]) == 2
    assert not torch.equal(model(images), before)
    stock = mixpool.stock_state_dict(model)
    assert list(stock) == list(state) and all(torch.equal(stock[key], state[key]) for key in state)
    mixpool.revert(model)
    assert list(model.state_dict()) == list(state)
    assert torch.equal(model(images), before)


def test_a_revert_that_fails_at_the_second_stem_changes_neither(monkeypatch, images):
    model = TwoBranches().eval()
    convert(model, select="all", images=images)
    convert(model, select="all", images=images, stem="b.conv1")
    before, expected = snapshot(model), model(images)
    calls, original = [], conversion.set_submodule

    def flaky(*args):
        calls.append(args)
        if len(calls) == 7:
            raise Failure
        return original(*args)

    monkeypatch.setattr(conversion, "set_submodule", flaky)
    with pytest.raises(Failure):
        revert(model)
    assert_unchanged(model, before)
    assert torch.equal(model(images), expected)
