"""What other tools do to a converted model: average it, copy into it, replace a part, choose a mode, a device.

One test per family of tools, with torch and timm alone; the model keeps its meaning, or says what is wrong. Hooks and
placeholders are in test_swap.py.
"""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from small_net import CHANNELS, STRIPES, Net, assert_unchanged, smooth_images, snapshot
from support import assert_close, assert_same_bits
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mixpool import MixPoolStem, convert, initialize, mixpool2d, revert
from mixpool.filters.gabor import gabor_bank
from mixpool.filters.wavelets import packet_kernels

EVERY = ("energy", "max", "blurpool", "modulus", "cmod", "max", "energy", "blurpool")
OTHER = ("max", "cmod", "modulus", "max", "energy", "blurpool", "max", "modulus")


@pytest.fixture
def images() -> Tensor:
    return smooth_images()


def converted(poolings=EVERY, **options) -> Net:
    model = Net(**options).eval()
    convert(model, select=poolings)
    return model


def output(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


# --- averaging --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.9, 0.99, 0.9999])
def test_the_average_of_equal_models_is_the_model(images, decay: float):
    """Buffers averaged too, integers among them, as torch and Lightning do."""
    model = converted()
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True).eval()
    for _ in range(20):
        ema.update_parameters(model)
    assert ema.module.conv1.poolings == EVERY
    assert_close("out", output(ema, images), output(model, images), (1e-5, 1e-5))


def test_no_structure_among_the_buffers():
    """An integer buffer that is averaged or copied is worn down or out of date."""
    model = timm.create_model("resnet18")
    convert(model, select="all")
    model.conv1.lay(("modulus", "blurpool", "energy", "max") * 16)
    integers = {name for name, buffer in model.named_buffers() if not buffer.is_floating_point()}
    assert all(name.endswith("num_batches_tracked") for name in integers) and "conv1.bn.num_batches_tracked" in integers
    own = {name for name, _ in model.conv1.named_buffers(recurse=False)}
    assert own == {"plan", "calibration"} <= {name.removeprefix("conv1.") for name in model.state_dict()}


# --- state that does not come by load_state_dict ----------------------------------------------------------------------


def in_place(model: nn.Module, other: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        for key, value in model.state_dict().items():
            value.copy_(other.state_dict()[key])
    return output(model, x)


def data_exchanged(model: nn.Module, other: nn.Module, x: Tensor) -> Tensor:
    for key, value in {**dict(model.named_parameters()), **dict(model.named_buffers())}.items():
        value.data = other.state_dict()[key].clone()
    return output(model, x)


def exchanged(model: nn.Module, other: nn.Module, x: Tensor) -> Tensor:
    """As accelerate and transformers put weights in."""
    for name, module in other.named_modules():
        for kind in ("_parameters", "_buffers"):
            own = getattr(model.get_submodule(name), kind)
            for key, value in getattr(module, kind).items():
                new = None if value is None else value.detach().clone()
                own[key] = nn.Parameter(new) if isinstance(value, nn.Parameter) else new
    return output(model, x)


def functional(model: nn.Module, other: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.func.functional_call(model, other.state_dict(), x)


@pytest.mark.parametrize("write", [in_place, data_exchanged, exchanged, functional])
@pytest.mark.parametrize("run_before", [False, True])
def test_state_written_past_load_state_dict(images, write, run_before: bool):
    source, target = converted(EVERY), converted(OTHER)
    expected, own = output(source, images), output(target, images)
    assert not torch.equal(expected, own)
    if not run_before:
        target = copy.deepcopy(target)
    assert_same_bits("out", write(target, source, images), expected)
    if write is functional:  # which takes the state away again
        assert target.conv1.poolings == OTHER
        assert_same_bits("after", output(target, images), own)
    else:
        assert target.conv1.poolings == EVERY


def test_a_plan_written_in_place(images):
    source, target = converted(EVERY), converted(OTHER)
    target.load_state_dict({**source.state_dict(), "conv1.plan": target.conv1.plan})
    assert not torch.equal(output(target, images), output(source, images))
    for channel in range(CHANNELS):  # one after another, with a forward pass between
        with torch.no_grad():
            target.conv1.plan[channel] = source.conv1.plan[channel]
        assert target.conv1.poolings == EVERY[: channel + 1] + OTHER[channel + 1 :]
        output(target, images)
    assert_same_bits("out", output(target, images), output(source, images))


@pytest.mark.parametrize("damage", [-3.0, 7.0, float("nan"), float("inf")])
def test_damaged_numbers_raise(images, damage: float):
    model = converted()
    expected, before = output(model, images), model.conv1.plan.clone()
    with torch.no_grad():
        model.conv1.plan[2, 0] = damage
    with pytest.raises(ValueError, match="expected the plan to hold poolings 0 to 4"):
        model(images)
    state = {**model.state_dict(), "conv1.plan": before}
    state["conv1.plan"] = before.clone()
    state["conv1.plan"][2, 0] = damage
    with pytest.raises(ValueError, match="expected the plan to hold poolings 0 to 4"):
        torch.func.functional_call(model, state, images)
    with torch.no_grad():
        model.conv1.plan.copy_(before)
    assert_same_bits("mended", output(model, images), expected)


# --- a part replaced --------------------------------------------------------------------------------------------------


class BatchNormOfSomeone(nn.BatchNorm2d):
    """A subclass with who knows what arithmetic."""


@pytest.mark.parametrize(
    "layer",
    [
        nn.GroupNorm(4, CHANNELS),
        nn.InstanceNorm2d(CHANNELS),
        nn.InstanceNorm2d(CHANNELS, affine=True, track_running_stats=True),
        nn.Identity(),
        timm.layers.SplitBatchNorm2d(CHANNELS, num_splits=2),
        BatchNormOfSomeone(CHANNELS),
        nn.BatchNorm2d(2 * CHANNELS),
    ],
    ids=lambda layer: f"{type(layer).__name__} {getattr(layer, 'affine', '')}",
)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("poolings", [("max",) * CHANNELS, EVERY], ids=["max", "every"])
def test_another_norm_layer_raises_at_the_next_forward(images, layer: nn.Module, training: bool, poolings):
    model = converted(poolings).train(training)
    old, model.conv1.bn = model.conv1.bn, layer.train(training)
    name = str(2 * CHANNELS) if type(layer) is nn.BatchNorm2d else type(layer).__name__
    with pytest.raises(ValueError, match=rf"{name}.*revert\(model\).*convert again"):
        model(images)
    model.conv1.bn = old
    assert model(images).isfinite().all()


def test_split_batch_norm_of_timm(images):
    """timm's --aug-splits, which goes through the whole model."""
    model = timm.layers.convert_splitbn_model(converted(), 2).train()
    with pytest.raises(ValueError, match=r"SplitBatchNorm2d.*revert\(model\)"):
        model(images)


@pytest.mark.parametrize("layer", [nn.GELU(), nn.LeakyReLU(-0.1), nn.PReLU()], ids=lambda layer: type(layer).__name__)
def test_another_activation_raises_at_the_next_forward(images, layer: nn.Module):
    model = converted()
    model.conv1.act = layer
    with pytest.raises(ValueError, match=rf"{type(layer).__name__}.*revert\(model\)"):
        model(images)
    model.conv1.act = nn.LeakyReLU(0.1)
    assert model(images).isfinite().all()


def test_synchronised_batch_norm_goes_on(images):
    model = converted()
    expected = output(model, images)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert type(model.conv1.bn) is nn.SyncBatchNorm
    assert_same_bits("out", output(model, images), expected)


# --- a mode, a device -------------------------------------------------------------------------------------------------


def training_step(model: nn.Module, x: Tensor) -> None:
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()
    model(x).square().mean().backward()
    optimizer.step()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert {"conv1.weight", "conv1.bn.weight", "conv1.bn.bias", "fc.weight"} <= moved


@pytest.mark.parametrize("with_images", [False, True])
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_training_after_a_conversion_in_inference_mode(images, mode, with_images: bool):
    torch.manual_seed(1)
    model, reference = Net(), None
    reference = copy.deepcopy(model)
    options = {"images": images} if with_images else {}
    with mode():
        convert(model, select=EVERY, **options)
    convert(reference, select=EVERY, **options)
    assert not any(tensor.is_inference() for tensor in model.state_dict().values())
    assert_same_bits("out", output(model.eval(), images), output(reference.eval(), images))
    training_step(model, images)
    model.conv1.lay("modulus")
    revert(model)(images).sum().backward()


def test_all_of_it_in_inference_mode(images):
    """An evaluation script under one decorator: the model and its conversion are made in that mode."""
    torch.manual_seed(1)
    reference = Net().eval()
    stock = output(reference, images)
    convert(reference, select=EVERY, images=images)
    torch.manual_seed(1)
    with torch.inference_mode():
        model = Net().eval()
        convert(model, select=EVERY, images=images.clone())
        assert_same_bits("converted", model(images), output(reference, images))
        model.load_state_dict(reference.state_dict())
        model.conv1.lay(OTHER).lay(EVERY)
        assert_same_bits("laid", model(images), output(reference, images))
        assert_same_bits("reverted", output(revert(reference), images), stock)
        assert_close("reverted", revert(model)(images), stock, (1e-5, 1e-5))


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("made_in_it", [False, True])
def test_training_after_loading_in_inference_mode(images, assign: bool, made_in_it: bool):
    source, target = converted(EVERY), converted(OTHER)
    state = source.state_dict()
    with torch.inference_mode():
        if made_in_it:
            state = {key: value.clone() for key, value in state.items()}
        target.load_state_dict(state, assign=assign)
    assert target.conv1.poolings == EVERY
    assert_same_bits("out", output(target, images), output(source, images))
    target.conv1.lay(OTHER)
    assert target.conv1.poolings == OTHER
    if not (assign and made_in_it):  # a stock model cannot be trained either then: its weights are of that mode
        training_step(target, images)


def test_revert_in_inference_mode(images):
    model = Net().eval()
    expected = output(model, images)
    convert(model, select=EVERY, images=images)
    with torch.inference_mode():
        revert(model)
    assert_same_bits("out", output(model, images), expected)
    model.train()(images).sum().backward()
    assert model.conv1.weight.grad is not None


@pytest.mark.parametrize("select", ["all", "auto", lambda stats: stats.frequency > 1], ids=["all", "auto", "function"])
@pytest.mark.parametrize("with_images", [False, True])
def test_another_default_device(images, select, with_images: bool):
    """ "meta" stands in for a GPU: whatever is made on the default device has no numbers there."""
    model = Net().eval()
    with torch.no_grad():  # filters that "auto" chooses
        model.conv1.weight.copy_(waves())
    reference = copy.deepcopy(model)
    options = {"images": images} if with_images else {}
    expected = convert(reference, select=select, **options)
    torch.set_default_device("meta")
    try:
        report = convert(model, select=select, **options)
        out = output(model, images)
        text = str(report)
        loaded = copy.deepcopy(model)
        loaded.load_state_dict(reference.state_dict())
        loaded.conv1.lay("energy")
        revert(loaded)
    finally:
        torch.set_default_device(None)
    assert expected.num_complex > 0 or with_images and select == "auto"  # which believes the images
    assert report.poolings == expected.poolings
    assert text == str(expected)
    assert_same_bits("out", out, output(reference, images))
    assert {value.device.type for value in model.state_dict().values()} == {"cpu"}


def waves() -> Tensor:
    """Gray plane waves under a Gaussian, fast enough for a stride of 2."""
    return gabor_bank(CHANNELS, kernel_size=7, frequencies=[1.4], color_share=0.0, blob_share=0.0)


def test_a_stem_and_a_function_on_another_default_device(images):
    conv, norm = nn.Conv2d(3, CHANNELS, 7, 2, 3), nn.BatchNorm2d(CHANNELS)
    options = {"pooling": EVERY, "conv_stride": 2, "conv_padding": 3, "pool_padding": 1}
    expected = mixpool2d(images, conv.weight, **options)
    torch.set_default_device("meta")
    try:
        stem = MixPoolStem(conv, norm, nn.ReLU(), pooling=EVERY)
        out = stem(images)
        assert_same_bits("out", mixpool2d(images, conv.weight, **options), expected)
    finally:
        torch.set_default_device(None)
    assert out.device.type == "cpu" and out.isfinite().all()
    assert {value.device.type for value in stem.state_dict().values()} == {"cpu"}


@pytest.mark.parametrize("bank", ["wavelet", "gabor"])
def test_initialize_under_another_default_device_and_mode(images, bank: str):
    packet_kernels.cache_clear()  # what is made first is kept
    model, twin = Net(), Net()
    twin.load_state_dict(model.state_dict())
    torch.set_default_device("meta")
    try:
        with torch.inference_mode():
            initialize(model, bank, kernel_size=9)
    finally:
        torch.set_default_device(None)
    initialize(twin, bank, kernel_size=9)
    assert model.conv1.poolings == twin.conv1.poolings
    assert_same_bits("weight", model.conv1.weight, twin.conv1.weight)
    training_step(model, images)


# --- a weight that is computed, and revert all or nothing -------------------------------------------------------------


def pruned(stem: nn.Module) -> None:
    prune.l1_unstructured(stem, "weight", 0.5)


def pruned_bias(stem: nn.Module) -> None:
    prune.l1_unstructured(stem, "bias", 0.5)


def pruned_norm(stem: nn.Module) -> None:
    prune.l1_unstructured(stem.bn, "weight", 0.5)


MADE_PERMANENT = {
    pruned: lambda stem: prune.remove(stem, "weight"),
    pruned_bias: lambda stem: prune.remove(stem, "bias"),
    pruned_norm: lambda stem: prune.remove(stem.bn, "weight"),
    parametrizations.weight_norm: lambda stem: nn.utils.parametrize.remove_parametrizations(stem, "weight"),
    parametrizations.spectral_norm: lambda stem: nn.utils.parametrize.remove_parametrizations(stem, "weight"),
}


@pytest.mark.parametrize(("change", "undo"), MADE_PERMANENT.items())
def test_revert_of_a_stem_whose_weight_is_computed(images, change, undo):
    """It raises before anything has changed; once the weight is a parameter again, it works."""
    model = Net(bias=True).eval()
    convert(model, select=STRIPES, images=images)
    assert (model.conv1.calibration[:, 0] != 1).any()
    change(model.conv1)
    expected, before = output(model, images), snapshot(model)
    with pytest.raises(ValueError, match=r"conv1(\.bn)?'s (weight|bias).*pruning.*make it permanent first"):
        revert(model)
    assert_unchanged(model, before)
    assert_same_bits("out", output(model, images), expected)
    undo(model.conv1)
    weight = model.conv1.weight.detach().clone()
    assert_same_bits("made permanent", output(model, images), expected)
    revert(model)
    assert type(model.conv1) is nn.Conv2d and isinstance(model.conv1.weight, nn.Parameter)
    assert_same_bits("weight", model.conv1.weight, weight)


@pytest.mark.parametrize(
    ("name", "part"), [("conv1", "weight"), ("conv1", "bias"), ("bn1", "weight"), ("bn1", "bias")], ids=str
)
def test_conversion_of_a_stem_whose_weight_is_computed(images, name: str, part: str):
    model = Net(bias=True).eval()
    prune.l1_unstructured(model.get_submodule(name), part, 0.5)
    expected, before = output(model, images), snapshot(model)
    with pytest.raises(ValueError, match=rf"expected the (convolution|norm layer)'s {part} to be a plain parameter"):
        convert(model, select="all", images=images)
    assert_unchanged(model, before)
    prune.remove(model.get_submodule(name), part)
    convert(model, select="none")
    assert_same_bits("out", output(model, images), expected)
