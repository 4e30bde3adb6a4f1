"""State dicts in both directions, and what users of timm and torchvision do with a model after converting it."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
import warnings

import pytest
import safetensors.torch
import timm
import timm.optim
import timm.utils
import torch
import torchvision
from timm.models import FeatureGraphNet, FeatureHookNet, FeatureListNet
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

import mixpool
from mixpool import convert, revert, stock_state_dict
from mixpool.selection.stats import FilterStats


def half_of(stats: FilterStats) -> list[bool]:
    return [channel % 2 == 0 for channel in range(len(stats))]


def other_half_of(stats: FilterStats) -> list[bool]:
    return [channel % 2 == 1 for channel in range(len(stats))]


def randomised(model: nn.Module) -> nn.Module:
    """Statistics and affine maps as after training, with negative scales, in evaluation mode."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.weight, 1, 0.7)
            nn.init.normal_(module.bias, 0, 0.2)
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.7, 1.5)
    return model.eval()


BUILDERS = {
    "timm": lambda **options: timm.create_model("resnet18", num_classes=7, **options),
    "timm with norm and activation in one": lambda: timm.create_model("densenet121", num_classes=7),
    "timm nested": lambda: timm.create_model("legacy_seresnet18", num_classes=7),
    "torchvision": lambda: torchvision.models.resnet18(num_classes=7),
    "torchvision nested": lambda: torchvision.models.shufflenet_v2_x0_5(num_classes=7),
    "torchvision without norm": lambda: torchvision.models.squeezenet1_1(num_classes=7),
}


def resnet(**options) -> nn.Module:
    return randomised(BUILDERS["timm"](**options))


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 64, 72)


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


def stem_of(model: nn.Module) -> mixpool.MixPoolStem:
    return next(module for module in model.modules() if isinstance(module, mixpool.MixPoolStem))


def load_stock(model: nn.Module, state: dict, **options) -> None:
    with pytest.warns(UserWarning, match="no channel plan.*present plan stays"):
        keys = model.load_state_dict(state, **options)
    assert not keys.missing_keys and not keys.unexpected_keys


# --- stock checkpoints into converted models --------------------------------------------------------------------------


@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
def test_a_stock_checkpoint_loads_into_a_converted_model(build, x):
    """The weights arrive, the plan stays; the same as loading first and converting to that plan."""
    source, target = randomised(build()), build().eval()
    state = source.state_dict()
    keys = list(state)
    convert(target, select=half_of)
    load_stock(target, state)
    assert list(state) == keys  # the user's dictionary is not touched
    restored = stock_state_dict(target)
    assert list(restored) == keys
    assert all(torch.equal(restored[key], value) for key, value in state.items())

    reference = outputs(source, x)
    assert not torch.equal(outputs(target, x), reference)
    assert torch.equal(outputs(revert(target), x), reference)


@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
def test_a_stock_checkpoint_loads_into_an_all_max_model_to_the_bit(build, x):
    source, target = randomised(build()), build().eval()
    convert(target, select="none")
    load_stock(target, source.state_dict())
    assert torch.equal(outputs(target, x), outputs(source, x))
    load_stock(target, stock_state_dict(target), strict=True)


def test_inside_sequential_ema_and_parts(x):
    source = resnet()
    wrapped = nn.Sequential(nn.Identity(), BUILDERS["timm"](), nn.Softmax(dim=1)).eval()
    convert(wrapped, select="none")
    load_stock(wrapped, {f"1.{key}": value for key, value in source.state_dict().items()})
    assert torch.equal(outputs(wrapped, x), outputs(source, x).softmax(dim=1))

    # Wrapped after the conversion.
    model = BUILDERS["timm"]().eval()
    convert(model, select="none")
    wrapped = nn.ModuleDict({"backbone": model})
    load_stock(wrapped, {f"backbone.{key}": value for key, value in source.state_dict().items()})
    assert torch.equal(outputs(model, x), outputs(source, x))
    assert list(stock_state_dict(wrapped)) == [f"backbone.{key}" for key in source.state_dict()]
    assert torch.equal(outputs(revert(wrapped)["backbone"], x), outputs(source, x))

    ema = timm.utils.ModelEmaV3(BUILDERS["timm"]().eval())
    convert(ema.module, select="none")
    load_stock(ema, {f"module.{key}": value for key, value in source.state_dict().items()})
    assert torch.equal(outputs(ema.module, x), outputs(source, x))

    # A part of a model holds both keys and is loaded by itself.
    model = BUILDERS["torchvision nested"]().eval()
    convert(model, select="none")
    part = randomised(BUILDERS["torchvision nested"]()).conv1
    load_stock(model.conv1, part.state_dict())
    assert torch.equal(model.conv1[0].weight, part[0].weight)
    assert torch.equal(model.conv1[0].bn.running_mean, part[1].running_mean)


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_distributed_data_parallel(process_group, x):
    source, model = resnet(), BUILDERS["timm"]().eval()
    convert(model, select=half_of)
    wrapped = nn.parallel.DistributedDataParallel(model)
    load_stock(wrapped, {f"module.{key}": value for key, value in source.state_dict().items()})
    assert torch.equal(stock_state_dict(wrapped)["bn1.running_mean"], source.bn1.running_mean)
    assert list(stock_state_dict(wrapped)) == list(source.state_dict())
    expected = outputs(model, x)
    wrapped.train()
    wrapped(x).square().mean().backward()
    assert all(parameter.grad is not None for parameter in wrapped.parameters())
    # A checkpoint of the wrapped model, as training scripts save it, in a plain converted model.
    other = BUILDERS["timm"]().eval()
    convert(other, select="none")
    saved = {key.removeprefix("module."): value for key, value in wrapped.state_dict().items()}
    other.load_state_dict(saved)
    assert torch.equal(outputs(other, x), outputs(model.eval(), x))
    assert not torch.equal(outputs(other, x), expected)  # the batch changed the running statistics


# --- converted checkpoints into converted models ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "select"),
    [("timm", "none"), ("timm", "all"), *((name, other_half_of) for name in BUILDERS)],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_a_converted_checkpoint_brings_its_plan(name: str, select, x):
    """Into a model that was converted with another plan and other poolings: the same bits afterwards."""
    build = BUILDERS[name]
    source = randomised(build())
    convert(source, select=half_of, pooling="cmod", rest="blurpool", images=torch.randn(4, 3, 64, 64))
    expected, state = outputs(source, x), source.state_dict()
    target = build().eval()
    convert(target, select=select)
    assert not torch.equal(outputs(target, x), expected)
    target.load_state_dict(state)
    assert (
        stem_of(target).poolings
        == stem_of(source).poolings
        == ("cmod", "blurpool") * (len(stem_of(source).weight) // 2)
    )
    assert torch.equal(outputs(target, x), expected)
    assert list(target.state_dict()) == list(state)
    restored, wanted = stock_state_dict(target), stock_state_dict(source)
    assert list(restored) == list(wanted)
    for key, value in wanted.items():
        torch.testing.assert_close(restored[key], value, rtol=1e-4, atol=1e-5)  # rounding of bias + offset - offset


def test_training_continues_from_a_checkpoint_as_without_one(x):
    """One optimizer step after reloading gives the bits of one step without reloading."""
    source = resnet().train()
    convert(source, select=half_of, pooling="cmod")
    target = BUILDERS["timm"]()
    convert(target, select="all")
    target.load_state_dict(source.state_dict())
    for model in (source, target):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        model.train()(x).square().mean().backward()
        optimizer.step()
    for (key, value), other in zip(source.state_dict().items(), target.state_dict().values()):
        assert torch.equal(value, other), key


def test_strict_errors():
    model = BUILDERS["timm"]()
    convert(model, select=half_of)
    state = model.state_dict()
    with pytest.raises(RuntimeError, match="Missing key.*conv1.bn.running_mean"):
        model.load_state_dict({key: value for key, value in state.items() if key != "conv1.bn.running_mean"})
    with pytest.raises(RuntimeError, match="Unexpected key.*head"):
        model.load_state_dict({**state, "head.weight": torch.zeros(1)})
    with pytest.raises(RuntimeError, match="Missing key.*conv1.calibration"):
        model.load_state_dict({key: value for key, value in state.items() if key != "conv1.calibration"})
    stock = BUILDERS["timm"]().state_dict()
    with pytest.raises(RuntimeError, match="Missing key.*conv1.weight"):
        model.load_state_dict({key: value for key, value in stock.items() if key != "conv1.weight"})
    with pytest.raises(RuntimeError, match="Unexpected key.*conv1.plan"):
        BUILDERS["timm"]().load_state_dict(state)  # not converted
    wrong = {**state, "conv1.weight": torch.zeros(32, 3, 7, 7)}
    with pytest.raises(RuntimeError, match="size mismatch for conv1.weight"):
        model.load_state_dict(wrong)
    keys = model.load_state_dict({"fc.weight": state["fc.weight"]}, strict=False)
    assert "conv1.weight" in keys.missing_keys and "conv1.plan" in keys.missing_keys


def test_a_damaged_plan_is_refused():
    model = BUILDERS["timm"]()
    convert(model, select=half_of)
    state = copy.deepcopy(model.state_dict())
    code = state["conv1.plan"][0, 0].clone()
    for damage, message in (
        (code + 9, "poolings 0 to 4"),
        (code * 0.3 - 5, "0 to 4"),
        (code * float("nan"), "0 to 4"),
    ):
        state["conv1.plan"][0, 0] = damage
        with pytest.raises(RuntimeError, match=message):
            model.load_state_dict(state)
        assert model.conv1.poolings == ("modulus", "max") * 32


def test_files(tmp_path, x):
    source = resnet()
    convert(source, select=half_of, pooling="energy", images=torch.randn(4, 3, 64, 64))
    expected = outputs(source, x)

    def fresh() -> nn.Module:
        model = BUILDERS["timm"]().eval()
        convert(model, select="none")
        return model

    torch.save(source.state_dict(), tmp_path / "model.pth")
    target = fresh()
    target.load_state_dict(torch.load(tmp_path / "model.pth", weights_only=True))
    assert torch.equal(outputs(target, x), expected)

    safetensors.torch.save_file(source.state_dict(), tmp_path / "state.safetensors")
    target = fresh()
    target.load_state_dict(safetensors.torch.load_file(tmp_path / "state.safetensors"))
    assert torch.equal(outputs(target, x), expected)

    safetensors.torch.save_model(source, str(tmp_path / "model.safetensors"))
    target = fresh()
    assert safetensors.torch.load_model(target, tmp_path / "model.safetensors") == (set(), [])
    assert torch.equal(outputs(target, x), expected)

    safetensors.torch.save_file(stock_state_dict(source), tmp_path / "stock.safetensors")
    stock = BUILDERS["timm"]().eval()
    stock.load_state_dict(safetensors.torch.load_file(tmp_path / "stock.safetensors"))
    assert torch.equal(outputs(stock, x), outputs(revert(source), x))


def test_assign(x):
    source = resnet()
    convert(source, select=half_of)
    target = BUILDERS["timm"]().eval()
    convert(target, select="none")
    state = {key: value.detach().clone() for key, value in source.state_dict().items()}
    target.load_state_dict(state, assign=True)
    assert torch.equal(outputs(target, x), outputs(source, x))
    assert target.conv1.weight.data_ptr() == state["conv1.weight"].data_ptr()
    assert target.conv1.plan.data_ptr() == state["conv1.plan"].data_ptr()
    weight, norm_weight = target.conv1.weight, target.conv1.bn.weight
    revert(target)
    assert target.conv1.weight is weight and target.bn1.weight is norm_weight
    assert torch.equal(outputs(target, x), outputs(revert(source), x))

    stock = resnet()
    convert(target, select="none")
    load_stock(target, stock.state_dict(), assign=True)
    assert torch.equal(outputs(target, x), outputs(stock, x))
    assert torch.equal(outputs(revert(target), x), outputs(stock, x))


def test_a_stock_model_filled_from_meta_by_assign(x):
    source = resnet()
    target = BUILDERS["timm"]().to("meta")
    target.load_state_dict(source.state_dict(), assign=True)
    convert(target.eval(), select="none")
    assert torch.equal(outputs(target, x), outputs(source, x))


@pytest.mark.parametrize("decay", [0.9, 0.9995, 0.9999])
def test_a_truncating_moving_average_keeps_the_plan(decay: float, x):
    """timm's ModelEmaV2 averages integer buffers too, by copy_ from float, which would wear an integer plan down."""
    stem = resnet()
    convert(stem, select=half_of)
    stem = stem.conv1
    average = timm.utils.ModelEmaV2(stem, decay=decay)
    for _ in range(500):
        average.update(stem)
    target = copy.deepcopy(stem)
    target.load_state_dict(average.module.state_dict())
    assert target.poolings == stem.poolings
    assert torch.equal(target.structure().partner_map, stem.structure().partner_map)


@pytest.mark.parametrize("assign", [False, True])
def test_a_converted_model_filled_from_meta(assign: bool, x):
    """What follows from the plan (indices, partner) is made anew, also where the plan itself is the same."""
    source = resnet()
    report = convert(source, select=half_of)
    target = resnet()
    convert(target, select=report.poolings)
    target.to("meta")
    if not assign:
        target.to_empty(device="cpu")
    target.load_state_dict(source.state_dict(), assign=assign)
    assert torch.equal(outputs(target.eval(), x), outputs(source, x))


# --- copies -----------------------------------------------------------------------------------------------------------


def copies() -> dict:
    def through_torch_save(model: nn.Module) -> nn.Module:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        return torch.load(file, weights_only=False)

    return {
        "deepcopy": copy.deepcopy,
        "pickle": lambda model: pickle.loads(pickle.dumps(model)),
        "torch.save": through_torch_save,
    }


@pytest.mark.parametrize("duplicate", copies().values(), ids=copies())
def test_copies_are_independent_and_can_be_reverted(duplicate, x):
    model = resnet()
    stock = outputs(model, x)
    report = convert(model, select=half_of, images=torch.randn(4, 3, 64, 64))
    expected = outputs(model, x)
    twin = duplicate(model)
    assert torch.equal(outputs(twin, x), expected)
    assert twin.conv1.poolings == report.poolings
    revert(twin)
    assert torch.equal(outputs(twin, x), stock)
    assert twin.conv1.weight is not model.conv1.weight
    assert torch.equal(outputs(model, x), expected)
    assert twin.feature_info[0]["reduction"] == 2 and model.feature_info[0]["reduction"] == 4
    # A reverted copy is a stock model: it loads stock checkpoints silently, and converts again.
    twin.load_state_dict(stock_state_dict(model))
    convert(twin, select="none")
    load_stock(duplicate(twin), stock_state_dict(model))
    assert torch.equal(outputs(revert(model), x), stock)


def test_moving_average_of_timm(x):
    model = resnet().train()
    convert(model, select=half_of)
    ema = timm.utils.ModelEmaV3(model, decay=0.5)
    assert torch.equal(outputs(ema.module, x), outputs(model.eval(), x))
    before = {key: value.clone() for key, value in ema.module.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    ema.update(model)
    for key, value in model.state_dict().items():
        average = ema.module.state_dict()[key]
        expected = (before[key] + value) / 2 if value.is_floating_point() else value
        torch.testing.assert_close(average, expected, msg=lambda m, key=key: f"{key}: {m}")
    assert torch.equal(ema.module.conv1.plan, model.conv1.plan)
    assert outputs(ema.module, x).isfinite().all()
    ema.set(model)
    assert torch.equal(outputs(ema.module, x), outputs(model, x))
    revert(ema.module)
    assert torch.equal(outputs(ema.module, x), outputs(revert(model), x))


@pytest.mark.parametrize(
    "synchronise", [nn.SyncBatchNorm.convert_sync_batchnorm, timm.layers.convert_sync_batchnorm], ids=["torch", "timm"]
)
@pytest.mark.parametrize("name", ["timm", "timm with norm and activation in one", "torchvision"])
def test_synchronised_batch_norm(synchronise, name: str, x):
    if name == "timm with norm and activation in one" and synchronise is not timm.layers.convert_sync_batchnorm:
        pytest.skip("torch's converter drops the activation of timm's BatchNormAct2d")
    model = randomised(BUILDERS[name]())
    stock = outputs(model, x)
    keys = list(model.state_dict())
    convert(model, select=half_of)
    expected = outputs(model, x)
    converted_keys = list(model.state_dict())
    model = synchronise(model)
    assert "SyncBatchNorm" in type(stem_of(model).bn).__name__
    assert list(model.state_dict()) == converted_keys
    assert torch.equal(outputs(model, x), expected)
    revert(model)
    assert list(model.state_dict()) == keys
    assert torch.equal(outputs(model, x), stock)


def test_synchronised_before_conversion(x):
    model = nn.SyncBatchNorm.convert_sync_batchnorm(resnet())
    stock = outputs(model, x)
    convert(model, select="none")
    assert torch.equal(outputs(model, x), stock)


# --- timm -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_chans", [1, 4])
def test_other_numbers_of_input_channels(in_chans: int, tmp_path):
    torch.save(resnet().state_dict(), tmp_path / "rgb.pth")
    overlay = {"file": str(tmp_path / "rgb.pth"), "num_classes": 7}
    model = BUILDERS["timm"](in_chans=in_chans, pretrained=True, pretrained_cfg_overlay=overlay).eval()
    x = torch.randn(2, in_chans, 64, 64)
    stock = outputs(model, x)
    convert(model, select="none")
    assert torch.equal(outputs(model, x), stock)
    revert(model)
    assert convert(model, select="all", images=x).num_complex == 64
    assert outputs(model, x).isfinite().all()
    with pytest.raises(ValueError, match=f"{in_chans}, H, W"):
        model(torch.randn(2, 3, 64, 64))


def test_timm_loads_a_stock_file_before_and_into_a_converted_model(tmp_path, x):
    source = resnet()
    torch.save(source.state_dict(), tmp_path / "stock.pth")
    safetensors.torch.save_file(source.state_dict(), tmp_path / "stock.safetensors")
    for name in ("stock.pth", "stock.safetensors"):
        overlay = {"file": str(tmp_path / name), "num_classes": 7}
        model = BUILDERS["timm"](pretrained=True, pretrained_cfg_overlay=overlay).eval()
        convert(model, select="none")
        assert torch.equal(outputs(model, x), outputs(source, x))

        model = BUILDERS["timm"]().eval()
        convert(model, select="none")
        with pytest.warns(UserWarning, match="no channel plan"):
            timm.models.load_checkpoint(model, str(tmp_path / name))
        assert torch.equal(outputs(model, x), outputs(source, x))

        model = BUILDERS["timm"]().eval()
        convert(model, select="none")
        cfg = {**model.pretrained_cfg, "file": str(tmp_path / name), "num_classes": 7}
        with pytest.warns(UserWarning, match="no channel plan"):
            timm.models.load_pretrained(model, pretrained_cfg=cfg, num_classes=7)
        assert torch.equal(outputs(model, x), outputs(source, x))


def test_timm_loads_a_converted_file(tmp_path, x):
    source = resnet()
    convert(source, select=half_of, pooling="cmod")
    torch.save({"state_dict": source.state_dict(), "epoch": 3}, tmp_path / "converted.pth.tar")
    model = BUILDERS["timm"]().eval()
    convert(model, select="none")
    timm.models.load_checkpoint(model, str(tmp_path / "converted.pth.tar"))
    assert torch.equal(outputs(model, x), outputs(source, x))


FEATURE_MODELS = ["resnet18", "densenet121", "dpn68", "legacy_seresnet18", "resnetblur18"]


def reductions_of(maps: list[Tensor], x: Tensor) -> list[int]:
    """Pixels per step, from the sizes (a stem without padding loses a step or two)."""
    return [2 ** round(torch.tensor(x.shape[-1] / m.shape[-1]).log2().item()) for m in maps]


@pytest.mark.parametrize("name", FEATURE_MODELS)
def test_features_only_converted_after(name: str):
    """create_model(features_only=True), then convert: the first map is the stem's output, and timm is told so."""
    x = torch.randn(1, 3, 128, 160)
    model = randomised(timm.create_model(name, features_only=True))
    stock = outputs(model, x)
    before = model.feature_info.reduction()
    assert before == [2, 4, 8, 16, 32]
    report = convert(model, select="none")
    assert any("reduction 4" in note for note in report.notes)
    maps = outputs(model, x)
    assert model.feature_info.reduction() == [4, 4, 8, 16, 32] == reductions_of(maps, x)
    assert [m.shape[1] for m in maps] == model.feature_info.channels()
    assert all(torch.equal(m, s) for m, s in zip(maps[1:], stock[1:]))
    revert(model)
    assert model.feature_info.reduction() == before
    assert all(torch.equal(m, s) for m, s in zip(outputs(model, x), stock))


@pytest.mark.parametrize("feature_cls", ["list", "dict", "fx", "hook", "getter"])
@pytest.mark.parametrize("out_indices", [(0, 1, 2, 3, 4), (1, 2, 3, 4), (2, 4)], ids=str)
def test_features_only_of_all_classes_converted_after(feature_cls: str, out_indices: tuple[int, ...]):
    """Every way timm has of taking features: right maps, or a refusal that says what to do instead."""
    x = torch.randn(1, 3, 64, 96)
    model = timm.create_model("resnet18", features_only=True, feature_cls=feature_cls, out_indices=out_indices)
    randomised(model)
    stock = outputs(model, x)
    stock = list(stock.values()) if isinstance(stock, dict) else stock
    try:
        convert(model, select="none")
    except mixpool.StemError as error:
        assert 0 in out_indices and "before wrapping" in str(error)  # noqa: PT017
        maps = outputs(model, x)
        maps = list(maps.values()) if isinstance(maps, dict) else maps
        assert all(torch.equal(m, s) for m, s in zip(maps, stock))
        return
    maps = outputs(model, x)
    maps = list(maps.values()) if isinstance(maps, dict) else maps
    wanted = [(4, 4, 8, 16, 32)[i] for i in out_indices]
    assert reductions_of(maps, x) == wanted
    if hasattr(model, "feature_info"):
        assert model.feature_info.reduction() == wanted
    for index, m, s in zip(out_indices, maps, stock):
        if index > 0:
            assert torch.equal(m, s)


@pytest.mark.parametrize("wrapper", [FeatureListNet, FeatureGraphNet, FeatureHookNet])
def test_features_of_a_model_converted_before(wrapper: type):
    x = torch.randn(1, 3, 64, 96)
    model = resnet(global_pool="")
    stock = outputs(wrapper(copy.deepcopy(model), out_indices=(0, 1, 2, 3, 4)), x)
    convert(model, select="none")
    features = wrapper(model, out_indices=(0, 1, 2, 3, 4))
    maps = outputs(features, x)
    assert features.feature_info.reduction() == [4, 4, 8, 16, 32] == reductions_of(maps, x)
    assert all(torch.equal(m, s) for m, s in zip(maps[1:], stock[1:]))


def test_forward_intermediates(x):
    model = resnet()
    with torch.no_grad():
        stock_final, stock = model.forward_intermediates(x)
        convert(model, select="none")
        final, maps = model.forward_intermediates(x)
        assert torch.equal(final, stock_final)
        assert reductions_of(maps, x) == [4, 4, 8, 16, 32] == [entry["reduction"] for entry in model.feature_info]
        assert all(torch.equal(m, s) for m, s in zip(maps[1:], stock[1:]))
        assert torch.equal(model.forward_head(model.forward_features(x)), outputs(model, x))


def test_heads_and_gradient_checkpointing(x):
    model = resnet()
    convert(model, select=half_of)
    model.reset_classifier(3)
    assert outputs(model, x).shape == (2, 3) and model.get_classifier().out_features == 3
    model.train()
    gradients = []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        model.zero_grad()
        state = copy.deepcopy(model.state_dict())
        model(x).square().sum().backward()
        model.load_state_dict(state)
        gradients.append({key: parameter.grad.clone() for key, parameter in model.named_parameters()})
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][key], rtol=1e-3, atol=1e-5)
    model.reset_classifier(0)
    assert outputs(model.eval(), x).shape == (2, 512)
    revert(model)
    assert "bn1.weight" in model.state_dict()


@pytest.mark.parametrize(
    "name", ["resnet18", "densenet121", "dpn68", "legacy_seresnet18", "resnetblur18", "halonet_h1"]
)
def test_layer_decay_treats_the_stem_as_before(name: str):
    """timm's parameter groups (learning rate per layer, weight decay per shape) do not change by converting."""
    model = timm.create_model(name, num_classes=7)

    def settings() -> dict[int, tuple[float, float]]:
        groups = timm.optim.param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.5)
        return {id(p): (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}

    before, names = settings(), {id(p): key for key, p in model.named_parameters()}
    convert(model, select="all")
    after = settings()
    assert {names[i]: setting for i, setting in before.items()} == {names[i]: after[i] for i in after}
    lowest, stem = min(scale for scale, _ in before.values()), stem_of(model)
    assert after[id(stem.weight)] == (lowest, 0.05) and after[id(stem.bn.weight)] == (lowest, 0.0)
    # Freezing by the group matcher reaches the same parameters.
    own = {key for key, p in model.named_parameters() if p is stem.weight or p is stem.bn.weight}
    matched = timm.models.group_parameters(model, model.group_matcher(coarse=True))
    assert {group for group, keys in matched.items() if own & set(keys)} == {min(matched)}


def test_first_convolution_and_classifier_names_hold():
    """timm's own tests look these names up in the state dict."""
    for name in ("resnet18", "densenet121", "dpn68", "legacy_seresnet18", "halonet_h1"):
        model = timm.create_model(name)
        convert(model, select="all")
        cfg = model.pretrained_cfg
        assert f"{cfg['first_conv']}.weight" in model.state_dict()
        assert isinstance(model.get_submodule(cfg["first_conv"]).weight, nn.Parameter)
        assert f"{cfg['classifier']}.weight" in model.state_dict()


@pytest.mark.parametrize("name", ["resnet18", "resnetblur18"])
def test_models_built_with_blur_pool(name: str, x):
    options = {"aa_layer": timm.layers.BlurPool2d} if name == "resnet18" else {}
    model = randomised(timm.create_model(name, **options))
    stock, keys = outputs(model, x), list(model.state_dict())
    report = convert(model, select="none")
    assert set(report.poolings) == {"blurpool"} and any("BlurPool" in note for note in report.notes)
    assert torch.equal(outputs(model, x), stock)
    assert list(stock_state_dict(model)) == keys
    state = model.state_dict()
    other = timm.create_model(name, **options).eval()
    convert(other, select=half_of)
    other.load_state_dict(state)
    assert torch.equal(outputs(other, x), stock)
    assert torch.equal(outputs(revert(other), x), stock)


def test_a_pool_blurred_by_other_layers_is_refused_or_exact(x):
    """An average pool in place of the blur is another network; it must not be taken for a BlurPool."""
    for layer in (nn.AvgPool2d(2), timm.layers.BlurPool2d(64, filt_size=5, stride=2)):
        model = randomised(timm.create_model("resnet18"))
        model.maxpool = nn.Sequential(nn.MaxPool2d(3, 1, 1), layer)
        stock = outputs(model, x)
        with contextlib.suppress(mixpool.StemError):
            convert(model, select="none")
        assert torch.equal(outputs(model, x), stock)


# --- torchvision ------------------------------------------------------------------------------------------------------


def test_feature_extractor_of_torchvision(x):
    model = randomised(torchvision.models.resnet18())
    convert(model, select=half_of)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own, about nodes that differ between modes
        features = create_feature_extractor(model, {"conv1": "stem", "layer2": "middle", "fc": "logits"})
    with torch.no_grad():
        maps = features(x)
        assert torch.equal(maps["stem"], model.conv1(x))
        assert torch.equal(maps["logits"], model(x))
    assert maps["stem"].shape[-1] == x.shape[-1] // 4


def test_a_feature_extractor_that_taps_the_stem_is_refused(x):
    model = randomised(torchvision.models.resnet18())
    features = create_feature_extractor(model, {"relu": "full", "layer1": "pooled"})
    expected = outputs(features, x)
    with pytest.raises(mixpool.StemError, match="before wrapping"):
        convert(features, select="all")
    assert torch.equal(outputs(features, x)["full"], expected["full"])
