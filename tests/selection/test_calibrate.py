"""How well a modulus stands in for max pooling on images, and the calibration that this allows.

Legend: C channels, I input channels, filters of 7x7 taps read at stride 2 unless said otherwise.
"""

from __future__ import annotations

import math

import pytest
import torch
from gabor_stems import PARTS, gabors, parts, textures
from support import COMPLEX, definition
from torch import Tensor, nn

import mixpool
from mixpool import MixPoolStem, analytic_partner, analyze, convert
from mixpool.selection.calibrate import calibrate, measure
from mixpool.selection.pictures import dead_leaves
from mixpool.selection.rules import choose

MODULI = ["modulus"] * 6


@pytest.fixture
def images() -> Tensor:
    return textures()


# --- the measurement on images ----------------------------------------------------------------------------------------


def both_poolings(conv: nn.Conv2d, norm: nn.BatchNorm2d | None, images: Tensor, pooling: str) -> tuple[Tensor, Tensor]:
    """Max pooling and a complex one of every channel before the activation, by the definition's loops, (C, P)."""
    direction = analyze(conv.weight, 2).center_frequency
    weight_imag = analytic_partner(conv.weight.double(), direction)
    if norm is None:
        scale, shift = torch.ones(6), torch.zeros(6)
    else:
        scale = (norm.running_var + norm.eps).rsqrt() * (norm.weight if norm.affine else 1)
        shift = (norm.bias if norm.affine else 0) - norm.running_mean * scale
    pooled = [
        definition(
            images,
            conv.weight,
            conv.bias,
            pooling=[name] * 6,
            weight_imag=weight_imag,
            scale=scale,
            shift=shift,
            act=lambda v: v,
            conv_stride=(2, 2),
            conv_padding=(3, 3),
            pool_padding=(1, 1),
        )
        for name in ("max", pooling)
    ]
    return tuple(torch.from_numpy(one).transpose(0, 1).flatten(1) for one in pooled)


@pytest.mark.parametrize("pooling", COMPLEX)
@pytest.mark.parametrize("kind", PARTS)
def test_fits_and_fidelity_equal_an_independent_computation(kind: str, pooling: str, images):
    """Least squares by numpy's solver over the definition's loops, and the correlation after the activation."""
    conv, norm, act, pool = parts(*PARTS[kind])
    by_max, by_modulus = both_poolings(conv, norm, images, pooling)
    stem = MixPoolStem(conv, norm, act, pool)
    index = torch.tensor([4, 0, 1, 5])
    fits = measure(stem, index, analyze(conv.weight, 2), images, [pooling] * 6)
    assert torch.equal(fits.index, index.sort().values)
    has_offset = conv.bias is not None if norm is None else norm.affine
    for position, channel in enumerate(fits.index.tolist()):
        x, y = by_modulus[channel], by_max[channel]
        columns = torch.stack([x, torch.ones_like(x)], dim=1) if has_offset else x[:, None]
        gain, *offset = torch.linalg.lstsq(columns, y[:, None]).solution[:, 0].tolist()
        assert fits.gain[position].item() == pytest.approx(gain, rel=1e-3)
        assert fits.offset[position].item() == pytest.approx(offset[0] if offset else 0, abs=1e-3)
        fitted = (gain * x + (offset[0] if offset else 0)).relu()
        correlation = torch.corrcoef(torch.stack([fitted, y.relu()]))[0, 1].item()
        assert fits.fidelity[position].item() == pytest.approx(correlation, abs=1e-4)
        assert -1 <= fits.fidelity[position] <= 1


def test_the_measurement_leaves_the_stem_alone(images):
    """A stem in training keeps its running statistics and its mode; the fits are those of evaluation."""
    conv, norm, act, pool = parts(*PARTS["norm"])
    stem = MixPoolStem(conv, norm, act, pool)
    stats = analyze(conv.weight, 2)
    expected = measure(stem, torch.arange(6), stats, images, MODULI)
    norm.train()
    before = {key: value.clone() for key, value in stem.state_dict().items()}
    fits = measure(stem, torch.arange(6), stats, images, MODULI)
    assert norm.training
    assert all(torch.equal(value, before[key]) for key, value in stem.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(fits, expected))
    with pytest.raises(ValueError, match="at least one image"):
        measure(stem, torch.arange(6), stats, [], MODULI)
    assert norm.training


def test_fidelity_is_high_for_a_wave_that_the_window_sees_whole():
    """On a slowly modulated plane wave, both poolings follow the envelope."""
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    envelope = 1 + 0.9 * torch.sin(2 * math.pi * y / 64) * torch.sin(2 * math.pi * x / 64)
    image = (envelope * torch.cos(1.6 * (math.cos(0.9) * x + math.sin(0.9) * y)))[None, None].expand(1, 3, 64, 64)
    conv = nn.Conv2d(3, 1, 7, 2, bias=False)
    with torch.no_grad():
        conv.weight.copy_(gabors([1.6], [0.9]))
    stem = MixPoolStem(conv, None, nn.ReLU(), nn.MaxPool2d(3, 2))
    fidelity = measure(stem, torch.tensor([0]), analyze(conv.weight, 2), image, ["modulus"]).fidelity
    assert fidelity.item() > 0.95


# --- the calibration on images ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PARTS)
@pytest.mark.parametrize("pooling", COMPLEX)
def test_the_calibration_is_the_least_squares_optimum(kind: str, pooling: str, images):
    """No small change of a channel's gain or offset brings the stem closer to the stock stem on the images."""
    conv, norm, act, pool = parts(*PARTS[kind], act=nn.Identity())
    with torch.no_grad():
        stock = nn.Sequential(conv, *([norm] if norm else []), pool)(images)
        stem = MixPoolStem(conv, norm, act, pool).eval()
        plan, fits = choose(stem, "all", images, pooling=pooling)
        calibrate(stem.lay(plan.poolings), fits)
        scale = stem.bn.weight if norm else stem.weight
        offset = stem.bn.bias if norm else stem.bias

        def error() -> Tensor:
            return (stem(images) - stock).double().square().mean(dim=(0, 2, 3))

        best = error()
        if kind == "norm without affine":  # nothing to fold a gain into
            assert (stem.calibration == torch.tensor([1.0, 0.0])).all()
            return
        assert (stem.calibration[:, 0] != 1).all()
        for factor in (0.98, 1.02):
            scale.mul_(factor)
            if norm is None or offset is not None:
                # the gain alone: what the scaling does to a convolution's bias is the offset's business
                assert (error() > best * (1 - 1e-5)).all(), f"gain * {factor}"
            scale.div_(factor)
        if offset is not None:
            for change in (-0.02, 0.02):
                offset.add_(change)
                assert (error() > best).all(), f"offset {change:+}"
                offset.sub_(change)
        torch.testing.assert_close(error(), best, rtol=1e-4, atol=1e-7)


def test_gray_images_on_which_a_channel_sees_nothing():
    """Constant images leave nothing to fit: no NaN, no modulus."""
    conv, norm, act, pool = parts(*PARTS["norm"])
    report = convert(nn.Sequential(conv, norm, act, pool, nn.Flatten()), images=torch.zeros(3, 3, 32, 32))
    assert report.num_complex == 0
    assert all("nan" not in reason for reason in report.plan.reasons)
    model = nn.Sequential(*parts(*PARTS["norm"]), nn.Flatten())
    convert(model, select="all", images=torch.zeros(3, 3, 32, 32))
    assert model(torch.randn(1, 3, 32, 32)).isfinite().all()


# --- the calibration without images -----------------------------------------------------------------------------------


def trained(scale: float = 1.0, fresh: bool = False) -> nn.Sequential:
    """Fast Gabor filters before a norm layer whose statistics are those of photo-like pictures times `scale`."""
    conv = nn.Conv2d(3, 6, 7, 2, 3, bias=False)
    norm = nn.BatchNorm2d(6)
    with torch.no_grad():
        conv.weight.copy_(gabors([1.9, 2.1], [0.4, 1.2, 2.0], [0.9]))
        if not fresh:
            pictures = dead_leaves(8, 96, seed=7)  # others than those that calibrate
            response = nn.functional.conv2d(pictures, conv.weight, stride=2) * scale
            norm.running_mean.copy_(response.mean(dim=(0, 2, 3)))
            norm.running_var.copy_(response.var(dim=(0, 2, 3)))
            norm.weight.copy_(torch.tensor([1.0, -0.7, 0.4, 1.6, -1.1, 0.9]))
            norm.bias.copy_(torch.linspace(-0.4, 0.6, 6))
    return nn.Sequential(conv, norm, nn.ReLU(), nn.MaxPool2d(3, 2, 1)).eval()


def test_without_images_a_trained_stem_is_calibrated_on_pictures():
    """The output is nearer to the stock stem's on pictures that calibrated nothing, and all is undone to the bit."""
    model, plain = trained(), trained()
    pictures = dead_leaves(8, 96, seed=7)
    with torch.no_grad():
        stock = model(pictures)
        state = {key: value.clone() for key, value in model.state_dict().items()}
        report = convert(model)
        convert(plain, select=report.plan.is_complex)
        assert report.num_complex == 6 and report.plan.fidelity is None
        assert "calibrated on synthetic pictures" in str(report) and "ImageNet" not in str(report)
        error = (model(pictures) - stock).square().mean(dim=(0, 2, 3))
        uncalibrated = (plain(pictures) - stock).square().mean(dim=(0, 2, 3))
    assert (error < uncalibrated).all()
    assert all(torch.equal(value, state[key]) for key, value in mixpool.stock_state_dict(model).items())
    mixpool.revert(model)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_the_calibration_does_not_depend_on_the_input_scale():
    """A model fed with pixels from 0 to 255: the norm layer's statistics tell."""
    gains = []
    for scale in (1.0, 58.0, 1e-3):
        model = trained(scale)
        convert(model)
        gains.append(model[0].calibration.clone())
    assert (gains[0][:, 0] != 1).all()
    torch.testing.assert_close(gains[1], gains[0], atol=2e-3, rtol=0)
    torch.testing.assert_close(gains[2][:, 0], gains[0][:, 0], atol=2e-2, rtol=0)  # eps counts there


def test_dead_channels_do_not_tell_the_input_scale():
    """Most channels of this stem see nothing any more: their running variances are those of nothing."""
    gains = []
    for dead in (0, 5):
        alive, model = trained(), trained()
        conv, norm = nn.Conv2d(3, 6 + dead, 7, 2, 3, bias=False), nn.BatchNorm2d(6 + dead)
        with torch.no_grad():
            conv.weight.zero_()
            conv.weight[dead:] = alive[0].weight
            conv.weight[:dead] = 1e-8 * torch.randn(dead, 3, 7, 7)
            for name in ("weight", "bias", "running_mean", "running_var"):
                getattr(norm, name)[dead:] = getattr(alive[1], name)
        model[0], model[1] = conv, norm.eval()
        convert(model)
        gains.append(model[0].calibration[dead:].clone())
    torch.testing.assert_close(gains[0], gains[1])


def test_untrained_stems_are_not_calibrated():
    for model in (trained(fresh=True), trained(fresh=True)[:1]):
        norm = nn.BatchNorm2d(6, track_running_stats=False) if len(model) == 1 else model[1]
        model = nn.Sequential(model[0], norm, nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        report = convert(model)
        assert report.num_complex == 6 and "calibrated" not in str(report)
        assert (model[0].calibration == torch.tensor([1.0, 0.0])).all()
        assert (norm.weight == 1).all() and (norm.bias == 0).all()


def test_dilated_stems_stay_on_max_pooling():
    model = trained()
    model[0].dilation, model[0].padding = (2, 2), (6, 6)
    report = convert(model)
    assert report.num_complex == 0 and set(report.plan.reasons) == {"dilated convolution"}


def test_explicit_choices_are_not_calibrated():
    model = trained()
    report = convert(model, select="all")
    assert "calibrated" not in str(report) and (model[0].calibration == torch.tensor([1.0, 0.0])).all()


def test_a_shared_scale_is_not_calibrated():
    model = trained()
    model.append(nn.BatchNorm2d(6))
    model[4].weight = model[1].weight
    report = convert(model)
    assert "not calibrated" in str(report)
    assert (model[0].calibration == torch.tensor([1.0, 0.0])).all()
