"""`initialize`: a bank in an untrained model's stem, at the model's own scale, and all of it trained.

The banks themselves are tested beside their files, in tests/filters; truth here is the stock stem.
"""

from __future__ import annotations

import copy
import re

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from support import assert_close, assert_same_bits
from torch import Tensor, nn

import mixpool
from mixpool import MixPoolStem, StemError
from mixpool.conversion.initialize import initialize
from mixpool.filters.gabor import COLOR_SHARE, gabor_bank
from mixpool.filters.spectrum import frequency_grid, natural_image_prior
from mixpool.filters.wavelets import wavelet_bank


def network(channels: int = 64, taps: int = 7, stride: int = 2, norm: bool = True) -> nn.Sequential:
    """A stem and nothing else."""
    conv = nn.Conv2d(3, channels, taps, stride, taps // 2, bias=False)
    return nn.Sequential(conv, *[nn.BatchNorm2d(channels)] * norm, nn.ReLU(), nn.MaxPool2d(3, 2, 1))


def pink_images(count: int = 2, size: int = 96) -> Tensor:
    """Gray 1 / f noise, (count, 3, size, size), of variance 1."""
    grid = frequency_grid(size, dtype=torch.float32)
    noise = torch.fft.fft2(torch.randn(count, 1, size, size)) * natural_image_prior(grid).sqrt()
    noise[..., 0, 0] = 0
    x = torch.fft.ifft2(noise).real
    return (x / x.std()).expand(-1, 3, -1, -1).contiguous()


# --- the stem ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels, taps, stride, expected", [(64, 7, 2, 48), (64, 11, 4, 32), (96, 7, 2, 72)])
def test_default_numbers_depths_scale_and_free_channels(channels, taps, stride, expected):
    model = network(channels, taps, stride)
    conv = model[0]
    before = conv.weight.detach().clone()
    report = initialize(model)
    assert report.poolings == ("blurpool",) * (channels - expected) + ("modulus",) * expected
    stem = model[0]
    assert stem.poolings == report.poolings and stem.weight is conv.weight
    assert_same_bits("free channels", stem.weight[:-expected], before[:-expected])
    norms = stem.weight.detach()[-expected:].flatten(1).norm(dim=1)
    rms = before.flatten(1).norm(dim=1).square().mean().sqrt()
    assert_close("norms", norms, rms.expand(expected), (1e-6, 1e-5))
    bank = wavelet_bank(expected, 3, taps, {2: 2, 4: 3}[stride])
    assert_close("filters", stem.weight[-expected:] / rms, bank)


@pytest.mark.parametrize("taps, stride", [(7, 2), (11, 4)])
def test_the_modulus_moves_a_third_as_much_as_the_maximum(taps, stride):
    """On 1 / f noise, shifted by 1 pixel: |U(x shifted) - U(x)| / |U(x)| of the gray packets."""
    model = network(64, taps, stride, norm=False)
    conv = model[0]
    count = initialize(model).num_complex
    stem, control = model[0], MixPoolStem(conv)
    x = pink_images(2, 129)
    gray = slice(-count, 16 - count)
    for dy, dx in ((1, 0), (0, 1)):
        changes = []
        for module in (stem, control):
            with torch.no_grad():
                here, there = (
                    module(images)[:, gray] for images in (x[..., :128, :128], x[..., dy : 128 + dy, dx : 128 + dx])
                )
            here, there = here[..., 2:-2, 2:-2], there[..., 2:-2, 2:-2]
            changes.append(((there - here).square().mean(dim=(0, 2, 3)) / here.square().mean(dim=(0, 2, 3))).sqrt())
        assert changes[0].max() < 0.16
        assert changes[0].mean() < 0.4 * changes[1].mean() and (changes[0] < 0.7 * changes[1]).all()


@pytest.mark.parametrize("taps, stride, more", [(7, 2, 11), (11, 4, 17), (6, 2, 8)])
def test_more_taps_keep_the_size_and_the_free_channels(taps, stride, more):
    model = network(64, taps, stride)
    conv, norm, act, pool = copy.deepcopy(model)
    control = MixPoolStem(conv, norm, act, pool, pooling="blurpool").eval()
    free = 64 - initialize(model, kernel_size=more).num_complex
    stem = model[0].eval()
    assert stem.kernel_size == (more, more) and stem.weight.shape[-1] == more
    for size in ((65, 60), (64, 71)):
        x = torch.randn(1, 3, *size)
        out, expected = stem(x), control(x)
        assert out.shape == expected.shape
        assert_close("free channels", out[:, :free], expected[:, :free])


def test_the_number_of_channels_can_be_given():
    model = network(20, 9, 2)
    assert initialize(model, num_channels=20).num_complex == 20
    assert_close(
        "filters", F.normalize(model[0].weight.flatten(1), dim=1), F.normalize(wavelet_bank(20, 3, 9, 2).flatten(1))
    )


# --- training ---------------------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=True),
}


def train(model: nn.Module, optimizer: str = "adamw", steps: int = 3, shape: tuple = (2, 3, 48, 48)) -> None:
    model.train()
    optimizer = OPTIMIZERS[optimizer](model.parameters())
    x, upstream = torch.randn(shape), None
    for _ in range(steps):
        out = model(x)
        upstream = torch.randn_like(out) if upstream is None else upstream
        optimizer.zero_grad()
        (out * upstream).mean().mul(100).backward()
        optimizer.step()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_packets_are_trained_freely(optimizer: str):
    model = network()
    initialize(model)
    before = model[0].weight.detach().clone()
    size = torch.linalg.svdvals(before[16:].flatten(2))
    assert (size[:, 1] < 1e-5 * size[:, 0]).all()  # a colour times one kernel
    train(model, optimizer)
    assert ((model[0].weight - before).abs().amax(dim=(1, 2, 3)) > 1e-4).all()
    size = torch.linalg.svdvals(model[0].weight.detach()[16:].flatten(2))
    assert (size[:, 1] > 1e-4 * size[:, 0]).all()


@pytest.mark.parametrize("pooling", ["modulus", "energy", "cmod"])
def test_the_stem_is_the_mixpool_stem_of_its_weights(pooling: str):
    model = network()
    report = initialize(model, pooling=pooling)
    assert report.poolings == ("blurpool",) * 16 + (pooling,) * 48
    conv, norm, act, pool = network()
    with torch.no_grad():
        conv.weight.copy_(model[0].weight)
    same = MixPoolStem(conv, norm, act, pool, pooling=report.poolings)
    x = torch.randn(2, 3, 40, 40)
    assert_same_bits("out", model[0](x), same(x))
    assert model[0].state_dict().keys() == same.state_dict().keys()


def test_paper_2s_cmod():
    model = network()
    assert initialize(model, pooling="cmod", rest="max").poolings == ("max",) * 16 + ("cmod",) * 48


# --- models -----------------------------------------------------------------------------------------------------------


def alexnet() -> nn.Module:
    model = torchvision.models.alexnet()
    model.classifier = nn.Linear(256 * 36, 5)  # the stock one has 58 million weights, which take seconds to train
    return model


MODELS = {
    "timm resnet18": (lambda: timm.create_model("resnet18", num_classes=5), "conv1", 48, 64),
    "torchvision resnet18": (lambda: torchvision.models.resnet18(num_classes=5), "conv1", 48, 64),
    "torchvision alexnet": (alexnet, "features.0", 32, 67),
}


@pytest.mark.parametrize("make, name, count, size", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("bank", ["wavelet", "gabor"])
def test_models_train_and_revert(make, name, count, size, bank):
    model = make()
    model.eval()
    x = torch.randn(2, 3, size, size)
    shape = model(x).shape
    report = initialize(model, bank)
    assert report.num_complex == count and str(report)
    stem = model.get_submodule(name)
    assert isinstance(stem, MixPoolStem) and model(x).shape == shape
    before = stem.weight.detach().clone()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    train(model, "sgd", steps=1, shape=(2, 3, size, size))
    assert ((stem.weight - before).abs().amax(dim=(1, 2, 3)) > 0).all()
    model.load_state_dict(state)
    assert_same_bits("restored", stem.weight, before)
    mixpool.revert(model)
    conv = model.get_submodule(name)
    assert type(conv) is nn.Conv2d and isinstance(conv.weight, nn.Parameter)
    assert_same_bits("reverted", conv.weight, before)
    assert model.eval()(x).shape == shape


def test_a_model_without_modulus_is_the_real_twin():
    model, control = timm.create_model("resnet18"), timm.create_model("resnet18")
    report = initialize(model, pooling="max")
    assert report.num_complex == 0
    control.load_state_dict(model.state_dict() | {}, strict=False)
    stem = model.conv1
    stock = nn.Sequential(copy.deepcopy(control.conv1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)).eval()
    with torch.no_grad():
        stock[0].weight.copy_(stem.weight)
    x = torch.randn(1, 3, 64, 64)
    assert_close("out", stem.eval()(x), stock(x))
    assert torch.linalg.matrix_rank(stem.weight.detach()[-48:].flatten(2), rtol=1e-5).max() == 1


def test_gabor_filters_for_the_modulus_are_fast_and_of_one_phase_each():
    model = timm.create_model("resnet18")
    report = initialize(model, "gabor")
    assert report.stats.frequency[-48:].min() > 1.0 and report.num_complex == 48
    weight = model.conv1.weight.detach()[-48:]
    partner = model.conv1.imaginary_weight().detach()
    similarity = torch.einsum(
        "ck,dk->cd", torch.complex(weight, partner).flatten(1), torch.complex(weight, -partner).flatten(1)
    ).abs()
    norm = similarity.diagonal().sqrt()
    assert (similarity / norm[:, None] / norm - torch.eye(48)).max() < 0.98  # as complex filters, whatever the phase
    is_gray = (weight - weight.mean(dim=1, keepdim=True)).abs().amax(dim=(1, 2, 3)) < 1e-6
    assert is_gray.sum() == 48 - round(48 * COLOR_SHARE)


def test_own_filters_and_the_same_parameter():
    model = timm.create_model("resnet18")
    weight, before = model.conv1.weight, model.conv1.weight.detach().clone()
    report = initialize(model, wavelet_bank(10) * torch.tensor([0.98, 1.31, 0.71])[:, None, None])
    assert report.num_complex == 10 and model.conv1.weight is weight
    assert_same_bits("free", weight[:-10], before[:-10])
    model = timm.create_model("resnet18")
    initialize(model, gabor_bank(64, kernel_size=9))
    assert model.conv1.num_complex == 64 and model.conv1.padding == (4, 4)


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "conv, options, message",
    [
        ({"stride": 3}, {}, "stride 3"),
        ({"stride": 3}, {"num_channels": 4}, "stride=3"),
        ({"stride": (2, 1)}, {}, r"\(2, 1\)"),
        ({"kernel_size": (7, 5)}, {}, r"\(7, 5\)"),
        ({}, {"kernel_size": 8}, "7, 9, 11, ..., got 8"),
        ({}, {"kernel_size": 5}, "got 5"),
        ({}, {"num_channels": 65}, r"1 to 64 filters"),
        ({"padding": "same", "stride": 1}, {}, "same"),
    ],
)
def test_stem_errors_leave_the_convolution_as_it_was(conv, options, message):
    conv = nn.Conv2d(3, 64, **{"kernel_size": 7, "stride": 2, "padding": 3} | conv)
    weight, before = conv.weight, conv.weight.detach().clone()
    geometry = conv.kernel_size, conv.padding
    model = nn.Sequential(conv, nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    with pytest.raises(ValueError, match=message):
        initialize(model, **options)
    assert model[0] is conv
    assert conv.weight is weight and (conv.kernel_size, conv.padding) == geometry
    assert_same_bits("weight", conv.weight, before)


@pytest.mark.parametrize(
    "bank, options, message",
    [
        ("haar", {}, "'haar'"),
        ("wavelet", {"pooling": "mean"}, "'mean'"),
        ("wavelet", {"rest": "modulus"}, "rest"),
        ("wavelet", {"rest": "modulus", "kernel_size": 11}, "rest"),
        ("wavelet", {"stem": "layer1.0.conv1"}, "max pool"),
        (torch.randn(4, 3, 7, 7), {"num_channels": 5}, "num_channels=5"),
        (torch.randn(4, 1, 7, 7), {}, r"\(3, k, k\), got \(4, 1, 7, 7\)"),
        (torch.randn(7, 7), {}, r"got \(7, 7\)"),
    ],
)
def test_initialize_errors_leave_the_model_as_it_was(bank, options, message):
    model = timm.create_model("resnet18")
    before = copy.deepcopy(model.state_dict())
    weight = model.conv1.weight
    with pytest.raises(ValueError, match=message):
        initialize(model, bank, **options)
    assert type(model.conv1) is nn.Conv2d and model.conv1.weight is weight
    assert model.conv1.kernel_size == (7, 7) and model.conv1.padding == (3, 3)
    after = model.state_dict()
    assert after.keys() == before.keys()
    for key, value in before.items():
        assert_same_bits(key, after[key], value)


@pytest.mark.parametrize(
    ("old", "now"),
    [
        ({"blur": 1}, 'pooling="cmod"'),
        ({"max_blur": 3}, 'rest="blurpool"'),
        ({"imag": "free"}, "free imaginary filters"),
        ({"trainable": False}, "all filters are trained"),
    ],
    ids=str,
)
def test_old_keywords_are_refused_with_the_present_spelling(old: dict, now: str):
    model = network()
    weight = model[0].weight.detach().clone()
    with pytest.raises(TypeError, match=r"initialize\(\).*" + re.escape(now)):
        initialize(model, **old)
    assert torch.equal(model[0].weight, weight)


def test_a_converted_model_and_no_model_are_refused():
    model = timm.create_model("resnet18")
    initialize(model)
    with pytest.raises(StemError, match="conv1"):
        initialize(model)
    with pytest.raises(StemError, match="int"):
        initialize(3)


def test_nothing_to_scale_by_is_an_error():
    model = torchvision.models.resnet18(num_classes=3)
    with torch.no_grad():
        model.conv1.weight.zero_()
    with pytest.raises(ValueError, match="expected a convolution with initial weights"):
        initialize(model)
    assert type(model.conv1) is nn.Conv2d
    bank = torch.randn(4, 3, 7, 7)
    bank[2] = 0
    with pytest.raises(ValueError, match="none of them zero"):
        initialize(torchvision.models.resnet18(num_classes=3), bank)
