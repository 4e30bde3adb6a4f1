"""The whole of a stabilization: nothing to treat changes no bit, the way back, all or nothing, bad input."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from small_net import Net, assert_unchanged, snapshot
from strided_net import SIZE, TREATED, StridedNet, images, trained
from support import assert_close, assert_same_bits
from torch import Tensor, nn
from torch.nn.utils import prune

import mixpool
from mixpool import finalize, revert, stabilize
from mixpool.conversion.stock import converted_stems
from mixpool.stabilization import pictures
from mixpool.stabilization import stabilize as stabilize_module
from mixpool.stabilization.lowpass import binomial
from mixpool.stabilization.stabilize import ATTRIBUTE
from mixpool.stabilization.treat import treat, treated_layers

CONVERTING = [{"stem": "modulus"}, {"stem": "energy", "later": None}]
REPAIRS = [None, "statistics", "next", "all"]


@pytest.fixture
def x() -> Tensor:
    return images(4, seed=9)[..., :SIZE, :SIZE].contiguous()


@torch.no_grad()
def out(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)


# --- what is treated --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("repair", REPAIRS)
def test_nothing_asked_for_changes_no_bit(x, repair):
    model = trained()
    expected, before = out(model, x), snapshot(model)
    report = stabilize(model, images(), stem="max", later=None, repair=repair)
    assert report.plan == {} and report.repaired == () and report.kept_bytes == 0
    assert any("nothing to treat" in note for note in report.notes)
    assert {own.why for own in report.decimators} == {"it reads the image", "as asked"}
    assert torch.equal(report.before.movement, report.after.movement)
    assert_same_bits("output", out(model, x), expected)
    for key in ("modules", "parameters", "training", "hooks"):
        assert snapshot(model)[key] == before[key]
    assert_unchanged(revert(model), before)


def test_without_repair_the_network_is_the_treated_one(x):
    model = trained()
    by_hand = copy.deepcopy(model)
    treat(by_hand, TREATED)
    report = stabilize(model, images(), repair=None)
    assert report.plan == TREATED == treated_layers(model) and report.repaired == ()
    assert_same_bits("output", out(model, x), out(by_hand, x))
    pooled = model.relu(model.norm(model.conv(x)))
    dense = torch.nn.functional.max_pool2d(pooled, 3, 1, 1)
    assert_close("pool", model.pool(pooled), binomial(dense))


@pytest.mark.parametrize(
    ("options", "plan"),
    [
        ({"stem": "max"}, ["down", "side"]),
        ({"later": None}, ["pool"]),
        ({"order": "behind"}, ["pool", "down", "second", "side"]),
        ({"stem": "modulus"}, ["down", "side"]),
        ({"stem": "modulus", "later": None}, []),
    ],
    ids=str,
)
def test_what_is_asked_for_is_treated(x, options, plan):
    model = trained()
    shape, stock = model(x).shape, out(model, x)
    report = stabilize(model, images(), repair=None, **options)
    assert sorted(report.plan) == sorted(plan) and treated_layers(model) == report.plan
    assert bool(converted_stems(model)) == (options.get("stem") == "modulus")
    assert model(x).shape == shape and not torch.equal(out(model, x), stock)
    assert_same_bits("reverted", out(revert(model), x), stock)


def test_the_second_pool_is_not_the_stem_s_behind_a_converted_one():
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 7, 2, 3), nn.ReLU(), nn.MaxPool2d(3, 2, 1)),
        *(nn.Conv2d(8, 8, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 3)),
    )
    report = stabilize(model, images(), size=SIZE, stem="modulus", later=None, repair=None)
    assert report.plan == {} and list(converted_stems(model)) == ["0"]


def test_a_stem_that_cannot_be_converted_is_named():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(8, 8, 3, 2, 1), nn.Flatten(), nn.Linear(2048, 3))
    report = stabilize(model, images(), size=SIZE, stem="modulus", repair=None)
    assert report.plan == {"1": "low-pass before"}
    assert any("the stem was not converted" in note for note in report.notes)


def test_a_repair_brings_the_network_back_to_stock(x):
    stock = trained()
    found = {}
    for which in REPAIRS:
        model = copy.deepcopy(stock)
        report = stabilize(model, images(64), repair=which, depth="all")
        found[which] = report
        assert (report.kept_bytes > 0) == (which is not None)
        assert all(own.after <= own.before + 1e-6 for own in report.repaired if own.what != "left")
    assert {own.name for own in found["next"].repaired} == {"", "down", "side"}
    assert {own.name for own in found["all"].repaired} == {"", "down", "second", "side", "last", "head"}
    assert {own.name for own in found["statistics"].repaired} == {""}
    assert found["all"].repaired[-1].after <= found["next"].repaired[-1].after


@pytest.mark.parametrize("options", [{}, {"stem": "modulus"}], ids=str)
def test_equal_seeds_give_equal_networks(options):
    first, second, third = (trained() for _ in range(3))
    stabilize(first, images(), **options)
    stabilize(second, images(), **options)
    stabilize(third, images(), seed=1, **options)
    for (name, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert_same_bits(name, a, b)
    assert any(not torch.equal(a, b) for a, b in zip(first.state_dict().values(), third.state_dict().values()))


def test_fidelity_is_the_ridge(monkeypatch):
    ridges = []
    monkeypatch.setattr("mixpool.stabilization.choose.repair", lambda *_, ridge, **__: ridges.append(ridge) or [])
    for fidelity in (0.0, 0.5, 1.0):
        stabilize(trained(), images(), fidelity=fidelity)
    assert list(dict.fromkeys(ridges)) == pytest.approx([1, 0.1, 0.01])


def test_the_loop_can_be_watched():
    seen = []

    def track(steps, total):
        seen.append(total)
        return steps

    stabilize(trained(), images(), track=track)
    assert len(seen) == 1 and seen[0] >= 1


# --- state ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["before", "behind"])
def test_keys_shapes_and_parameters_stay(order):
    model = trained()
    before = snapshot(model)
    shapes = {key: (value.shape, value.dtype) for key, value in model.state_dict().items()}
    stabilize(model, images(), order=order)
    after = snapshot(model)
    assert {key: (value.shape, value.dtype) for key, value in model.state_dict().items()} == shapes
    assert list(after["state"]) == list(before["state"])
    for key in ("modules", "parameters", "training", "requires_grad", "hooks"):
        assert after[key] == before[key], key
    assert all(p.grad is None for p in model.parameters())
    fresh = trained(seed=2)
    fresh.load_state_dict(model.state_dict())
    treat(fresh, treated_layers(model))
    assert_same_bits("another model", out(fresh, images()), out(model, images()))


@pytest.mark.parametrize("options", [{"repair": which} for which in REPAIRS] + CONVERTING, ids=str)
def test_revert_is_the_way_back_to_the_bit(x, options):
    model = trained()
    expected, before = out(model, x), snapshot(model)
    stabilize(model, images(), **options)
    assert not torch.equal(out(model, x), expected)
    assert revert(model) is model
    assert_unchanged(model, before)
    assert_same_bits("output", out(model, x), expected)
    with pytest.raises(ValueError):
        revert(model)
    stabilize(model, images(), **options)  # and again


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("options", [{}, {"stem": "energy"}], ids=str)
def test_copies_are_stabilized_networks(x, copied, options):
    model = trained()
    stock = out(model, x)
    stabilize(model, images(), **options)
    other = copied(model)
    assert treated_layers(other) == treated_layers(model)
    assert_same_bits("copy", out(other, x), out(model, x))
    stabilized = out(model, x)
    assert_same_bits("reverted copy", out(revert(other), x), stock)
    assert_same_bits("the model itself", out(model, x), stabilized)


def test_the_state_goes_through_torch_save(x):
    model = trained()
    stabilize(model, images())
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    assert list(torch.load(file, weights_only=True)) == list(trained().state_dict())


def test_twice_is_refused():
    model = trained()
    stabilize(model, images())
    before = snapshot(model)
    with pytest.raises(ValueError, match="stabilized already"):
        stabilize(model, images())
    assert_unchanged(model, before)
    by_hand = trained()
    treat(by_hand, TREATED)
    with pytest.raises(ValueError, match="stabilized already"):
        stabilize(by_hand, images())


def test_finalize_drops_the_stock_weights(x):
    model = trained()
    report = stabilize(model, images())
    state = getattr(model, ATTRIBUTE)
    changed = [t for name, t in [*model.named_parameters(), *model.named_buffers()] if name in state.stock]
    assert report.kept_bytes == state.num_bytes == sum(t.numel() * t.element_size() for t in changed) > 0
    expected = out(model, x)
    assert finalize(model) is model and state.num_bytes == 0
    assert_same_bits("output", out(model, x), expected)
    with pytest.raises(ValueError, match="finalize"):
        revert(model)
    assert_same_bits("output", out(model, x), expected)
    with pytest.raises(ValueError, match="expected a stabilized model"):
        finalize(trained())


def test_a_trained_network_has_no_way_back(x):
    model = trained()
    stabilize(model, images())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model.train()(x).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    optimizer.step()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"has changed since stabilize\(\)"):
        revert(model)
    assert_unchanged(model, before)
    assert treated_layers(model) == TREATED


def test_without_repair_a_trained_network_can_be_reverted(x):
    """No stock value is kept, so none undoes the training."""
    model = trained()
    stabilize(model, images(), repair=None)
    with torch.no_grad():
        model.down.weight += 1
    weight = model.down.weight.clone()
    revert(model)
    assert treated_layers(model) == {} and torch.equal(model.down.weight, weight)


def test_a_converted_network_reverts_as_before(x):
    model = Net().eval()
    expected = out(model, x)
    mixpool.convert(model, select="all")
    assert_same_bits("output", out(revert(model), x), expected)


def test_modes_and_flags_are_put_back():
    model = trained().train()
    model.norm.eval()
    model.head.weight.requires_grad_(False)
    before = snapshot(model)
    stabilize(model, images())
    after = snapshot(model)
    assert after["training"] == before["training"] and after["requires_grad"] == before["requires_grad"]
    assert torch.is_grad_enabled()
    assert model.down.weight.is_leaf and model.down.weight.grad_fn is None


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_in_every_grad_mode(x, mode):
    expected = trained()
    stabilize(expected, images())
    model = trained()
    stock = out(model, x)
    with mode():
        stabilize(model, images())
    assert_same_bits("output", out(model, x), out(expected, x))
    model.train()(x).sum().backward()
    model.eval()
    model.norm.running_mean.copy_(expected.norm.running_mean)
    assert not any(p.is_inference() for p in model.parameters())
    with mode():
        fresh = copy.deepcopy(expected)
        revert(fresh)
    assert_same_bits("reverted", out(fresh, x), stock)


def test_double_precision(x):
    model = trained().double()
    expected = out(model, x.double())
    report = stabilize(model, images().double())
    assert all(v.dtype == torch.float64 for v in model.state_dict().values() if v.is_floating_point())
    assert report.repaired[-1].after <= report.repaired[0].before
    assert_same_bits("output", out(revert(model), x.double()), expected)


def test_channels_last_stays():
    model = trained().to(memory_format=torch.channels_last)
    strides = {name: p.stride() for name, p in model.named_parameters()}
    stock = out(model, images())
    stabilize(model, images())
    assert {name: p.stride() for name, p in model.named_parameters()} == strides
    assert_same_bits("reverted", out(revert(model), images()), stock)


# --- all or nothing ---------------------------------------------------------------------------------------------------


class Broken(Exception):
    pass


STEPS = [  # (name in the module, at which call), in their order
    *(("squares_for", 1), ("split", 1), ("crop", 1), ("trace", 1), ("steadiness", 1)),
    *(("find_decimators", 1), ("plan_of", 1), ("levels_of", 1), ("choose", 1), ("steadiness", 2)),
    *(("_fingerprint", 1), ("_fingerprint", 3), ("treat", 1), ("setattr", 1)),
]
CONVERTED_STEPS = [("_convert", 1), ("trace", 2), ("converted_stems", 1), ("converted_stems", 2), *STEPS]


def breaks_at(monkeypatch: pytest.MonkeyPatch, name: str, at: int) -> list[int]:
    """Make a function of the module raise at its `at`-th call; the calls that were made."""
    calls: list[int] = []
    function = setattr if name == "setattr" else getattr(stabilize_module, name)

    def broken(*args, **options):
        calls.append(len(calls) + 1)
        if len(calls) == at:
            raise Broken
        return function(*args, **options)

    monkeypatch.setattr(stabilize_module, name, broken, raising=False)
    return calls


@pytest.mark.parametrize(("step", "at"), STEPS, ids=str)
def test_an_error_at_any_step_changes_nothing(monkeypatch, step, at):
    model = trained().train()
    before = snapshot(model)
    calls = breaks_at(monkeypatch, step, at)
    with pytest.raises(Broken):
        stabilize(model, images())
    assert len(calls) == at
    assert_unchanged(model, before)
    assert treated_layers(model) == {} and not hasattr(model, ATTRIBUTE)


@pytest.mark.parametrize(("step", "at"), CONVERTED_STEPS, ids=str)
def test_an_error_beside_a_conversion_changes_nothing(monkeypatch, step, at):
    model = trained()
    before = snapshot(model)
    breaks_at(monkeypatch, step, at)
    with pytest.raises(Broken):
        stabilize(model, images(), stem="modulus")
    assert_unchanged(model, before)
    assert treated_layers(model) == {} and converted_stems(model) == {}


def test_a_loader_that_breaks_changes_nothing():
    def loader():
        yield images(4)
        raise Broken

    model = trained()
    before = snapshot(model)
    with pytest.raises(Broken):
        stabilize(model, loader())
    assert_unchanged(model, before)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stem": "blur"}, "expected stem to be one of .*got 'blur'"),
        ({"later": "max"}, "expected later to be one of"),
        ({"order": "after"}, "expected order to be one of"),
        ({"repair": "some"}, "expected repair to be one of"),
        ({"fidelity": 1.5}, "fidelity from 0 to 1, got 1.5"),
        ({"fidelity": float("nan")}, "fidelity from 0 to 1"),
        ({"size": 64}, "at least 64 pixels"),
        ({"labels": torch.zeros(3)}, "a label for each of the 16 images, got 3"),
    ],
    ids=str,
)
def test_bad_arguments(options, message):
    model = trained()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        stabilize(model, images(), **options)
    assert_unchanged(model, before)


def with_nan(model: nn.Module) -> nn.Module:
    model.down.weight.data[0, 0, 0, 0] = float("nan")
    return model


def with_infinite_statistics(model: nn.Module) -> nn.Module:
    model.norm.running_var[0] = float("inf")
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (with_nan, "finite weights, down.weight has NaN"),
        (with_infinite_statistics, "finite weights, norm.running_var has NaN or infinity"),
        (lambda model: model.half(), "expected float32 or float64, conv.weight is torch.float16"),
        (lambda model: model.bfloat16(), "is torch.bfloat16: model.float"),
        (lambda model: model.to("meta"), "meta device"),
        (lambda model: torch.compile(model), "expected the plain model, found a OptimizedModule"),
        (lambda model: nn.DataParallel(model), "expected the plain model, found a DataParallel"),
        (lambda model: nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)), "a network with parameters"),
        (lambda model: model.state_dict(), "expected a torch.nn.Module, got"),
    ],
)
def test_bad_models(make, message):
    model = make(trained())
    before = snapshot(model) if isinstance(model, nn.Module) else None
    state = {k: v for k, v in before["state"].items()} if before else {}
    with pytest.raises(ValueError, match=message):
        stabilize(model, images())
    if before and not any(v.is_meta or not torch.isfinite(v).all() for v in state.values()):
        assert_unchanged(model, before)


def test_a_model_that_cannot_be_copied_is_refused():
    model = trained()
    model.cached = model.head.weight * 2  # part of a graph
    with pytest.raises(ValueError, match="the model cannot be copied: .*graph leaves"):
        stabilize(model, images())
    assert treated_layers(model) == {}


def test_pruned_layers_are_treated_and_not_refitted(x):
    model = trained()
    prune.l1_unstructured(model.down, "weight", 3)
    stock = out(model, x)
    report = stabilize(model, images())
    assert report.plan == TREATED
    assert {own.name for own in report.repaired if own.what != "left"} == {"", "side"}
    assert_same_bits("reverted", out(revert(model), x), stock)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_script_modules_are_refused():
    with pytest.raises(ValueError, match="ScriptModule"):
        stabilize(torch.jit.script(trained()), images())


def test_a_model_compiled_in_place_is_refused():
    model = trained()
    model.compile()
    with pytest.raises(ValueError, match="compile"):
        stabilize(model, images())
    assert treated_layers(model) == {}


def test_wrapped_in_distributed_data_parallel(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="DistributedDataParallel"):
            stabilize(nn.parallel.DistributedDataParallel(trained()), images())
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda: images()[:, :1], r"does not run on an image \(1, 1, 32, 32\)"),
        (lambda: torch.cat([images(), images()], dim=1), r"does not run on an image \(1, 6, 32, 32\)"),
        (lambda: [images()[0], images()[0, :, :-1]], "images of one size"),
        (lambda: [], "at least one image"),
        (lambda: images().mul(50).add(128).clamp(0, 255).byte(), "normalised images as float tensors"),
        (lambda: images() / 0, "finite images"),
        (lambda: [("a", "b")], "normalised images as float tensors"),
        (lambda: 7, "an iterable of such"),
    ],
)
def test_bad_images(given, message):
    model = trained().train()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        stabilize(model, given(), size=SIZE)
    assert_unchanged(model, before)


def test_images_that_nobody_normalised_are_noted():
    for given, note in ((images() * 60, "bytes"), (torch.rand(16, 3, 40, 40), "0 to 1"), (images() * 5, "training")):
        report = stabilize(trained(), given, size=SIZE, repair=None)
        assert any("WARNING" in text and note in text for text in report.notes), note
        assert "WARNING" in str(report)


def test_few_images_are_noted():
    for count in (1, 2, 7, 15):
        model = trained()
        report = stabilize(model, images(count), size=SIZE)
        assert any(f"only {count} image(s)" in note for note in report.notes)
        assert torch.isfinite(out(model, images())).all()


def test_no_images_at_all(monkeypatch):
    monkeypatch.setattr(pictures, "NUM_SYNTHETIC", 16)
    model = trained()
    report = stabilize(model, size=SIZE)
    assert report.plan == TREATED and any("no images given" in note for note in report.notes)
    assert sum(report.num_images) == 16
    gray = nn.Sequential(nn.Conv2d(1, 4, 3, 2), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(900, 2))
    with pytest.raises(ValueError, match="does not run on an image"):
        stabilize(gray, size=SIZE)


def test_a_network_without_strided_layers_is_left():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    before = snapshot(model)
    report = stabilize(model, images())
    assert report.decimators == () and report.plan == {} and any("nothing to treat" in note for note in report.notes)
    assert "0 of 0 decimating layers" in str(report)
    assert_unchanged(revert(model), before)


def test_a_layer_called_twice_is_left():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.pool, self.head = nn.Conv2d(3, 3, 3, 2, 1), nn.MaxPool2d(2), nn.Linear(3, 3)
            self.again = self.pool

        def forward(self, x: Tensor) -> Tensor:
            x = self.again(self.pool(torch.relu(self.conv(x))))
            return self.head(x.mean(dim=(2, 3)))

    model = Twice().eval()
    x = images()
    expected = out(model, x)
    report = stabilize(model, x)
    assert report.plan == {} and any("called 2 times" in own.why for own in report.decimators)
    assert_same_bits("output", out(model, x), expected)


def test_a_layer_under_two_names_is_treated_once(x):
    model = trained()
    model.alias = model.pool
    stock = out(model, x)
    report = stabilize(model, images())
    assert report.plan == TREATED and model.alias is model.pool
    assert_same_bits("output", out(revert(model), x), stock)


def test_labels_give_the_accuracy():
    model = trained()
    given = images(40)
    labels = out(model, given[..., :SIZE, :SIZE]).argmax(dim=1)
    for own in (labels, labels.tolist(), labels.numpy()):
        report = stabilize(copy.deepcopy(model), given, size=SIZE, labels=own)
        assert report.before.summary()["top1"]["mean"] == 100
        assert report.after.summary()["top1"] == report.same_class
    assert "top-1" in str(report)


def test_a_network_that_is_no_classifier(x):
    class Maps(StridedNet):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            x = self.pool(self.relu(self.norm(self.conv(x))))
            return {"low": x, "high": self.norm1(self.down(x))}

    model = trained(Maps())
    expected = model(x)
    report = stabilize(model, images())
    assert report.same_class is None and report.before.flips is None and "relative change" in str(report)
    assert report.plan == {name: TREATED[name] for name in ("pool", "down")}
    revert(model)
    assert all(torch.equal(model(x)[name], value) for name, value in expected.items())


@pytest.mark.parametrize(
    "outputs", [lambda x: [], lambda x: x.sum(), lambda x: [x, x[0, :1]]], ids=["none", "sum", "odd"]
)
def test_outputs_that_are_not_one_per_image_are_refused(outputs):
    """As those of a detector, which finds as many things as there are."""

    class Finds(StridedNet):
        def forward(self, x: Tensor) -> object:
            return outputs(super().forward(x))

    model = trained(Finds())
    before = snapshot(model)
    with pytest.raises(ValueError, match="of a detector, give the backbone"):
        stabilize(model, images())
    assert_unchanged(model, before)


def test_a_network_that_gives_nothing_finite_is_refused():
    class Huge(StridedNet):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * float("inf")

    model = trained(Huge())
    before = snapshot(model)
    with pytest.raises(ValueError, match="not finite"):
        stabilize(model, images())
    assert_unchanged(model, before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_another_device(x):
    model = trained().cuda()
    stock = out(model, x.cuda())
    report = stabilize(model, images())
    assert report.plan == TREATED and all(v.is_cuda for v in model.state_dict().values())
    assert_same_bits("output", out(revert(model), x.cuda()), stock)
