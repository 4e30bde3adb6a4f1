"""Changes that a linear layer can undo are undone, kind by kind; what gets worse is taken back."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
import torchvision
from small_net import snapshot
from strided_net import SIZE, TREATED, images, trained
from support import assert_close, assert_same_bits
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torchvision.ops import FrozenBatchNorm2d

from mixpool import repair
from mixpool.stabilization.agreement import disagreement, outputs_on
from mixpool.stabilization.pictures import Squares
from mixpool.stabilization.repair import Repaired, changed_places
from mixpool.stabilization.treat import treat, treated_layers

DOUBLE = torch.float64
TINY = 1e-9  # a ridge that holds nothing


class Scaled(nn.Module):
    """Channel by channel times a factor, plus a shift: what the next linear layer can undo."""

    def __init__(self, channels: int, shift: float = 0.0) -> None:
        super().__init__()
        self.factor, self.shift = torch.linspace(0.5, 2, channels, dtype=DOUBLE)[:, None, None], shift

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor + self.shift


class ScaledPool(nn.AvgPool2d):
    """A pool that does the same."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * torch.linspace(0.5, 2, x.shape[1], dtype=x.dtype)[:, None, None]


class Chain(nn.Module):
    """conv, pool (which gets changed), the layer that reads it, the head."""

    def __init__(self, layer: nn.Module, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.conv, self.pool, self.layer = nn.Conv2d(3, 8, 3, 1, 1), nn.AvgPool2d(2), layer
        self.norm = nn.Identity() if norm is None else norm
        self.head = nn.LazyLinear(5)
        with torch.no_grad():
            self.double().eval()(x_of(1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.layer(self.pool(torch.relu(self.conv(x)))))
        return self.head(torch.relu(x).flatten(1))


class LinearChain(Chain):
    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(torch.relu(self.conv(x)))
        return self.head(torch.relu(self.layer(x.permute(0, 2, 3, 1))).flatten(1))


def x_of(count: int, seed: int = 2) -> Tensor:
    return torch.randn(count, 3, 12, 12, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


LAYERS = {
    "plain": lambda: nn.Conv2d(8, 8, 3),
    "strided": lambda: nn.Conv2d(8, 8, 3, stride=2),
    "strided unequally": lambda: nn.Conv2d(8, 8, (3, 2), stride=(2, 1)),
    "dilated": lambda: nn.Conv2d(8, 8, 3, padding=2, dilation=2),
    "grouped": lambda: nn.Conv2d(8, 12, 3, padding=1, groups=4),
    "depthwise": lambda: nn.Conv2d(8, 16, 3, padding=1, groups=8),
    "1x1": lambda: nn.Conv2d(8, 8, 1),
    "linear": lambda: nn.Linear(8, 8),
}


def chain(name: str) -> Chain:
    return (LinearChain if name == "linear" else Chain)(LAYERS[name]())


def score(changed: nn.Module, stock: nn.Module, x: Tensor | None = None) -> float:
    x = x_of(20, seed=77) if x is None else x
    return disagreement(outputs_on(changed, [x]), outputs_on(stock, [x]))


# --- what can be undone -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYERS)
def test_a_change_that_the_next_layer_can_undo_is_undone(name):
    stock = chain(name)
    changed = copy.deepcopy(stock)
    changed.pool = ScaledPool(2)
    before = score(changed, stock)
    (done,) = repair(changed, stock, x_of(48), ridge=TINY)
    assert (done.name, done.what) == ("layer", "refitted")
    assert before > 1e-4 and score(changed, stock) < 1e-10 and done.after < 1e-10 < done.before
    factor = torch.linspace(0.5, 2, 8, dtype=DOUBLE)
    by_input = factor if name == "linear" else factor.reshape(changed.layer.groups, -1)
    if name == "linear":
        expected = stock.layer.weight / by_input
    else:
        groups, outputs = stock.layer.groups, stock.layer.out_channels
        by_output = by_input.repeat_interleave(outputs // groups, dim=0)
        expected = stock.layer.weight / by_output[:, :, None, None]
    assert_close("weight", changed.layer.weight, expected, (1e-4, 1e-4))  # because the ridge still holds a little
    for own in ("conv.weight", "head.weight"):
        assert_same_bits(own, changed.get_parameter(own), stock.get_parameter(own))


@pytest.mark.parametrize("module", [lambda: Scaled(8), lambda: nn.Sequential(nn.AvgPool2d(1), Scaled(8))])
def test_a_module_of_any_kind_may_have_changed(module):
    """One in which no layer is seen, and one that holds several."""
    stock = Chain(nn.Conv2d(8, 8, 3))
    stock.pool = nn.Identity()
    stock.head = nn.Linear(800, 5).double()
    changed = copy.deepcopy(stock)
    changed.pool = module()
    assert changed_places(changed, stock) == {"pool"}
    (done,) = repair(changed, stock, x_of(48), ridge=TINY)
    assert done.name == "layer" and done.what == "refitted" and score(changed, stock) < 1e-10


def test_an_offset_goes_into_the_bias():
    stock = Chain(nn.Conv2d(8, 8, 3))
    changed = copy.deepcopy(stock)
    changed.pool = nn.Sequential(nn.AvgPool2d(2), Scaled(8, shift=0.7))
    repair(changed, stock, x_of(48), ridge=TINY)
    assert score(changed, stock) < 1e-10
    assert (changed.layer.bias - stock.layer.bias).abs().max() > 0.01


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, FrozenBatchNorm2d], ids=lambda cls: cls.__name__)
def test_without_a_bias_the_offset_goes_into_the_running_mean(norm):
    layer = nn.Conv2d(8, 6, 3, bias=False)
    stock = Chain(layer, norm(6))
    with torch.no_grad():
        stock.norm.running_mean.normal_(0, 0.3)
        stock.norm.running_var.uniform_(0.5, 2)
    changed = copy.deepcopy(stock)
    changed.pool = nn.Sequential(nn.AvgPool2d(2), Scaled(8, shift=0.7))
    found = repair(changed, stock, x_of(48), ridge=TINY)
    assert [own.what for own in found] == ["statistics", "refitted"]
    assert score(changed, stock) < 1e-10
    assert changed.layer.bias is None
    # What the layer gave for the shift alone, it no longer gives; the mean that is subtracted knows.
    factor = torch.linspace(0.5, 2, 8, dtype=DOUBLE)
    offset = -(0.7 / factor * stock.layer.weight.sum(dim=(2, 3))).sum(dim=1)
    assert_close("mean", changed.norm.running_mean, stock.norm.running_mean - offset, (1e-4, 1e-4))
    assert_close("variance", changed.norm.running_var, stock.norm.running_var)


def test_a_norm_that_two_layers_feed_gets_no_offset():
    class TwoFeed(Chain):
        def forward(self, x: Tensor) -> Tensor:
            x = self.pool(torch.relu(self.conv(x)))
            return self.head(torch.relu(self.norm(self.layer(x) + x)).flatten(1))

    stock = TwoFeed(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
    changed = copy.deepcopy(stock)
    changed.pool = ScaledPool(2)
    found = repair(changed, stock, x_of(48), which="next")
    assert [own.name for own in found] == ["", "layer", "head"], "the head reads the changed map too"
    assert score(changed, stock) < found[0].before
    assert_same_bits("variance", changed.norm.running_var > 0, torch.ones(8, dtype=torch.bool))


def test_a_layer_that_was_changed_itself_is_fitted():
    """A strided convolution with a low-pass in front of it is the first that can answer for it."""
    stock = trained()
    changed = copy.deepcopy(stock)
    treat(changed, TREATED)
    found = repair(changed, stock, Squares(images(48), SIZE))
    assert {own.name for own in found} == {"", "down", "side"}
    assert treated_layers(changed) == TREATED
    assert found[-1].after < found[0].before
    held = images(32, seed=21)[..., :SIZE, :SIZE]
    untouched = copy.deepcopy(stock)
    treat(untouched, TREATED)
    assert score(changed, stock, held) < score(untouched, stock, held)


@pytest.mark.parametrize("order", ["before", "behind"])
def test_all_layers_from_the_change_on(order):
    stock = trained()
    changed = copy.deepcopy(stock)
    plan = TREATED if order == "before" else TREATED | {"down": "dense", "second": "decimating"}
    treat(changed, plan)
    found = repair(changed, stock, Squares(images(48), SIZE), which="all")
    assert [own.name for own in found][0] == "" and {own.name for own in found} == {
        *("", "down", "second", "side", "last", "head")
    }
    assert found[-1].after < found[0].before
    for before, after in zip(found, found[1:], strict=False):
        assert after.before == pytest.approx(before.after if before.what != "left" else before.before)


def test_statistics_alone_leave_the_weights():
    stock = trained()
    changed = copy.deepcopy(stock)
    treat(changed, TREATED)
    (done,) = repair(changed, stock, Squares(images(48), SIZE), which="statistics")
    assert (done.name, done.what) == ("", "statistics") and done.after < done.before
    for name, parameter in stock.named_parameters():
        assert_same_bits(name, changed.get_parameter(name), parameter)
    assert_same_bits("in front", changed.norm.running_mean, stock.norm.running_mean)
    assert not torch.equal(changed.norm1.running_mean, stock.norm1.running_mean)


def test_no_change_is_no_repair():
    stock = trained()
    changed = copy.deepcopy(stock)
    assert repair(changed, stock, images()) == []
    for name, value in stock.state_dict().items():
        assert_same_bits(name, changed.state_dict()[name], value)


# --- held-out images --------------------------------------------------------------------------------------------------


def test_what_gets_worse_on_held_out_images_is_taken_back():
    """On plain colours maxima are means, so that there is nothing to repair; whoever fits on noise does harm there."""
    stock = Chain(nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8))
    stock.conv = nn.Conv2d(3, 8, 3).double()
    nn.init.normal_(stock.head.weight)
    changed = copy.deepcopy(stock)
    changed.pool = nn.MaxPool2d(2)
    before = copy.deepcopy(changed.state_dict())
    noise = torch.randn(16, 3, 14, 14, dtype=DOUBLE)
    plain = torch.randn(16, 3, 1, 1, dtype=DOUBLE).expand(-1, -1, 14, 14).contiguous()
    found = repair(changed, stock, noise, held_out=plain)
    assert [(own.name, own.what) for own in found] == [("", "left"), ("layer", "left")]
    assert all(own.after > own.before and "held-out" in own.why for own in found)
    for name, value in before.items():
        assert_same_bits(name, changed.state_dict()[name], value)
    assert all(own.what != "left" for own in repair(changed, stock, noise, held_out=noise + 0.1))


@pytest.mark.parametrize("seed", range(3))
def test_held_out_images_never_get_worse(seed):
    """The last word on them is at most the first, and it is the network's own."""
    stock = trained(seed=seed)
    changed = copy.deepcopy(stock)
    treat(changed, TREATED)
    held = images(8, seed=seed)[..., :SIZE, :SIZE].contiguous()
    fit = images(8, seed=seed + 50)[..., :SIZE, :SIZE].contiguous()
    before = score(changed, stock, held)
    found = repair(changed, stock, fit, held_out=held, which="all", ridge=0.01)
    assert found[0].before == pytest.approx(before, rel=1e-3)
    assert score(changed, stock, held) <= before * (1 + 1e-3) + 1e-5


def test_a_solution_that_is_not_finite_is_left():
    stock = Chain(nn.Conv2d(8, 8, 3))
    changed = copy.deepcopy(stock)

    class Endless(nn.AvgPool2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * float("inf")

    changed.pool = Endless(2)
    weight = changed.layer.weight.clone()
    found = repair(changed, stock, x_of(16))
    assert [own.what for own in found] == ["left"] and torch.equal(changed.layer.weight, weight)


# --- the loop ---------------------------------------------------------------------------------------------------------


def test_deterministic_by_its_seed():
    stock = trained()
    found = []
    for seed in (0, 0, 1):
        changed = copy.deepcopy(stock)
        treat(changed, TREATED)
        torch.manual_seed(len(found))  # the global generator has no part in it
        repair(changed, stock, Squares(images(), SIZE), seed=seed)
        found.append(changed.down.weight)
    assert_same_bits("equal seeds", found[1], found[0])
    assert not torch.equal(found[2], found[0])


def test_the_stock_network_modes_hooks_and_flags_stay():
    stock = trained()
    changed = copy.deepcopy(stock)
    treat(changed, TREATED)
    stock.train(), changed.train()
    stock.norm.eval(), changed.last.eval()
    changed.head.weight.requires_grad_(False)
    before, own = snapshot(stock), snapshot(changed)
    repair(changed, stock, Squares(images(), SIZE), which="all")
    after, now = snapshot(stock), snapshot(changed)
    for key in before.keys() - {"state"}:
        assert after[key] == before[key] and now[key] == own[key], key
    for name, value in before["state"].items():
        assert_same_bits(name, after["state"][name], value)
    assert torch.is_grad_enabled() and all(p.grad is None for p in changed.parameters())


def test_modes_are_put_back_after_an_error():
    stock = trained().train()
    changed = copy.deepcopy(stock)
    treat(changed, TREATED)

    def track(steps, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        repair(changed, stock, Squares(images(), SIZE), track=track)
    assert all(m.training for m in [*stock.modules(), *changed.modules()])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in [*stock.modules(), *changed.modules()])


def test_a_shared_layer_is_left():
    class Shared(Chain):
        def forward(self, x: Tensor) -> Tensor:
            x = self.pool(torch.relu(self.conv(x)))
            return self.head(torch.relu(self.layer(self.layer(x))).flatten(1))

    stock = Shared(nn.Conv2d(8, 8, 3, padding=1))
    changed = copy.deepcopy(stock)
    changed.pool = ScaledPool(2)
    (left,) = repair(changed, stock, x_of(16))
    assert (left.name, left.what, left.why) == ("layer", "left", "it is called 2 times in a pass")


class Halved(nn.Conv2d):
    """A convolution that is none of its weights."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


@pytest.mark.parametrize(
    "layer",
    [
        lambda: Halved(8, 8, 3),
        lambda: timm.layers.Conv2dSame(8, 8, 3, 2),
        lambda: timm.layers.ScaledStdConv2d(8, 8, 3),
        lambda: prune.l1_unstructured(nn.Conv2d(8, 8, 3), "weight", 3),
        lambda: parametrizations.weight_norm(nn.Conv2d(8, 8, 3)),
    ],
    ids=["subclass", "same", "standardised", "pruned", "weight norm"],
)
def test_layers_with_arithmetic_of_their_own_are_left(layer):
    stock = Chain(layer())
    changed = copy.deepcopy(stock)
    changed.pool = ScaledPool(2)
    (left,) = repair(changed, stock, x_of(16))
    assert (left.name, left.what) == ("layer", "left") and "has arithmetic of its own" in left.why
    *_, done = repair(changed, stock, x_of(48), which="all")
    assert done.name == "head"


def test_a_network_of_torchvision():
    stock = torchvision.models.squeezenet1_1(num_classes=4).eval()
    changed = copy.deepcopy(stock)
    treat(changed, {f"features.{i}": "maxima, then low-pass" for i in (2, 5, 8)})
    x = torch.randn(12, 3, 47, 47)
    found = repair(changed, stock, x)
    assert [own.name for own in found] == ["features.3.squeeze", "features.6.squeeze", "features.9.squeeze"]


# --- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"which": "every"}, "expected which of"),
        ({"ridge": 0.0}, "a positive ridge, got 0.0"),
        ({"ridge": float("nan")}, "a positive ridge"),
    ],
)
def test_bad_arguments(options, message):
    stock = trained()
    with pytest.raises(ValueError, match=message):
        repair(copy.deepcopy(stock), stock, images(), **options)


def test_one_image_cannot_decide_and_fit():
    stock = trained()
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        repair(copy.deepcopy(stock), stock, images(1))


def test_networks_of_two_types():
    with pytest.raises(ValueError, match="two networks of one type, got Sequential, StridedNet"):
        repair(nn.Sequential(trained()), trained(), images())


def test_images_that_are_no_squares():
    stock = trained()
    changed = copy.deepcopy(stock)
    treat(changed, TREATED)
    found = repair(changed, stock, images()[..., :36])
    assert len(found) == 3


def test_places_are_the_outermost():
    stock = nn.Sequential(nn.Sequential(nn.ReLU(), nn.ReLU()), nn.ReLU())
    changed = copy.deepcopy(stock)
    assert changed_places(changed, stock) == set()
    changed[0] = nn.Sequential(nn.ReLU(), nn.GELU(), nn.GELU())
    assert changed_places(changed, stock) == {"0.1", "0.2"}
    changed[0] = nn.Identity()
    assert changed_places(changed, stock) == {"0"}


def test_what_was_done_can_be_read():
    done = Repaired("layer", "left", 0.1, 0.2, "because")
    assert (done.name, done.what, done.before, done.after, done.why) == ("layer", "left", 0.1, 0.2, "because")
