"""Choosing the channels: the rule on filters made by hand, and what images change of it.

Legend: C channels, I input channels, filters of 7x7 taps read at stride 2 unless said otherwise.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torchvision
from gabor_stems import PARTS, gabors, parts, textures
from support import gabor
from torch import Tensor, nn

import mixpool
from mixpool import MixPoolStem, analyze, convert
from mixpool.ops.reference import POOLINGS
from mixpool.selection.calibrate import Fits, measure
from mixpool.selection.rules import MIN_FIDELITY, choose, select_by_fidelity, select_by_filter

ANGLES = [i * math.pi / 8 for i in range(8)]
FREQUENCIES = [0.3, 0.5, 0.7, 0.9, 1.1, 1.3, 1.5, 1.7, 1.9, 2.1]  # radians per pixel


@pytest.fixture
def images() -> Tensor:
    return textures()


def rule(weight: Tensor, stride: int = 2) -> tuple[list[bool], list[str]]:
    mask, reasons = select_by_filter(analyze(weight, stride))
    return mask.tolist(), reasons


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
    assert report.plan.is_complex == tuple(mask) and report.plan.reasons == tuple(reasons)
    assert report.plan.fidelity is None
    assert 0 < report.num_complex < len(FREQUENCIES)


# --- the choice on images ---------------------------------------------------------------------------------------------


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
    stem = MixPoolStem(conv, norm, act, pool)
    plan, fits = choose(stem, "auto", images)
    assert plan.poolings[0] == "max" and plan.fidelity[0].isnan() and plan.reasons[0].startswith("low-pass")
    measured = ~plan.fidelity.isnan()
    assert measured.any()
    for channel in measured.nonzero()[:, 0].tolist():
        assert plan.is_complex[channel] == (plan.fidelity[channel] >= MIN_FIDELITY).item()
        assert f"{plan.fidelity[channel]:.3f}" in plan.reasons[channel]
    assert fits is None or fits.index.tolist() == [c for c, flag in enumerate(plan.is_complex) if flag]


# --- what a user can ask for ------------------------------------------------------------------------------------------


def stem_of(*, dilation: int = 1) -> MixPoolStem:
    """Six Gabor filters, of which the rule takes the fast ones."""
    conv, norm, act, pool = parts(*PARTS["norm"])
    with torch.no_grad():
        conv.weight[1], conv.weight[4:] = gabors([0.4])[0], gabors([1.9, 2.1], [0.5])
    conv.dilation, conv.padding = (dilation, dilation), (3 * dilation, 3 * dilation)
    return MixPoolStem(conv, norm, act, pool)


MASK = (True, False, True, True, False, False)


@pytest.mark.parametrize("rest", [name for name, entry in POOLINGS.items() if not entry.is_complex])
@pytest.mark.parametrize("pooling", [name for name, entry in POOLINGS.items() if entry.is_complex])
def test_the_chosen_take_one_pooling_and_the_rest_another(pooling: str, rest: str):
    """The decision does not depend on the words."""
    stem = stem_of()
    mask, reasons = select_by_filter(analyze(stem.weight, 2))
    assert 0 < mask.sum() < 6
    plan, _ = choose(stem, "auto", pooling=pooling, rest=rest)
    assert plan.poolings == tuple(pooling if flag else rest for flag in mask.tolist())
    assert plan.reasons == tuple(reasons) and stem.poolings == ("max",) * 6, "the stem stays as it is"


def test_what_is_chosen_by_hand():
    names = ("energy", "max", "cmod", "blurpool", "modulus", "max")
    expected = tuple("cmod" if flag else "blurpool" for flag in MASK)
    for select, poolings, reason in (
        ("all", ("cmod",) * 6, 'select="all"'),
        ("none", ("blurpool",) * 6, 'select="none"'),
        (MASK, expected, "given"),
        (torch.tensor(MASK), expected, "given"),
        (np.array(MASK), expected, "given"),
        (lambda stats: stats.frequency > 0, ("cmod",) * 6, "select(stats)"),
        (names, names, "given"),
        (lambda stats: iter(names), names, "select(stats)"),
    ):
        plan, fits = choose(stem_of(), select, pooling="cmod", rest="blurpool")
        assert plan.poolings == poolings and plan.reasons == (reason,) * 6
        assert fits is None and plan.fidelity is None


@pytest.mark.parametrize(
    ("select", "message"),
    [
        ("some", 'expected select to be "auto", "all", "none", booleans or a function, got \'some\''),
        ("modulus", "got 'modulus'"),
        (None, "got None"),
        (lambda stats: 3, "a function that returned 3"),
        ([True] * 5, "expected 6 booleans from select, one per output channel, got 5"),
        (["modulus"] * 5, "expected 6 booleans from select, one per output channel, got 5"),
        ([0.5] * 6, "expected 6 booleans"),
        (["modulus", "median", "max", "max", "max", "max"], "expected 6 booleans .* got 6: .*median"),
    ],
    ids=range(8),
)
def test_wrong_choices_are_named(select, message: str):
    with pytest.raises(ValueError, match=message):
        choose(stem_of(), select)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"pooling": "max"}, r"expected pooling to be one of \('cmod', 'modulus', 'energy'\), got 'max'"),
        ({"pooling": "median"}, "expected pooling .* got 'median'"),
        ({"rest": "modulus"}, r"expected rest to be one of \('max', 'blurpool'\), got 'modulus'"),
        ({"rest": None}, "expected rest .* got None"),
    ],
    ids=str,
)
def test_wrong_words_are_named(words: dict, message: str):
    with pytest.raises(ValueError, match=message):
        choose(stem_of(), "none", **words)


def test_what_is_chosen_by_hand_is_measured_on_images(images):
    """Fits of the complex channels alone, each by its own pooling; no fidelity for the others."""
    names = ("energy", "max", "cmod", "blurpool", "modulus", "max")
    stem = stem_of()
    plan, fits = choose(stem, names, images)
    assert plan.poolings == names and sorted(fits.index.tolist()) == [0, 2, 4]
    assert plan.fidelity.isnan().tolist() == [False, True, False, True, False, True]
    for channel, name in ((0, "energy"), (2, "cmod"), (4, "modulus")):
        alone = measure(stem, torch.tensor([channel]), plan.stats, images, (name,) * 6)
        assert plan.fidelity[channel].item() == pytest.approx(alone.fidelity.item(), abs=1e-6)
        assert fits.gain[fits.index == channel].item() == pytest.approx(alone.gain.item(), rel=1e-5)
    plan, fits = choose(stem, "none", images)
    assert fits is None and plan.fidelity is None


def test_a_dilated_stem_stays_on_the_rest(images):
    for given in (None, images):
        plan, fits = choose(stem_of(dilation=2), "auto", given, rest="blurpool")
        assert plan.poolings == ("blurpool",) * 6 and fits is None
        assert set(plan.reasons) == {"dilated convolution"}


def test_weights_that_do_not_exist_choose_nothing():
    stem = stem_of().to("meta")
    with pytest.raises(ValueError, match="got a meta tensor: load weights first"):
        choose(stem, "none")


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
    print(f"{by_filter.num_complex} channels by filters; {report.num_complex} by photos, {report.agreement}")
    assert 30 <= by_filter.num_complex <= 40 and "normalised as ImageNet's" in str(by_filter)
    assert report.num_complex >= 30
    assert report.agreement.num_images == 100
    assert report.agreement.top1 >= 0.75 and report.agreement.kl < 0.3
    assert "WARNING" not in str(report)
    # Fast waves pool alike: the modulus channels are the faster ones.
    fast = torch.tensor(report.plan.is_complex)
    assert report.stats.phase_step[fast].mean() > report.stats.phase_step[~fast].mean() + 0.5
    mixpool.revert(squeezenet)
    assert all(torch.equal(value, state[key]) for key, value in squeezenet.state_dict().items())
