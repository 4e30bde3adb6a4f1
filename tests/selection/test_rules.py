"""Choosing the channels: the rule on filters made by hand, the measurement on images, and the calibration it allows.

Legend: C channels, I input channels, filters of 7x7 taps read at stride 2 unless said otherwise.
"""

from __future__ import annotations

import math

import pytest
import torch
import torchvision
from support import definition, gabor
from torch import Tensor, nn

import mixpool
from mixpool import MixPoolStem, analytic_partner, analyze, convert
from mixpool.selection.calibrate import Fits, measure
from mixpool.selection.pictures import dead_leaves
from mixpool.selection.rules import MIN_FIDELITY, make_plan, select_by_fidelity, select_by_filter

ANGLES = [i * math.pi / 8 for i in range(8)]
FREQUENCIES = [0.3, 0.5, 0.7, 0.9, 1.1, 1.3, 1.5, 1.7, 1.9, 2.1]  # radians per pixel


def gabors(frequencies, angles=(0.3,), phases=(0.0,), sigma=1.6, taps=7, colors=(1.0, 0.8, 0.6)) -> Tensor:
    """(C, 3, taps, taps), one filter for each combination, frequencies slowest."""
    return torch.cat([gabor(f, a, taps, sigma, p, colors) for f in frequencies for a in angles for p in phases])


def rule(weight: Tensor, stride: int = 2) -> tuple[list[bool], list[str]]:
    mask, reasons = select_by_filter(analyze(weight, stride))
    return mask.tolist(), reasons


@pytest.fixture
def images() -> Tensor:
    """Textures with waves of all frequencies: sums of plane waves with energy ~ 1 / frequency."""
    generator = torch.Generator().manual_seed(5)
    spectrum = torch.fft.rfft2(torch.randn(4, 3, 31, 37, generator=generator, dtype=torch.float64))
    fy = torch.fft.fftfreq(31, dtype=torch.float64)[:, None]
    fx = torch.fft.rfftfreq(37, dtype=torch.float64)
    spectrum = spectrum / (fy**2 + fx**2 + 0.01).sqrt()
    images = torch.fft.irfft2(spectrum, s=(31, 37))
    return (images / images.std()).float()


# --- the rule on filters ----------------------------------------------------------------------------------------------


def test_fast_waves_take_the_modulus_in_every_direction_and_phase():
    mask, reasons = rule(gabors([1.9, 2.1], ANGLES[1:4] + ANGLES[5:], [0.0, 1.0, math.pi / 2]))
    assert all(mask), [reason for reason, flag in zip(reasons, mask) if not flag]
    assert all(reason.startswith("predicted correlation") and ">= 0.85" in reason for reason in reasons)


def test_slow_waves_stay_on_max_pooling():
    mask, reasons = rule(gabors([0.3, 0.5, 0.7], ANGLES, [math.pi / 2]))
    assert not any(mask)
    assert all(" < 0.85" in reason for reason in reasons), reasons


def test_blobs_stay_on_max_pooling():
    mask, reasons = rule(gabors([0.0], sigma=1.0) + 0)
    assert mask == [False] and reasons[0].startswith("low-pass, dc share 1.000 > ")
    mask, reasons = rule(torch.ones(1, 3, 7, 7))
    assert mask == [False] and reasons[0].startswith("low-pass")


def test_waves_that_stand_still_under_the_stride_stay_on_max_pooling():
    """At stride 4 a wave of pi / 2 per pixel turns by 2 pi per step: all of a window shows one phase."""
    weight = gabors([math.pi / 2], [0.0], [math.pi / 2], sigma=3.5, taps=17)
    assert rule(weight, stride=4)[0] == [False] and rule(weight, stride=2)[0] == [True]


def test_broad_bands_stay_on_max_pooling():
    """A point, an edge one pixel wide and most of noise hold all frequencies at once."""
    point = torch.zeros(1, 1, 7, 7)
    point[..., 3, 3] = 1
    edge = torch.zeros(1, 1, 7, 7)
    edge[..., 3, 3], edge[..., 3, 4] = 1, -1
    noise = torch.randn(24, 1, 7, 7, generator=torch.Generator().manual_seed(0))
    assert rule(torch.cat([point, edge]))[0] == [False, False]
    assert sum(rule(noise)[0]) <= 1
    assert sum(rule(noise - noise.mean(dim=(2, 3), keepdim=True))[0]) <= 4


def test_empty_filters_stay_on_max_pooling():
    assert rule(torch.zeros(2, 3, 7, 7)) == ([False, False], ["empty filter"] * 2)


@pytest.mark.parametrize("angle", ANGLES)
def test_the_decision_is_monotone_in_the_frequency(angle: float):
    """From slow to fast there is one change, from max to modulus, and the prediction behind it rises."""
    weight = gabors(FREQUENCIES, [angle], [math.pi / 2])
    mask, reasons = rule(weight)
    assert not mask[0] and mask[-1]
    assert mask == sorted(mask), list(zip(FREQUENCIES, mask, reasons))
    correlation = analyze(weight, 2).predicted_correlation_blur3
    assert (correlation.diff() > -0.01).all() and correlation[0] < 0.7 and correlation[-1] > 0.87


def test_wider_bands_fail_one_after_the_other():
    """Fewer and fewer cycles under the envelope: from modulus to max, never back."""
    weight = torch.cat([gabor(1.6, 0.3, 11, sigma, 0.5) for sigma in (2.5, 2.0, 1.5, 1.0, 0.6, 0.3)])
    mask, _ = rule(weight)
    assert mask[0] and not mask[-1]
    assert mask == sorted(mask, reverse=True)


def test_the_decision_does_not_depend_on_scale_or_sign():
    weight = torch.cat([gabors(FREQUENCIES, ANGLES[:4]), torch.randn(8, 3, 7, 7)])
    mask, reasons = rule(weight)
    for factor in (-1.0, 1e-4, 300.0):
        assert rule(weight * factor)[0] == mask
    assert rule(weight.float())[0] == mask


def test_mirrored_and_turned_filters_are_judged_alike():
    """The synthetic pictures are no more symmetric than photos are, so a filter on the edge may go either way."""
    weight = gabors(FREQUENCIES, ANGLES[:4], [math.pi / 2])
    correlation = analyze(weight, 2).predicted_correlation_blur3
    for changed in (weight.flip(2), weight.flip(3), weight.transpose(2, 3), weight[:, [2, 0, 1]]):
        assert (analyze(changed, 2).predicted_correlation_blur3 - correlation).abs().max() < 0.04


def test_larger_strides_take_slower_waves():
    weight = gabors([0.7, 0.72], ANGLES[1:4], [math.pi / 2], sigma=4.0, taps=21)
    by_stride = [analyze(weight, stride).predicted_correlation_blur3 for stride in (1, 2, 4)]
    assert (by_stride[0] < by_stride[1] - 0.05).all() and (by_stride[1] < by_stride[2] - 0.05).all(), by_stride
    assert [sum(rule(weight, stride)[0]) for stride in (1, 2, 4)] == [0, 0, 6]


def test_every_reason_names_the_number_that_decided():
    weight = torch.cat([gabors(FREQUENCIES, ANGLES[:2]), gabors([0.0]), torch.randn(8, 3, 7, 7).double()])
    stats = analyze(weight, 2)
    mask, reasons = select_by_filter(stats)
    values = {
        "low-pass, dc share": stats.dc_share,
        "predicted correlation with max pooling": stats.predicted_correlation_blur3,
    }
    for channel, (flag, reason) in enumerate(zip(mask.tolist(), reasons)):
        name, value, relation, limit = reason.rsplit(" ", 3)
        assert flag == (relation == ">=")
        assert float(value) == pytest.approx(values[name][channel].item(), abs=0.0006)
        assert {">": float(value) > float(limit), "<": float(value) <= float(limit)}.get(relation, True)
    assert len({reason.rsplit(" ", 3)[0] for reason in reasons}) == 2


def test_convert_and_the_stem_follow_the_rule():
    conv = nn.Conv2d(3, len(FREQUENCIES), 7, 2, 3, bias=False)
    with torch.no_grad():
        conv.weight.copy_(gabors(FREQUENCIES, phases=[0.7]))
    mask, reasons = rule(conv.weight)
    model = nn.Sequential(conv, nn.BatchNorm2d(len(FREQUENCIES)), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    report = convert(model)
    assert report.plan.is_modulus == tuple(mask) and report.plan.reasons == tuple(reasons)
    assert report.plan.fidelity is None
    assert 0 < report.num_modulus < len(FREQUENCIES)


# --- the measurement on images ----------------------------------------------------------------------------------------

PARTS = {
    "norm": (False, True, True),
    "norm and bias": (True, True, True),
    "norm without affine": (False, True, False),
    "bias": (True, False, False),
    "bare": (False, False, False),
}


def parts(bias: bool, norm: bool, affine: bool, act: nn.Module | None = None) -> tuple:
    """A stem of six Gabor filters with trained-looking statistics, scales of both signs."""
    conv = nn.Conv2d(3, 6, 7, 2, 3, bias=bias)
    norm_layer = nn.BatchNorm2d(6, affine=affine).eval() if norm else None
    with torch.no_grad():
        conv.weight.copy_(gabors([0.8, 1.2, 1.6], [0.4, 2.0], [0.9]))
        if bias:
            conv.bias.copy_(torch.linspace(-1, 1, 6))
        if norm:
            norm_layer.running_mean.copy_(torch.linspace(0.5, -0.5, 6))
            norm_layer.running_var.copy_(torch.linspace(0.5, 4, 6))
        if affine:
            norm_layer.weight.copy_(torch.tensor([1.0, -0.7, 0.4, 1.6, -1.1, 0.9]))
            norm_layer.bias.copy_(torch.linspace(-0.4, 0.6, 6))
    return conv, norm_layer, nn.ReLU() if act is None else act, nn.MaxPool2d(3, 2, 1)


def both_poolings(conv: nn.Conv2d, norm: nn.BatchNorm2d | None, images: Tensor, blur: int) -> tuple[Tensor, Tensor]:
    """Max pooling and modulus of every channel before the activation, by the loops of the definition, (C, P)."""
    direction = analyze(conv.weight, 2).center_frequency
    weight_imag = analytic_partner(conv.weight.double(), direction)
    if norm is None:
        scale, shift = torch.ones(6), torch.zeros(6)
    else:
        scale = (norm.running_var + norm.eps).rsqrt() * (norm.weight if norm.affine else 1)
        shift = (norm.bias if norm.affine else 0) - norm.running_mean * scale
    poolings = [
        definition(
            images,
            conv.weight,
            conv.bias,
            is_modulus=[is_modulus] * 6,
            weight_imag=weight_imag,
            scale=scale,
            shift=shift,
            act=lambda v: v,
            conv_stride=(2, 2),
            conv_padding=(3, 3),
            pool_padding=(1, 1),
            blur=blur,
        )
        for is_modulus in (False, True)
    ]
    return tuple(torch.from_numpy(pooled).transpose(0, 1).flatten(1) for pooled in poolings)


def stem_of(parts: tuple, **options) -> MixPoolStem:
    return MixPoolStem(*parts, **options)


@pytest.mark.parametrize("blur", [1, 3])
@pytest.mark.parametrize("kind", PARTS)
def test_fits_and_fidelity_equal_an_independent_computation(kind: str, blur: int, images):
    """Least squares by numpy's solver over the definition's loops, and the correlation after the activation."""
    conv, norm, act, pool = parts(*PARTS[kind])
    by_max, by_modulus = both_poolings(conv, norm, images, blur)
    stem = MixPoolStem(conv, norm, act, pool, select="none", blur=blur)
    index = torch.tensor([4, 0, 1, 5])
    fits = measure(stem, index, analyze(conv.weight, 2), images)
    assert torch.equal(fits.index, index)
    has_offset = conv.bias is not None if norm is None else norm.affine
    for position, channel in enumerate(index.tolist()):
        x, y = by_modulus[channel], by_max[channel]
        columns = torch.stack([x, torch.ones_like(x)], dim=1) if has_offset else x[:, None]
        gain, *offset = torch.linalg.lstsq(columns, y[:, None]).solution[:, 0].tolist()
        assert fits.gain[position].item() == pytest.approx(gain, rel=1e-3)
        assert fits.offset[position].item() == pytest.approx(offset[0] if offset else 0, abs=1e-3)
        fitted = (gain * x + (offset[0] if offset else 0)).relu()
        correlation = torch.corrcoef(torch.stack([fitted, y.relu()]))[0, 1].item()
        assert fits.fidelity[position].item() == pytest.approx(correlation, abs=1e-4)
        assert -1 <= fits.fidelity[position] <= 1


@pytest.mark.parametrize("kind", PARTS)
@pytest.mark.parametrize("imag", ["tied", "free"])
def test_the_calibration_is_the_least_squares_optimum(kind: str, imag: str, images):
    """No small change of a channel's gain or offset brings the stem closer to the stock stem on the images."""
    conv, norm, act, pool = parts(*PARTS[kind], act=nn.Identity())
    with torch.no_grad():
        stock = nn.Sequential(conv, *([norm] if norm else []), pool)(images)
        stem = MixPoolStem(conv, norm, act, pool, select="all", imag=imag, images=images).eval()
        scales = [stem.bn.weight] if norm else [stem.weight, *([stem.weight_imag] if imag == "free" else [])]
        offset = stem.bn.bias if norm else stem.bias

        def error() -> Tensor:
            return (stem(images) - stock).double().square().mean(dim=(0, 2, 3))

        best = error()
        if kind == "norm without affine":  # nothing to fold a gain into
            assert (stem.calibration == torch.tensor([1.0, 0.0])).all()
            return
        assert (stem.calibration[:, 0] != 1).all()
        for factor in (0.98, 1.02):
            for scale in scales:
                scale.mul_(factor)
            if norm is None or offset is not None:
                # the gain alone: what the scaling does to a convolution's bias is the offset's business
                assert (error() > best * (1 - 1e-5)).all(), f"gain * {factor}"
            for scale in scales:
                scale.div_(factor)
        if offset is not None:
            for change in (-0.02, 0.02):
                offset.add_(change)
                assert (error() > best).all(), f"offset {change:+}"
                offset.sub_(change)
        torch.testing.assert_close(error(), best, rtol=1e-4, atol=1e-7)


def test_fidelity_is_high_for_a_wave_that_the_window_sees_whole():
    """On a slowly modulated plane wave, both poolings follow the envelope."""
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    envelope = 1 + 0.9 * torch.sin(2 * math.pi * y / 64) * torch.sin(2 * math.pi * x / 64)
    image = (envelope * torch.cos(1.6 * (math.cos(0.9) * x + math.sin(0.9) * y)))[None, None].expand(1, 3, 64, 64)
    conv = nn.Conv2d(3, 1, 7, 2, bias=False)
    with torch.no_grad():
        conv.weight.copy_(gabors([1.6], [0.9]))
    stem = MixPoolStem(conv, None, nn.ReLU(), nn.MaxPool2d(3, 2), select="none")
    fidelity = measure(stem, torch.tensor([0]), analyze(conv.weight, 2), image).fidelity
    assert fidelity.item() > 0.95


def test_images_decide_by_the_threshold():
    candidates = torch.tensor([True, True, False, True])
    fits = Fits(
        torch.tensor([0, 1, 3]), torch.ones(3), torch.zeros(3), torch.tensor([MIN_FIDELITY + 1e-3, 0.2, float("nan")])
    )
    mask, reasons = select_by_fidelity(candidates, ["a", "b", "low frequency", "d"], fits)
    assert mask.tolist() == [True, False, False, False]
    assert reasons[2] == "low frequency" and "0.841 >=" in reasons[0] and "0.200 <" in reasons[1]
    assert candidates.tolist() == [True, True, False, True]


def test_a_plan_with_images_measures_candidates_only(images):
    conv, norm, act, pool = parts(*PARTS["norm"])
    with torch.no_grad():
        conv.weight[0] = 1 / 49  # low-pass: no candidate
    stem = MixPoolStem(conv, norm, act, pool, select="none")
    plan, fits = make_plan("auto", stem, images)
    assert plan.kinds[0] == "max" and plan.fidelity[0].isnan() and plan.reasons[0].startswith("low-pass")
    measured = ~plan.fidelity.isnan()
    assert measured.any()
    for channel in measured.nonzero()[:, 0].tolist():
        assert plan.is_modulus[channel] == (plan.fidelity[channel] >= MIN_FIDELITY).item()
        assert f"{plan.fidelity[channel]:.3f}" in plan.reasons[channel]
    assert fits is None or fits.index.tolist() == [c for c, flag in enumerate(plan.is_modulus) if flag]


def test_the_measurement_leaves_the_stem_alone(images):
    """A stem in training keeps its running statistics and its mode; the fits are those of evaluation."""
    conv, norm, act, pool = parts(*PARTS["norm"])
    stem = MixPoolStem(conv, norm, act, pool, select="none")
    stats = analyze(conv.weight, 2)
    expected = measure(stem, torch.arange(6), stats, images)
    norm.train()
    before = {key: value.clone() for key, value in stem.state_dict().items()}
    fits = measure(stem, torch.arange(6), stats, images)
    assert norm.training
    assert all(torch.equal(value, before[key]) for key, value in stem.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(fits, expected))
    with pytest.raises(ValueError, match="at least one image"):
        measure(stem, torch.arange(6), stats, [])
    assert norm.training


def test_gray_images_on_which_a_channel_sees_nothing():
    """Constant images leave nothing to fit: no NaN, no modulus."""
    conv, norm, act, pool = parts(*PARTS["norm"])
    report = convert(nn.Sequential(conv, norm, act, pool, nn.Flatten()), images=torch.zeros(3, 3, 32, 32))
    assert report.num_modulus == 0
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
        convert(plain, select=report.plan.is_modulus)
        assert report.num_modulus == 6 and report.plan.fidelity is None
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
        assert report.num_modulus == 6 and "calibrated" not in str(report)
        assert (model[0].calibration == torch.tensor([1.0, 0.0])).all()
        assert (norm.weight == 1).all() and (norm.bias == 0).all()


def test_dilated_stems_stay_on_max_pooling():
    model = trained()
    model[0].dilation, model[0].padding = (2, 2), (6, 6)
    report = convert(model)
    assert report.num_modulus == 0 and set(report.plan.reasons) == {"dilated convolution"}


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


# --- a real pretrained model on real photos ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def squeezenet(shared_data):
    safetensors = pytest.importorskip("safetensors.torch")
    path = shared_data / "squeezenet" / "squeezenet1_0_imagenet.safetensors"
    if not path.is_file():
        pytest.skip(f"needs {path}")
    model = torchvision.models.squeezenet1_0()
    model.load_state_dict({key: value.float() for key, value in safetensors.load_file(path).items()})
    model.classifier[1].padding = (1, 1)
    return model.eval()


@pytest.fixture(scope="module")
def photos(shared_data) -> Tensor:
    from PIL import Image

    paths = sorted((shared_data / "imagenet_sample" / "val").glob("*/*.jpg"))[::5]
    if len(paths) < 100:
        pytest.skip("needs 500 photos in imagenet_sample")
    transform = torchvision.transforms.Compose(
        [
            torchvision.transforms.Resize(256),
            torchvision.transforms.CenterCrop(227),
            torchvision.transforms.ToTensor(),
            torchvision.transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    return torch.stack([transform(Image.open(path).convert("RGB")) for path in paths[:100]])


@pytest.mark.slow
def test_squeezenet_on_photos(squeezenet, photos):
    """The automatic choice swaps a third of the channels and keeps what the model says."""
    state = {key: value.clone() for key, value in squeezenet.state_dict().items()}
    by_filter = convert(squeezenet)
    mixpool.revert(squeezenet)
    report = convert(squeezenet, images=photos)
    print(f"{by_filter.num_modulus} channels by filters; {report.num_modulus} by photos, {report.agreement}")
    assert 30 <= by_filter.num_modulus <= 40 and "normalised as ImageNet's" in str(by_filter)
    assert report.num_modulus >= 30
    assert report.agreement.num_images == 100
    assert report.agreement.top1 >= 0.75 and report.agreement.kl < 0.3
    assert "WARNING" not in str(report)
    # Fast waves pool alike: the modulus channels are the faster ones.
    fast = torch.tensor(report.plan.is_modulus)
    assert report.stats.phase_step[fast].mean() > report.stats.phase_step[~fast].mean() + 0.5
    mixpool.revert(squeezenet)
    assert all(torch.equal(value, state[key]) for key, value in squeezenet.state_dict().items())
