"""MixPoolStem as a module: a drop-in for the stock stem where it pools by the maximum, the norm rule, the state.

Truth is either the stock modules themselves (all-max), the loops of support.py, or numbers computed by hand from
torch's own convolution.
"""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
from support import (
    ALL_MODULUS,
    EVERY,
    MIXED,
    PLANS,
    SWAPPED,
    assert_close,
    assert_same_bits,
    data_parallel_worker,
    definition,
    plan_of,
    run_on_two_processes,
    stem_parts,
    sync_batch_norm_worker,
    two_training_steps,
)
from timm.layers import BlurPool2d
from torch import Tensor, nn
from torch.nn.utils import prune

from mixpool import MixPoolStem, analytic_partner
from mixpool.ops.reference import POOLINGS
from mixpool.stem.state import decode_direction

SIZES = [(33, 30), (32, 37)]


def images(count: int = 3, size: tuple[int, int] = (33, 30), dtype: torch.dtype = torch.float32) -> Tensor:
    """A batch with a mean other than zero and one black corner."""
    x = torch.randn(count, 3, *size, dtype=torch.float64) + 0.3
    x[..., :12, :12] = 0
    return x.to(dtype)


def copies(parts) -> list[nn.Module]:
    return [copy.deepcopy(part) for part in parts]


def stock(parts) -> nn.Sequential:
    return nn.Sequential(*(part for part in copies(parts) if part is not None))


def expected_output(stem: MixPoolStem, x: Tensor, scale: Tensor, shift: Tensor, **options) -> Tensor:
    """The definition on the stem's own weights; V from the full analytic partner, for the plan's directions."""
    direction = decode_direction(stem.plan)
    options = {
        "pooling": stem.poolings,
        "weight_imag": analytic_partner(stem.weight.detach().double(), direction),
        "conv_stride": stem.stride,
        "conv_padding": stem.padding,
        "pool_padding": (1, 1),
        **options,
    }
    return torch.from_numpy(definition(x, stem.weight, stem.bias, scale=scale, shift=shift, **options))


def frozen_affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """(scale, shift) of a norm layer by its running statistics, float64."""
    mean, var = norm.running_mean.double(), norm.running_var.double()
    scale = (var + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight.detach().double()
    shift = -mean * scale
    return scale, shift if norm.bias is None else shift + norm.bias.detach().double()


# --- all-max is the stock stem ----------------------------------------------------------------------------------------

STOCK_VARIANTS = {
    "resnet": {},
    "bias": {"bias": True},
    "no norm": {"norm": False, "bias": True},
    "no norm, no bias": {"norm": False},
    "no affine": {"affine": False},
    "no running statistics": {"track_running_stats": False},
    "ceil_mode": {"pool": nn.MaxPool2d(3, 2, ceil_mode=True)},
    "window 2": {"pool": nn.MaxPool2d(2), "kernel_size": (3, 6), "padding": (1, 2)},
    "rectangles": {"pool": nn.MaxPool2d((3, 2), (2, 1), (1, 0)), "stride": (1, 2)},
}


@pytest.mark.parametrize("variant", STOCK_VARIANTS.values(), ids=STOCK_VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_all_max_in_evaluation_equals_the_stock_stem_bit_by_bit(variant, dtype):
    parts = stem_parts(dtype=dtype, **variant)
    if parts[1] is not None and parts[1].weight is not None:
        assert (parts[1].weight < 0).any() and (parts[1].weight == 0).any() and (parts[1].weight > 0).any()
    model, stem = stock(parts).eval(), MixPoolStem(*parts, pooling="max").eval()
    is_exact = parts[1] is None or parts[1].track_running_stats
    for size in SIZES:
        for memory_format in (torch.contiguous_format, torch.channels_last):
            x = images(2, size, dtype).contiguous(memory_format=memory_format)
            with torch.no_grad():
                out, expected = stem(x), model(x)
            assert out.is_contiguous(memory_format=memory_format)
            if is_exact:
                assert_same_bits(f"{size} {memory_format}", out, expected)
            else:
                assert_close(f"{size} {memory_format}", out, expected)
    assert_close("with autograd", stem(x), expected, None if not is_exact else (0, 0))


@pytest.mark.parametrize("variant", STOCK_VARIANTS.values(), ids=STOCK_VARIANTS)
def test_all_max_in_training_equals_the_stock_stem(variant):
    parts = stem_parts(dtype=torch.float64, **variant)
    if parts[1] is not None and parts[1].weight is not None:
        with torch.no_grad():
            parts[1].weight[3] = 0.4  # not 0: see the next test
    model, stem = stock(parts).train(), MixPoolStem(*parts, pooling="max").train()
    theirs = [p for module in model for p in module.parameters()]
    ours = list(stem.parameters())
    assert [p.shape for p in ours] == [p.shape for p in theirs]
    for step in range(3):
        x = images(4, dtype=torch.float64)
        x_ours, x_theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        out, expected = stem(x_ours), model(x_theirs)
        assert_close(f"output {step}", out, expected)
        upstream = torch.randn_like(out)
        grads = torch.autograd.grad(out, [x_ours, *ours], upstream)
        grads_expected = torch.autograd.grad(expected, [x_theirs, *theirs], upstream)
        names = ["x", *dict(stem.named_parameters())]
        for name, grad, grad_expected in zip(names, grads, grads_expected, strict=True):
            assert_close(f"gradient of {name}, step {step}", grad, grad_expected, (1e-9, 1e-9))
        with torch.no_grad():
            for p, q, grad, grad_expected in zip(ours, theirs, grads[1:], grads_expected[1:]):
                p.sub_(0.01 * grad)
                q.sub_(0.01 * grad_expected)
    if parts[1] is not None:
        for name, buffer in model[1].named_buffers():
            assert_close(name, stem.bn.get_buffer(name).double(), buffer.double(), (1e-10, 1e-10))


def test_gradient_of_a_zero_gamma_is_the_one_sided_derivative():
    """At gamma = 0 a window's values tie: the stock stem takes the first one's derivative, we that of gamma > 0."""
    parts = stem_parts(dtype=torch.float64)
    model, stem = stock(parts).eval(), MixPoolStem(*parts, pooling="max").eval()
    model[2], stem.act = nn.Identity(), nn.Identity()
    zero = (parts[1].weight == 0).nonzero().item()
    x = images(dtype=torch.float64)
    out = stem(x)
    upstream = torch.randn_like(out)
    (grad,) = torch.autograd.grad(out, parts[1].weight, upstream)
    with torch.no_grad():
        before = model(x)
        model[1].weight[zero] = 1e-6
        difference = ((model(x) - before) * upstream)[:, zero].sum() / 1e-6
    assert_close("gradient", grad[zero], difference, (1e-6, 1e-6))  # because the quotient loses ten digits


def test_all_max_of_float32_in_training_is_as_exact_as_the_stock_stem():
    parts = stem_parts()
    model, stem = stock(parts).train(), MixPoolStem(*copies(parts), pooling="max").train()
    truth = stock([part.double() if part is not None else None for part in parts]).train()
    x = images(4)
    exact = truth(x.double())
    ours, theirs = (stem(x).double() - exact).norm(), (model(x).double() - exact).norm()
    assert ours <= 2 * theirs + 1e-7 * exact.norm()


def test_every_pooling_keeps_the_stock_stems_size():
    for pool in (nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(3, 2, ceil_mode=True), nn.MaxPool2d(2)):
        parts = stem_parts(pool=pool)
        for size in SIZES:
            x = images(1, size)
            for pooling in POOLINGS:
                assert MixPoolStem(*copies(parts), pooling=pooling)(x).shape == stock(parts)(x).shape


# --- evaluation against the definition --------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_evaluation_is_the_definition(plan, bias):
    parts = stem_parts(bias=bias, dtype=torch.float64)
    stem = MixPoolStem(*parts, pooling=plan).eval()
    x = images(dtype=torch.float64)
    # The plan's directions are rounded to 0.01 degree in the checkpoint and in the stem alike.
    assert_close("output", stem(x), expected_output(stem, x, *frozen_affine(parts[1])))


def test_evaluation_without_a_norm_is_the_definition():
    parts = stem_parts(norm=False, bias=True, dtype=torch.float64)
    stem = MixPoolStem(*parts, pooling=EVERY)
    x = images(dtype=torch.float64)
    ones = torch.ones(7, dtype=torch.float64)
    assert_close("output", stem(x), expected_output(stem, x, ones, 0 * ones))


NORMS: dict[str, Callable[[], nn.Module]] = {
    "torchvision FrozenBatchNorm2d": lambda: torchvision.ops.FrozenBatchNorm2d(7),
    "timm FrozenBatchNormAct2d": lambda: timm.layers.FrozenBatchNormAct2d(7, act_layer=nn.ReLU),
    "torch BatchNorm2d": lambda: nn.BatchNorm2d(7),
    "torch SyncBatchNorm": lambda: nn.SyncBatchNorm(7),
    "timm BatchNormAct2d": lambda: timm.layers.BatchNormAct2d(7, act_layer=nn.ReLU),
}


def random_norm(name: str) -> nn.Module:
    norm = NORMS[name]().double()
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean):
            tensor.copy_(torch.randn(7))
        norm.running_var.copy_(torch.rand(7) + 0.2)
    return norm


@pytest.mark.parametrize("name", NORMS)
def test_frozen_norm_layers_inside_a_training_model(name):
    """A norm layer in evaluation mode (or one that is always frozen) keeps its statistics, and takes part as a map."""
    conv, _, act, pool = stem_parts(norm=False, dtype=torch.float64)
    norm = random_norm(name)
    stem = MixPoolStem(conv, norm, None if hasattr(norm, "act") else act, pool, pooling=MIXED).train()
    norm.eval()
    before = {key: value.clone() for key, value in norm.state_dict().items()}
    x = images(dtype=torch.float64).requires_grad_()
    out = stem(x)
    assert_close("output", out, expected_output(stem, x.detach(), *frozen_affine(norm)))
    grads = torch.autograd.grad(out, [x, conv.weight], torch.randn_like(out))
    assert all(torch.isfinite(grad).all() and grad.any() for grad in grads)
    for key, value in norm.state_dict().items():
        assert_same_bits(key, value, before[key])


@pytest.mark.parametrize("name", ["torch BatchNorm2d", "torch SyncBatchNorm", "timm BatchNormAct2d"])
def test_norm_layers_of_the_libraries_all_follow_the_same_rule_in_training(name):
    conv, _, act, pool = stem_parts(norm=False, dtype=torch.float64)
    x = images(dtype=torch.float64)
    norm, reference = random_norm(name), nn.BatchNorm2d(7).double()
    state = {key: value for key, value in norm.state_dict().items() if key in reference.state_dict()}
    reference.load_state_dict(state)
    norm_act = None if hasattr(norm, "act") else act
    outs = [
        MixPoolStem(copy.deepcopy(conv), layer, layer_act, pool, pooling=MIXED).train()(x)
        for layer, layer_act in ((norm, norm_act), (reference, act))
    ]
    assert_close("output", *outs)
    for key in ("running_mean", "running_var", "num_batches_tracked"):
        assert_close(key, norm.get_buffer(key).double(), reference.get_buffer(key).double())


def test_frozen_norm_in_float32_keeps_the_dtype_of_a_bfloat16_convolution():
    conv = nn.Conv2d(3, 4, 7, 2, 3, bias=False).bfloat16()
    stem = MixPoolStem(conv, torchvision.ops.FrozenBatchNorm2d(4), nn.ReLU(), pooling=["modulus", "max"] * 2)
    assert stem(torch.randn(2, 3, 20, 22).bfloat16()).dtype == torch.bfloat16


# --- the norm rule of modulus channels --------------------------------------------------------------------------------


def computed_envelope(stem: MixPoolStem, x: Tensor) -> Tensor:
    """|z| at the positions computed: all, or those of the total stride for "cmod" (window 3, padding 1)."""
    partner = analytic_partner(stem.weight.detach(), decode_direction(stem.plan))
    stride = stem.total_stride if "cmod" in stem.poolings else stem.stride
    return torch.hypot(
        *(nn.functional.conv2d(x, weight, None, stride, stem.padding) for weight in (stem.weight.detach(), partner))
    )


@pytest.mark.parametrize("pooling", ["cmod", "modulus", "energy"])
@pytest.mark.parametrize("momentum", [0.1, 0.37, None])
def test_running_statistics_of_complex_channels_by_hand(pooling, momentum):
    parts = stem_parts(dtype=torch.float64, momentum=momentum)
    stem = MixPoolStem(*parts, pooling=plan_of(pooling)).train()
    norm, is_modulus = parts[1], torch.tensor(SWAPPED)
    constant = norm.running_mean.clone()
    running_mean, running_var = norm.running_mean.clone(), norm.running_var.clone()
    for step in range(1, 4):
        x = images(dtype=torch.float64) * step
        y = nn.functional.conv2d(x, stem.weight.detach(), None, 2, 2)
        half_energy = computed_envelope(stem, x).square().mean(dim=(0, 2, 3)) / 2
        rate = 1 / step if momentum is None else momentum
        var = torch.where(is_modulus, half_energy, y.var(dim=(0, 2, 3)))  # unbiased for max channels, as torch
        mean = torch.where(is_modulus, constant, y.mean(dim=(0, 2, 3)))
        running_var += rate * (var - running_var)
        running_mean += rate * (mean - running_mean)
        stem(x)
        assert_close(f"running_var, step {step}", norm.running_var, running_var)
        assert_close(f"running_mean, step {step}", norm.running_mean, running_mean)
        assert_same_bits("constant mean", norm.running_mean[is_modulus], constant[is_modulus])
        assert norm.num_batches_tracked == step


@pytest.mark.parametrize("pooling", ["cmod", "modulus", "energy"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_training_output_is_the_definition_with_the_batch_statistics(pooling, bias):
    """sigma^2 = mean(|z|^2) / 2 + eps and the constant running mean for modulus channels; the bias moves the mean."""
    parts = stem_parts(dtype=torch.float64, bias=bias, eps=0.01)
    norm, is_modulus = parts[1], torch.tensor(SWAPPED)
    stem = MixPoolStem(*parts, pooling=plan_of(pooling)).train()
    x = images(dtype=torch.float64)
    y = nn.functional.conv2d(x, stem.weight.detach(), parts[0].bias, 2, 2).detach()
    half_energy = computed_envelope(stem, x).square().mean(dim=(0, 2, 3)) / 2
    var = torch.where(is_modulus, half_energy, y.var(dim=(0, 2, 3), correction=0))
    mean = torch.where(is_modulus, norm.running_mean, y.mean(dim=(0, 2, 3)))
    scale = norm.weight.detach() / (var + 0.01).sqrt()
    expected = expected_output(stem, x, scale, norm.bias.detach() - mean * scale)
    assert_close("output", stem(x), expected)


@pytest.mark.parametrize("plan", [MIXED[:4], ("energy", "blurpool", "max", "cmod")], ids=["modulus", "others"])
def test_training_gradients_by_finite_differences(plan):
    """Through the batch statistics, for the input and every parameter; tanh has no kink."""
    conv, norm, _, pool = stem_parts(4, in_channels=1, kernel_size=3, padding=1, bias=True, dtype=torch.float64)
    conv.in_channels = 1
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([0.7, -0.9, 1.2, -0.6]))
    stem = MixPoolStem(conv, norm, nn.Tanh(), pool, pooling=plan).train()
    names = [name for name, _ in stem.named_parameters()]
    buffers = {name: buffer.clone() for name, buffer in stem.named_buffers()}

    def function(x, *parameters):
        state = {**{name: buffer.clone() for name, buffer in buffers.items()}, **dict(zip(names, parameters))}
        return torch.func.functional_call(stem, state, (x,))

    x = torch.randn(2, 1, 9, 8, dtype=torch.float64, requires_grad=True)
    inputs = [p.detach().clone().requires_grad_() for p in stem.parameters()]
    assert torch.autograd.gradcheck(function, (x, *inputs))


def test_nothing_jumps_between_training_and_evaluation():
    """With momentum 1 the running statistics are the batch's, so evaluation repeats the training pass."""
    parts = stem_parts(dtype=torch.float64, momentum=1.0)
    stem = MixPoolStem(*parts, pooling="modulus")
    x = images(dtype=torch.float64)
    before = stem.eval()(x)
    in_training = stem.train()(x).detach()
    assert_close("evaluation", stem.eval()(x), in_training)
    assert (before - in_training).abs().max() > 0.1


def test_without_running_statistics_there_is_no_mean_to_subtract():
    parts = stem_parts(dtype=torch.float64, track_running_stats=False)
    stem = MixPoolStem(*parts, pooling=ALL_MODULUS).eval()
    x = images(dtype=torch.float64)
    var = computed_envelope(stem, x).square().mean(dim=(0, 2, 3)) / 2
    scale = parts[1].weight.detach() / (var + parts[1].eps).sqrt()
    expected = expected_output(stem, x, scale, parts[1].bias.detach())
    assert_close("evaluation", stem(x), expected)
    assert_close("training", stem.train()(x), expected)


def test_affine_false():
    parts = stem_parts(dtype=torch.float64, affine=False)
    stem = MixPoolStem(*parts, pooling=MIXED).eval()
    x = images(dtype=torch.float64)
    assert_close("evaluation", stem(x), expected_output(stem, x, *frozen_affine(parts[1])))
    assert torch.isfinite(stem.train()(x)).all() and not list(stem.bn.parameters())


def test_an_empty_batch_leaves_the_statistics_alone():
    for plan in PLANS.values():
        stem = MixPoolStem(*stem_parts(), pooling=plan).train()
        before = {key: value.clone() for key, value in stem.state_dict().items()}
        out = stem(images(0).requires_grad_())
        assert out.shape == (0, 7, 9, 8)
        out.backward(torch.randn_like(out))
        for key, value in stem.state_dict().items():
            assert_same_bits(key, value, before[key])
        assert all(not p.grad.any() for p in stem.parameters() if p.grad is not None)


def test_one_value_per_channel_cannot_be_normalised():
    parts = stem_parts(kernel_size=3, padding=0, pool=nn.MaxPool2d(3, 1, 1))
    x = torch.randn(1, 3, 3, 3)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        stock(parts).train()(x)
    stem = MixPoolStem(*parts, pooling="max").train()
    before = {key: value.clone() for key, value in stem.state_dict().items()}
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        stem(x)
    for key, value in stem.state_dict().items():
        assert_same_bits(key, value, before[key])  # an error changes nothing


# --- several processes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "momentum, splits", [(0.2, (2, 3)), (None, (4, 5))], ids=["momentum 0.2", "momentum None, one is empty"]
)
@pytest.mark.slow
def test_sync_batch_norm_of_two_processes_equals_one_with_the_whole_batch(momentum, splits):
    """Outputs, gradients and running statistics over two steps; the first process gets `splits` of 5 images."""
    parts = stem_parts(dtype=torch.float64, bias=True, momentum=momentum)
    stem = MixPoolStem(parts[0], nn.SyncBatchNorm.convert_sync_batchnorm(parts[1]), *parts[2:], pooling=MIXED)
    assert isinstance(stem.bn, nn.SyncBatchNorm)
    batches = [images(5, (17, 14), torch.float64) * factor for factor in (1, 2)]
    upstreams = [torch.randn(5, 7, 5, 4, dtype=torch.float64) for _ in batches]
    alone = two_training_steps(copy.deepcopy(stem).train(), batches, upstreams)
    ranks = run_on_two_processes(sync_batch_norm_worker, stem, batches, upstreams, splits)
    for name, expected in alone.items():
        if name.startswith(("out", "grad x")):
            together = torch.cat([rank[name] for rank in ranks])
        elif name.startswith("grad"):
            together = ranks[0][name] + ranks[1][name]
        else:
            assert_close(f"{name} of rank 1", ranks[1][name].double(), ranks[0][name].double())
            together = ranks[0][name]
        assert_close(name, together.double(), expected.double(), (1e-9, 1e-9))


@pytest.mark.slow
def test_distributed_data_parallel_equals_one_process():
    stems = {}
    for kind in ("frozen batch norm", "no norm"):
        is_frozen = kind.startswith("frozen")
        parts = stem_parts(dtype=torch.float64, norm=is_frozen, bias=True)
        stems[kind] = MixPoolStem(*parts, pooling=EVERY).train()
        if is_frozen:
            stems[kind].bn.eval()
    x, upstream = images(4, (17, 14), torch.float64), torch.randn(4, 7, 5, 4, dtype=torch.float64)
    ranks = run_on_two_processes(data_parallel_worker, stems, x, upstream)
    for kind, stem in stems.items():
        stem(x).backward(upstream)
        for name, parameter in stem.named_parameters():
            for rank in ranks:
                assert_close(f"{kind}: {name}", 2 * rank[f"{kind}: {name}"], parameter.grad)  # DDP averages


# --- the partner ------------------------------------------------------------------------------------------------------


def test_the_partner_follows_the_weight():
    stem = MixPoolStem(*stem_parts(dtype=torch.float64), pooling=MIXED).train()
    assert [name for name, _ in stem.named_parameters()] == ["weight", "bn.weight", "bn.bias"]
    before = stem.imaginary_weight().detach().clone()
    optimizer = torch.optim.SGD(stem.parameters(), lr=0.1)
    out = stem(images(dtype=torch.float64))
    out.backward(torch.randn_like(out))
    optimizer.step()
    direction = decode_direction(stem.plan)[list(SWAPPED)]
    expected = analytic_partner(stem.weight.detach()[list(SWAPPED)], direction)
    assert_close("V", stem.imaginary_weight(), expected)
    assert (stem.imaginary_weight() - before).abs().max() > 1e-3


# --- the module as an object ------------------------------------------------------------------------------------------


def test_parts_are_taken_over_not_copied():
    conv, norm, act, pool = stem_parts(bias=True)
    stem = MixPoolStem(conv, norm, act, pool, pooling=MIXED)
    assert stem.weight is conv.weight and stem.bias is conv.bias and stem.bn is norm
    assert type(stem.act) is nn.ReLU
    assert stem.training and not MixPoolStem(conv.eval(), norm, act, pool, pooling="max").training
    assert stem.total_stride == (4, 4) and stem.num_complex == 4
    assert stem.poolings == MIXED


def test_defaults():
    conv, norm, _, _ = stem_parts()
    stem = MixPoolStem(conv, norm, pooling="max")
    assert isinstance(stem.act, nn.Identity)
    x = images()
    assert_same_bits("pool", stem.eval()(x), nn.Sequential(conv, norm, nn.MaxPool2d(3, 2, 1)).eval()(x))
    with_act = MixPoolStem(stem_parts()[0], timm.layers.BatchNormAct2d(7, act_layer=nn.ReLU), pooling="max")
    assert isinstance(with_act.act, nn.ReLU)


def test_extra_repr():
    stem = MixPoolStem(*stem_parts(bias=True), pooling=plan_of("cmod", "blurpool"))
    text = repr(stem)
    for part in ("3, 7", "kernel_size=(5, 5)", "stride=(2, 2)", "padding=(2, 2)", "bias=True", "size=(3, 3)"):
        assert part in text, part
    for part in ("pooling=4 cmod + 3 blurpool", "(bn): BatchNorm2d(7", "(act): ReLU()"):
        assert part in text, part
    assert "dilation" not in text
    assert "size=(2, 3), stride=(2, 3)" in repr(MixPoolStem(*stem_parts(pool=nn.MaxPool2d((2, 3)))))


def by_pickle(stem):
    return pickle.loads(pickle.dumps(stem))


def by_torch_save(stem):
    file = io.BytesIO()
    torch.save(stem, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, by_pickle, by_torch_save], ids=lambda f: f.__name__)
def test_copies(duplicate):
    stem = MixPoolStem(*stem_parts(), pooling=EVERY)
    other = duplicate(stem)
    x = images()
    assert_same_bits("evaluation", other.eval()(x), stem.eval()(x))
    assert_same_bits("training", other.train()(x), stem.train()(x))
    assert other.poolings == stem.poolings and repr(other) == repr(stem)
    assert all(p is not q for p, q in zip(other.parameters(), stem.parameters(), strict=True))
    with torch.no_grad():
        other.weight.add_(1)
    assert not torch.equal(other.eval()(x), stem.eval()(x))


# --- state dicts ------------------------------------------------------------------------------------------------------


def test_state_dict_holds_the_stock_state_the_plan_and_the_calibration():
    parts = stem_parts(bias=True)
    norm_keys = {f"bn.{key}" for key in parts[1].state_dict()}
    stem = MixPoolStem(*parts, pooling=MIXED)
    assert set(stem.state_dict()) == {"weight", "bias", "plan", "calibration"} | norm_keys
    assert stem.plan.dtype == torch.float32 and stem.plan.shape == (7, 3)


OTHER_STEMS = {
    "same": EVERY,
    "other plan": plan_of("max", "energy"),
    "all-max": "max",
    "all-modulus": "modulus",
}


@pytest.mark.parametrize("pooling", OTHER_STEMS.values(), ids=OTHER_STEMS)
@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
def test_a_checkpoint_brings_its_plan(pooling, assign):
    stem = MixPoolStem(*stem_parts(), pooling=EVERY).eval()
    other = MixPoolStem(*stem_parts(seed=2), pooling=pooling).eval()
    other.load_state_dict(copy.deepcopy(stem.state_dict()), assign=assign)
    x = images()
    assert_same_bits("output", other(x), stem(x))
    assert other.poolings == EVERY
    for key, value in stem.state_dict().items():
        assert_same_bits(key, other.state_dict()[key], value)
    out = other.train()(x)
    assert_same_bits("training", out, stem.train()(x))
    out.backward(torch.randn_like(out))
    assert other.weight.grad is not None


def test_a_checkpoint_within_a_model_and_of_half_precision():
    stem = MixPoolStem(*stem_parts(), pooling=plan_of("cmod"))
    model = nn.ModuleDict({"conv1": stem, "fc": nn.Linear(2, 2)})
    state = {key: v.half() if v.is_floating_point() else v for key, v in model.state_dict().items()}
    other = nn.ModuleDict({"conv1": MixPoolStem(*stem_parts(seed=2), pooling="max"), "fc": nn.Linear(2, 2)})
    other.load_state_dict(state)
    assert other["conv1"].poolings == stem.poolings
    x = images()
    # because the weights and the statistics were rounded to 11 bits
    assert_close("output", other["conv1"].eval()(x), stem.eval()(x), (2e-2, 2e-2))


def test_a_stock_checkpoint_loads_with_a_warning_and_keeps_the_plan():
    parts = stem_parts(seed=3, bias=True)
    state = {f"conv1.{key}": value for key, value in parts[0].state_dict().items()}
    state |= {f"conv1.bn.{key}": value for key, value in parts[1].state_dict().items()}
    stem = MixPoolStem(*stem_parts(bias=True), pooling=MIXED)
    with pytest.warns(UserWarning, match=r"conv1: this checkpoint has no channel plan .*4 of 7 channels complex"):
        nn.ModuleDict({"conv1": stem}).load_state_dict(state)
    assert stem.poolings == MIXED
    assert_same_bits("weight", stem.weight, parts[0].weight)
    x = images()
    expected = expected_output(stem, x, *frozen_affine(parts[1]))
    assert_close("output", stem.eval()(x), expected)


def test_a_checkpoint_of_another_shape_is_an_error():
    stem = MixPoolStem(*stem_parts(), pooling=MIXED)
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        MixPoolStem(*stem_parts(kernel_size=3), pooling=MIXED).load_state_dict(stem.state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        stem.load_state_dict({key: value for key, value in stem.state_dict().items() if key != "bn.weight"})


def test_equal_checkpoints_load_without_a_warning():
    stem = MixPoolStem(*stem_parts(), pooling=MIXED)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stem.load_state_dict(copy.deepcopy(stem.state_dict()))


# --- dtypes, devices, layouts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_converted_dtypes(dtype, plan, mode):
    parts = stem_parts()
    stem = MixPoolStem(*parts, pooling=plan)
    x = images()
    getattr(stem, mode)()
    truth = copy.deepcopy(stem).double()(x.double()).detach()
    out = stem.to(dtype)(x.to(dtype))
    assert out.dtype == dtype
    # because the parameters of a float32 stem were rounded too
    tolerance = {torch.float64: (1e-5, 1e-5), torch.float16: (2e-2, 1e-2), torch.bfloat16: (0.12, 0.05)}[dtype]
    assert_close("output", out, truth, tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_partner_of_a_stem_in_half_precision_is_as_exact_as_its_weights(dtype):
    stem = MixPoolStem(*stem_parts(kernel_size=7, padding=3), pooling="modulus").to(dtype)
    direction = decode_direction(stem.plan)
    exact = analytic_partner(stem.weight.detach().double(), direction)
    error = (stem.imaginary_weight().double() - exact).norm() / exact.norm()
    assert error < 2 * torch.finfo(dtype).eps


def test_the_way_to_half_precision_and_back_costs_nothing_but_the_weights_rounding():
    """The partner map follows from the plan: a float32 checkpoint restores the stem, whatever dtype it went through."""
    stem = MixPoolStem(*stem_parts(), pooling=MIXED).eval()
    state, x = copy.deepcopy(stem.state_dict()), images()
    expected = stem(x)
    stem.bfloat16().float().load_state_dict(state)
    assert_close("output", stem(x), expected)


def test_a_norm_layer_kept_in_float32():
    """The usual mixed-precision arrangement without autocast: bfloat16 convolution, float32 batch norm."""
    for plan in PLANS.values():
        parts = stem_parts()
        parts[0].bfloat16()
        x = images(dtype=torch.bfloat16)
        expected = stock(parts).eval()(x)
        truth = MixPoolStem(*copies(parts), pooling=plan).eval()
        out = MixPoolStem(*parts, pooling=plan).eval()(x)
        assert out.dtype == expected.dtype and out.shape == expected.shape
        assert_close("output", out, truth.double()(x.double()), (0.1, 0.05))  # because V is rounded as well


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_autocast(plan, mode):
    parts = stem_parts()
    stem = getattr(MixPoolStem(*parts, pooling=plan), mode)()
    x = images()
    truth = copy.deepcopy(stem)(x).detach()
    model = getattr(stock(parts), mode)()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = stem(x)
        assert out.dtype == model(x).dtype
    assert out.dtype == torch.bfloat16 and stem.bn.running_var.dtype == torch.float32
    # because running statistics of 0.3 and more scale the rounding of the convolution by up to 2
    assert_close("output", out, truth, (0.08, 0.03))
    if mode == "train":
        out.backward(torch.randn_like(out))
        assert all(torch.isfinite(p.grad).all() and p.grad.dtype == torch.float32 for p in stem.parameters())


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_channels_last(mode):
    stem = getattr(MixPoolStem(*stem_parts(), pooling=EVERY), mode)()
    x = images()
    expected = copy.deepcopy(stem)(x).detach()
    for case, module, image in (
        ("input", copy.deepcopy(stem), x.contiguous(memory_format=torch.channels_last)),
        (
            "both",
            copy.deepcopy(stem).to(memory_format=torch.channels_last),
            x.contiguous(memory_format=torch.channels_last),
        ),
    ):
        out = module(image)
        assert out.is_contiguous(memory_format=torch.channels_last), case
        assert_close(case, out, expected)
    assert stem(x).is_contiguous()


def test_meta_device():
    stem = MixPoolStem(*stem_parts(), pooling=EVERY).eval()
    out = copy.deepcopy(stem).to("meta")(images().to("meta"))
    assert out.shape == stem(images()).shape and out.device.type == "meta"


def test_inference_mode_and_no_grad_agree_with_autograd():
    stem = MixPoolStem(*stem_parts(dtype=torch.float64), pooling=MIXED).eval()
    x = images(dtype=torch.float64)
    expected = stem(x).detach()
    with torch.inference_mode():
        assert_close("inference_mode", stem(x).clone(), expected)
    with torch.no_grad():
        assert_close("no_grad", stem(x), expected)


# --- the baselines ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_blurpool_is_timms_blur_pool_after_stride_1_maxima(mode, size):
    conv, norm, act, _ = stem_parts(dtype=torch.float64)
    expected = nn.Sequential(conv, norm, act, nn.MaxPool2d(3, 1, 1), BlurPool2d(7, filt_size=3, stride=2)).double()
    expected = getattr(copy.deepcopy(expected), mode)()
    stem = getattr(MixPoolStem(conv, norm, act, pooling="blurpool"), mode)()
    x = images(2, size, torch.float64)
    x_ours, x_theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, out_expected = stem(x_ours), expected(x_theirs)
    assert_close("output", out, out_expected)
    upstream = torch.randn_like(out)
    grads = torch.autograd.grad(out, [x_ours, conv.weight], upstream)
    grads_expected = torch.autograd.grad(out_expected, [x_theirs, expected[0].weight], upstream)
    for name, grad, grad_expected in zip(("x", "weight"), grads, grads_expected):
        assert_close(f"gradient of {name}", grad, grad_expected, (1e-9, 1e-9))


@pytest.mark.parametrize("pooling", ["cmod", plan_of("cmod")], ids=["all", "mixed"])
def test_cmod_is_paper_2s_modulus_of_a_complex_convolution(pooling):
    """relu(|gamma| / sigma * |conv at stride 2m with W + iV| + beta - gamma mu / sigma), by torch's complex numbers."""
    conv, norm, act, pool = stem_parts(dtype=torch.float64, kernel_size=7, padding=3)
    stem = MixPoolStem(conv, norm, act, pool, pooling=pooling).eval()
    x = images(dtype=torch.float64)
    direction = decode_direction(stem.plan)
    parts = torch.stack([conv.weight.detach(), analytic_partner(conv.weight.detach(), direction)], dim=-1)
    z = nn.functional.conv2d(x.to(torch.complex128), torch.view_as_complex(parts), None, 4, 3)
    scale, shift = frozen_affine(norm)
    expected = torch.relu(scale.abs()[:, None, None] * z.abs() + shift[:, None, None])
    channels = [i for i, name in enumerate(stem.poolings) if name == "cmod"]
    assert_close("output", stem(x)[:, channels], expected[:, channels])


# --- errors -----------------------------------------------------------------------------------------------------------


class Conv2dOfSomeoneElse(nn.Conv2d):
    """A subclass may compute something else."""


def bad_parts() -> dict[str, tuple[Callable[[dict], None], str]]:
    def conv(*args, **options):
        return lambda p: p.update(conv=nn.Conv2d(*args, **options))

    return {
        "conv subclass": (lambda p: p.update(conv=Conv2dOfSomeoneElse(3, 7, 3)), "Conv2d, got .*Conv2dOfSomeoneElse"),
        "linear": (lambda p: p.update(conv=nn.Linear(3, 7)), "expected the convolution to be an nn.Conv2d"),
        "transposed": (lambda p: p.update(conv=nn.ConvTranspose2d(3, 7, 3)), "ConvTranspose2d"),
        "weight norm": (
            lambda p: p.update(conv=nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 7, 3))),
            "Conv2d",
        ),
        "pruning": (
            lambda p: prune.random_unstructured(p["conv"], "weight", 0.5),
            "pruning.*make it permanent",
        ),
        "groups": (conv(3, 9, 3, groups=3), r"groups=1 and zero padding, got conv.groups=3"),
        "reflected padding": (conv(3, 7, 3, padding=1, padding_mode="reflect"), "padding_mode='reflect'"),
        "same padding": (conv(3, 7, 3, padding="same"), "numbers as the convolution's padding"),
        "group norm": (lambda p: p.update(norm=nn.GroupNorm(1, 7)), "batch norm .*, got .*GroupNorm"),
        "layer norm": (lambda p: p.update(norm=timm.layers.LayerNorm2d(7)), "LayerNorm2d"),
        "instance norm": (lambda p: p.update(norm=nn.InstanceNorm2d(7)), "InstanceNorm2d"),
        "3-D batch norm": (lambda p: p.update(norm=nn.BatchNorm3d(7)), "BatchNorm3d"),
        "other channels": (
            lambda p: p.update(norm=nn.BatchNorm2d(8)),
            "norm layer of 7 channels, got .*BatchNorm2d",
        ),
        "other channels, no statistics": (
            lambda p: p.update(norm=nn.BatchNorm2d(8, track_running_stats=False)),
            "norm layer of 7 channels",
        ),
        "SiLU": (lambda p: p.update(act=nn.SiLU()), "increasing activation such as ReLU .*, got .*SiLU"),
        "GELU": (lambda p: p.update(act=nn.GELU()), "GELU"),
        "Softmax": (lambda p: p.update(act=nn.Softmax(dim=1)), "Softmax"),
        "falling LeakyReLU": (lambda p: p.update(act=nn.LeakyReLU(-0.1)), "LeakyReLU"),
        "falling ELU": (lambda p: p.update(act=nn.ELU(-1.0)), "ELU"),
        "average pool": (lambda p: p.update(pool=nn.AvgPool2d(3, 2, 1)), "expected the pooling to be an nn.MaxPool2d"),
        "dilated pool": (lambda p: p.update(pool=nn.MaxPool2d(3, 2, 1, dilation=2)), "dilation=1"),
        "pool with indices": (lambda p: p.update(pool=nn.MaxPool2d(3, 2, 1, return_indices=True)), "return_indices"),
        "window of 5": (lambda p: p.update(pool=nn.MaxPool2d(5, 2, 2)), "window of 2 or 3"),
        "pooling": (lambda p: p.update(pooling="most"), "expected poolings of .* got 'most'"),
        "names": (lambda p: p.update(pooling=["max"] * 6), "expected 7 poolings, one per output channel, got 6"),
    }


@pytest.mark.parametrize("name", bad_parts())
def test_errors_name_the_part(name):
    change, message = bad_parts()[name]
    conv, norm, act, pool = stem_parts()
    arguments = {"conv": conv, "norm": norm, "act": act, "pool": pool}
    change(arguments)
    with pytest.raises(ValueError, match=message):
        MixPoolStem(**arguments)


def test_errors_of_inputs():
    stem = MixPoolStem(*stem_parts(), pooling=MIXED)
    for shape in ((3, 32, 32), (1, 4, 32, 32)):
        with pytest.raises(ValueError, match=r"expected images \(N, 3, H, W\), got"):
            stem(torch.randn(shape))


def test_norms_of_the_same_name_from_elsewhere_are_refused():
    class BatchNorm2d(nn.BatchNorm2d):
        """Same name, other package."""

    with pytest.raises(ValueError, match="expected a batch norm of torch, torchvision or timm"):
        MixPoolStem(nn.Conv2d(3, 7, 3), BatchNorm2d(7), nn.ReLU())


OLD_KEYWORDS = {
    "select": ("all", "pooling=, a name or a list"),
    "images": (None, "pooling=, a name or a list"),
    "blur": (1, 'pooling="cmod"'),
    "max_blur": (3, r'pooling=\["blurpool", ...\]'),
    "imag": ("free", "nothing: free imaginary filters"),
}


@pytest.mark.parametrize("name", OLD_KEYWORDS)
def test_old_keywords_are_refused_with_the_new_spelling(name):
    value, now = OLD_KEYWORDS[name]
    with pytest.raises(TypeError, match=f"no {name}= any more; instead of .* write {now}"):
        MixPoolStem(*stem_parts(), **{name: value})
    with pytest.raises(TypeError, match="unexpected keyword argument 'colour'"):
        MixPoolStem(*stem_parts(), colour=1)
