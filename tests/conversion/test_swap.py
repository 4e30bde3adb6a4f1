"""Placeholders and hooks: a converted model answers other tools as the stock model does."""

from __future__ import annotations

import copy
import importlib
import itertools
import pickle
import re

import pytest
import timm
import torch
import torchvision
from small_net import CHANNELS, STRIPES, Net, assert_unchanged, smooth_images, snapshot
from torch import Tensor, nn

from mixpool import MixPoolStem, convert, revert
from mixpool.conversion.swap import Placeholder


@pytest.fixture
def images() -> Tensor:
    return smooth_images()


# --- hooks ------------------------------------------------------------------------------------------------------------


def test_hooks_move_and_their_handles_work():
    model = Net().eval()
    seen = []

    def forward_hook(name):
        return lambda module, args, out: seen.append((name, tuple(out.shape)))

    def forward_pre_hook(module, args, kwargs):
        seen.append(("conv pre", tuple(args[0].shape)))

    def backward_hook(module, grad_in, grad_out):
        seen.append(("conv backward", tuple(grad_out[0].shape)))

    x = torch.randn(2, 3, 48, 48, requires_grad=True)
    handles = [
        model.conv1.register_forward_pre_hook(forward_pre_hook, with_kwargs=True),
        model.conv1.register_forward_hook(forward_hook("conv"), always_call=True),
        model.conv1.register_full_backward_hook(backward_hook),
        model.relu.register_forward_hook(forward_hook("relu")),
        model.maxpool.register_forward_hook(forward_hook("pool")),
        model.fc.register_forward_hook(forward_hook("fc")),
    ]
    model.relu.inplace = False  # which full backward hooks do not allow
    model(x).sum().backward()
    stock = list(seen)
    assert [name for name, _ in stock] == ["conv pre", "conv", "relu", "pool", "fc", "conv backward"]

    report = convert(model, select=STRIPES)
    notes = " / ".join(report.notes)
    for name, count in (("conv1", 3), ("relu", 1), ("maxpool", 1)):
        assert re.search(rf"{count} hook\(s\) of {name} ", notes), notes
    assert "fc" not in notes
    seen.clear()
    model(x).sum().backward()
    assert [name for name, _ in seen] == [name for name, _ in stock]
    assert dict(seen)["conv"] == dict(seen)["relu"] == dict(seen)["pool"] == dict(stock)["pool"]

    handles[1].remove()  # while converted
    seen.clear()
    model(x)
    assert [name for name, _ in seen] == ["conv pre", "relu", "pool", "fc"]
    late = model.conv1.register_forward_hook(forward_hook("late"))

    revert(model)
    seen.clear()
    model(x).sum().backward()
    assert [name for name, _ in seen] == ["conv pre", "late", "relu", "pool", "fc", "conv backward"]
    assert dict(seen)["conv backward"] == dict(stock)["conv backward"]
    for handle in [*handles, late]:
        handle.remove()
    seen.clear()
    model(x).sum().backward()
    assert seen == []


def test_hooks_of_the_norm_layer():
    model = Net().eval()
    seen = []
    handle = model.bn1.register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape)))
    report = convert(model, select=STRIPES)
    assert any("bn1" in note for note in report.notes)
    model(torch.randn(2, 3, 48, 48))
    assert len(seen) == 1
    revert(model)
    model(torch.randn(2, 3, 48, 48))
    assert seen[1:] == [(2, CHANNELS, 24, 24)]
    handle.remove()
    model(torch.randn(2, 3, 48, 48))
    assert len(seen) == 2


def test_no_hooks_of_ours_stay_behind(images):
    model = Net()
    before = snapshot(model)
    convert(model, select="all", images=images)
    stem = model.conv1
    assert not stem._forward_pre_hooks and not stem._forward_hooks
    revert(model)
    assert snapshot(model)["hooks"] == before["hooks"]
    revert(convert_and_return(model))
    assert_unchanged(model, before)


def convert_and_return(model: nn.Module) -> nn.Module:
    convert(model, select="all")
    return model


HOOKS = [name for name in vars(nn.Module()) if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called"))]


def hook_dictionaries(model: nn.Module) -> list[int]:
    """Ids of the hook dictionaries of all modules, those that wait for revert() too."""
    modules = {id(module): module for module in model.modules()}
    for stem in [module for module in model.modules() if isinstance(module, MixPoolStem)]:
        modules |= {id(module): module for module in stem.stock.modules.values()}
    return [id(vars(module)[name]) for module in modules.values() for name in HOOKS]


@pytest.mark.parametrize("hooked_before", [(), ("relu",), ("conv1", "bn1", "relu", "maxpool")], ids=str)
def test_no_two_modules_share_a_hook_dictionary(hooked_before: tuple[str, ...]):
    model = Net()
    for name in hooked_before:
        model.get_submodule(name).register_forward_hook(lambda *args: None)
        model.get_submodule(name).register_full_backward_pre_hook(lambda *args: None)
    assert len(HOOKS) > 8
    convert(model, select=STRIPES)
    for twin in (model, copy.deepcopy(model), revert(model)):
        shared = hook_dictionaries(twin)
        assert len(shared) == len(set(shared))


@pytest.mark.parametrize("name", ["bn1", "relu", "maxpool"])
@pytest.mark.parametrize("select", ["none", STRIPES], ids=["none", "mixed"])
def test_a_hook_registered_after_conversion_sees_the_whole_output_once(name: str, select):
    model = Net().eval()
    convert(model, select=select)
    x = torch.randn(2, 3, 48, 48)
    seen = []
    handle = model.get_submodule(name).register_forward_hook(lambda module, args, out: seen.append(out))
    model(x)
    (out,) = seen
    assert torch.equal(out, model.conv1(x)) and out.shape == (2, CHANNELS, 12, 12)
    handle.remove()
    model(x)
    assert len(seen) == 1


@pytest.mark.parametrize("name", ["bn1", "relu", "maxpool"])
def test_a_hook_that_changes_the_output_acts_once(name: str):
    model = Net().eval()
    convert(model, select=STRIPES)
    x = torch.randn(2, 3, 48, 48)
    stem = model.conv1(x)
    model.get_submodule(name).register_forward_hook(lambda module, args, out: 2 * out)
    model.conv2.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    seen: list[Tensor] = []
    model(x)
    assert torch.equal(seen[0], 2 * stem)


def test_hooks_registered_while_converted_stay_with_the_module():
    model = Net().eval()
    convert(model, select=STRIPES)
    seen = []
    for name in ("conv1", "bn1", "relu", "maxpool"):
        model.get_submodule(name).register_forward_hook(lambda module, args, out, name=name: seen.append(name))
    for _ in range(2):
        model(torch.randn(1, 3, 48, 48))
        assert seen == ["conv1", "bn1", "relu", "maxpool"]
        seen.clear()
        revert(model)
        model(torch.randn(1, 3, 48, 48))
        assert seen == ["conv1", "bn1", "relu", "maxpool"]
        seen.clear()
        convert(model, select="all")


def test_a_full_backward_hook_where_the_next_step_is_in_place():
    """googlenet calls F.relu(inplace=True) after its norm layer; a hooked module's output is a view."""
    model = torchvision.models.googlenet(aux_logits=False, init_weights=False, num_classes=3).eval()
    grads = {}
    x = torch.randn(1, 3, 64, 64, requires_grad=True)

    def remember(name: str):
        return lambda module, grad_in, grad_out: grads.update({name: grad_out[0].clone()})

    model.conv1.conv.register_full_backward_hook(remember("before"))
    convert(model, select="none")
    model.conv1.conv.register_full_backward_hook(remember("after"))
    model(x).sum().backward()
    assert torch.equal(grads["before"], grads["after"]) and (grads["after"] != 0).any()
    assert grads["after"].shape == (1, 64, 16, 16)


# --- placeholders -----------------------------------------------------------------------------------------------------


def in_training(model: nn.Module, x: Tensor) -> tuple[bool, bool]:
    """Whether a training step moves (the running statistics, the affine map) of the stem's norm layer."""
    norm = model.conv1.bn if isinstance(model.conv1, MixPoolStem) else model.bn1
    mean, weight = norm.running_mean.clone(), norm.weight.detach().clone()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(x).square().sum().backward()
    optimizer.step()
    return not torch.equal(norm.running_mean, mean), not torch.equal(norm.weight, weight)


FREEZE = {
    "nothing": lambda model: None,
    "eval": lambda model: model.bn1.eval(),
    "train(False)": lambda model: model.bn1.train(False),
    "requires_grad_": lambda model: model.bn1.requires_grad_(False),
    "parameters": lambda model: [p.requires_grad_(False) for p in model.bn1.parameters()],
    "weight": lambda model: model.bn1.weight.requires_grad_(False),
    "momentum": lambda model: setattr(model.bn1, "momentum", 0.0),
    "eval and train after it": lambda model: (model.bn1.eval(), model.train()),
    "eval of the model, train of the layer": lambda model: (model.eval(), model.bn1.train()),
    "requires_grad_ of the model": lambda model: (model.bn1.requires_grad_(False), model.requires_grad_(True)),
}


@pytest.mark.parametrize("freeze", FREEZE.values(), ids=FREEZE)
def test_freezing_by_name_does_what_it_does_to_the_stock_model(images, freeze):
    answers = []
    for is_converted in (False, True):
        torch.manual_seed(0)
        model = Net().train()
        if is_converted:
            convert(model, select=STRIPES)
        freeze(model)
        answers.append(in_training(model, images))
        modes = {name: module.training for name, module in model.named_modules() if not name.startswith("conv1.")}
        answers.append(modes)
        if is_converted:
            assert model.conv1.bn.training == model.bn1.training
    assert answers[:2] == answers[2:]


def test_freezing_outlives_revert_and_convert():
    model = Net().train()
    convert(model, select=STRIPES)
    model.bn1.eval().requires_grad_(False)
    model.bn1.momentum, model.bn1.eps = 0.02, 1e-3
    revert(model)
    assert not model.bn1.training and not any(p.requires_grad for p in model.bn1.parameters())
    assert (model.bn1.momentum, model.bn1.eps) == (0.02, 1e-3) and model.conv1.training
    convert(model, select=STRIPES)
    assert not model.bn1.training and not model.conv1.bn.weight.requires_grad and model.conv1.bn.eps == 1e-3


def test_what_is_asked_of_a_placeholder_is_answered_by_the_part(images):
    model = Net()
    stock = dict(model.named_modules())
    settings = {name: copy.copy(vars(module)) for name, module in stock.items()}
    convert(model, select=STRIPES)
    norm = model.conv1.bn
    assert model.bn1.weight is norm.weight and model.bn1.running_var is norm.running_var
    assert list(model.bn1.parameters()) == [norm.weight, norm.bias]
    assert {name for name, _ in model.bn1.named_buffers()} == {"running_mean", "running_var", "num_batches_tracked"}
    for name, names in {"bn1": ["eps", "momentum", "num_features"], "maxpool": ["kernel_size", "stride"]}.items():
        for attribute in names:
            assert getattr(model.get_submodule(name), attribute) == settings[name][attribute]
    assert model.relu.inplace is True
    with pytest.raises(AttributeError, match="'Placeholder' object has no attribute 'nothing_like_this'"):
        model.bn1.nothing_like_this  # noqa: B018
    assert not hasattr(model.maxpool, "running_mean")

    model.bn1.weight = nn.Parameter(torch.full((CHANNELS,), 2.0))
    assert model.conv1.bn.weight is model.bn1.weight and (model.conv1.bn.weight == 2).all()
    model.bn1.reset_running_stats()
    assert (norm.running_mean == 0).all()
    with pytest.raises(AttributeError, match="kernel_size belongs to the stem now: revert"):
        model.maxpool.kernel_size = 2


def test_what_tools_add_stays_where_it_was_added(images):
    """Counters as thop's, flags as torch.ao's: each module its own."""
    model = Net().eval()
    convert(model, select=STRIPES)
    expected = model(images)
    for module in model.modules():
        module.register_buffer("total_ops", torch.zeros(1))
        module.flag = module
    assert all(module.flag is module for module in model.modules())
    names = [name for name, _ in model.named_buffers() if name.endswith("total_ops")]
    assert len(names) == len(list(model.modules()))
    assert torch.equal(model(images), expected)


def test_no_parameter_twice_and_the_same_keys():
    model = Net()
    expected = {id(p): name.replace("bn1.", "conv1.bn.") for name, p in model.named_parameters()}
    convert(model, select=STRIPES)
    assert {id(p): name for name, p in model.named_parameters(remove_duplicate=False)} == expected
    assert len(list(model.named_parameters(remove_duplicate=False))) == len(expected)
    by_module = [id(p) for module in model.modules() for p in module.parameters(recurse=False)]
    assert sorted(by_module) == sorted(expected)
    buffers = [id(b) for module in model.modules() for b in module.buffers(recurse=False)]
    assert len(buffers) == len(set(buffers)) == len(list(model.buffers()))
    assert set(model.state_dict()) == set(expected.values()) | {
        *(f"conv1.{name}" for name in ("plan", "calibration")),
        *(f"conv1.bn.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")),
    }
    torch.optim.SGD(model.parameters(), lr=0.1)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_placeholders_of_a_copy_point_at_the_copy(images, duplicate):
    model = Net().train()
    convert(model, select=STRIPES)
    twin = duplicate(model)
    for name, placeholder in twin.named_modules():
        if isinstance(placeholder, Placeholder):
            assert placeholder._stem is twin.conv1, name
            assert not any(placeholder.part is module for module in model.modules())
    assert twin.bn1.part is twin.conv1.bn and twin.relu.part is twin.conv1.act
    assert twin.maxpool.part is twin.conv1.stock.modules["pool"]
    twin.bn1.eval().requires_grad_(False)
    assert not twin.conv1.bn.training and model.conv1.bn.training and model.conv1.bn.weight.requires_grad
    revert(twin)
    assert isinstance(model.bn1, Placeholder) and not isinstance(twin.bn1, Placeholder)
    assert torch.equal(copy.deepcopy(twin).eval()(images), revert(copy.deepcopy(model)).eval()(images))


def test_each_model_of_timm_can_be_read_through_its_placeholders():
    """The settings that code looks up by name, where norm and activation are one module, or the pool is blurred."""
    for name, norm in {"densenet121": "features.norm0", "resnetblur18": "bn1", "dpn68": "features.conv1_1.bn"}.items():
        model = timm.create_model(name)
        before = model.get_submodule(norm).eps
        convert(model, select="none")
        placeholder = model.get_submodule(norm)
        assert isinstance(placeholder, Placeholder) and placeholder.eps == before
        assert placeholder.weight.shape == placeholder.running_mean.shape
        assert type(placeholder.part).__name__ in repr(placeholder)


# --- with a process group ---------------------------------------------------------------------------------------------


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.filterwarnings("ignore")  # torch's own, about CPUs and about itself
def test_sharded_data_parallel(process_group, images, version: int):
    """FSDP walks all modules' own parameters and exchanges them."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    model = Net().eval()
    convert(model, select=STRIPES)
    expected = model(images)
    if version == 1:
        options = {"device_id": torch.device("cpu"), "use_orig_params": True}
        model = FullyShardedDataParallel(model, **options)
    else:
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    out = model(images)
    torch.testing.assert_close(out, expected)
    out.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


# --- revert, all or nothing -------------------------------------------------------------------------------------------


class Failure(Exception):
    pass


CALLS_IN_REVERT = {"set_submodule": 4, "move_hooks": 4, "key_holder": 1, "stock_values": 1}


@pytest.mark.parametrize(
    ("place", "call"), [(name, i) for name, count in CALLS_IN_REVERT.items() for i in range(count)]
)
def test_a_failing_revert_changes_nothing(monkeypatch, images, place: str, call: int):
    conversion = importlib.import_module("mixpool.conversion.convert")  # `mixpool.convert` is the function
    model = Net().train()
    model.feature_info = [{"num_chs": CHANNELS, "reduction": 2, "module": "relu"}]
    model.relu.register_forward_hook(lambda *args: None)
    stock = {key: value.clone() for key, value in model.state_dict().items()}
    convert(model, select=STRIPES, images=images)
    model.bn1.eval()
    before, expected = snapshot(model), copy.deepcopy(model).eval()(images)
    original, calls = getattr(conversion, place), itertools.count()

    def flaky(*args):
        if next(calls) == call:
            raise Failure
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(conversion, place, flaky)
        with pytest.raises(Failure):
            revert(model)
    assert_unchanged(model, before)
    assert model.feature_info[0]["reduction"] == 4
    assert torch.equal(copy.deepcopy(model).eval()(images), expected)
    stock_files = copy.deepcopy(model)
    with pytest.warns(UserWarning, match="no channel plan"):  # the renaming of keys is still there
        stock_files.load_state_dict(stock)
    revert(model)
    assert model.feature_info[0]["reduction"] == 2 and not model.bn1.training
    assert all(torch.equal(value, stock[key]) for key, value in model.state_dict().items())


def test_moving_the_placeholder_moves_the_part():
    """model.half() and then model.bn1.float() is the usual way to mixed precision."""
    model = torchvision.models.resnet18()
    convert(model, select="none")
    model.half()
    assert model.bn1.weight.dtype == torch.float16
    model.bn1.float()
    assert model.conv1.bn.weight.dtype == model.conv1.bn.running_var.dtype == torch.float32
    assert model.conv1.weight.dtype == torch.float16


@pytest.mark.parametrize("duplicate", [lambda model: model, copy.deepcopy], ids=["itself", "a copy"])
@pytest.mark.parametrize(
    "name, module", [("bn1", nn.GroupNorm(8, 64)), ("relu", nn.SiLU()), ("maxpool", nn.Identity())]
)
def test_a_module_put_in_the_place_of_a_part_raises(duplicate, name, module):
    """It would act on the stem's pooled output, silently."""
    original = torchvision.models.resnet18().eval()
    convert(original, select="none")
    model, x = duplicate(original), torch.randn(2, 3, 64, 64)
    expected, placeholder = model(x), getattr(model, name)
    setattr(model, name, module)
    with pytest.raises(ValueError, match=rf"expected {name} to stay as conversion left it .*revert\(model\), replace"):
        model(x)
    setattr(model, name, nn.Sequential(placeholder))  # a wrapper around it
    assert torch.equal(model(x), expected)
    assert model is original or torch.equal(original(x), expected)


def test_a_pickled_model_runs_wherever_its_parts_are():
    model, x = torchvision.models.resnet18().eval(), torch.randn(2, 3, 64, 64)
    convert(model, select="none")
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(x), model(x))
    assert torch.equal(revert(again)(x), model(x))
