"""The report of a conversion: what it holds, what it prints, and what it warns of."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from small_net import CHANNELS, STRIPES, Net, smooth_images
from torch import Tensor

from mixpool import convert, revert
from mixpool.conversion.report import WARN_BELOW, Agreement, ConversionReport, agreement_of
from mixpool.selection.plan import ChannelPlan
from mixpool.selection.stats import FilterStats


@pytest.fixture
def images() -> Tensor:
    return smooth_images()


def test_report(images):
    model = Net()
    report = convert(model, select=STRIPES, pooling="cmod", rest="blurpool")
    assert isinstance(report, ConversionReport)
    assert report.stem == "conv1 -> bn1 -> relu -> maxpool"
    poolings = tuple("cmod" if flag else "blurpool" for flag in STRIPES)
    assert report.poolings == report.plan.poolings == model.conv1.poolings == poolings
    assert isinstance(report.plan, ChannelPlan)
    assert report.plan.is_complex == tuple(STRIPES)
    assert report.num_complex == report.plan.num_complex == model.conv1.num_complex == 3
    assert isinstance(report.stats, FilterStats) and report.stats is report.plan.stats
    assert report.stats.frequency.shape == (CHANNELS,)
    assert len(report.plan.reasons) == CHANNELS and all(report.plan.reasons)
    assert report.agreement is None and report.notes == ()

    text = str(report)
    assert "3 of 8 channels pool by a modulus: 3 cmod, 5 blurpool" in text and "conv1 -> bn1 -> relu -> maxpool" in text
    assert "was not measured" in text and "nan" not in text
    table = [line.split() for line in text.splitlines() if re.match(r" *\d+ +(blurpool|cmod) ", line)]
    assert [(int(row[0]), row[1]) for row in table] == list(enumerate(poolings))
    assert max(map(len, text.splitlines())) <= 160
    with pytest.raises(AttributeError):
        report.stem = "conv2"

    revert(model)
    report = convert(model, select="all", images=images)
    assert 0 <= report.agreement.top1 <= 1 and report.agreement.kl >= 0 and report.agreement.num_images == 6
    text = str(report)
    assert "on the 6 images" in text and f"{report.agreement.top1:.1%}" in text
    assert "was not measured" not in text


def test_report_of_an_all_max_plan_has_no_warning(images):
    model = Net()
    report = convert(model, select="none", images=images)
    assert report.agreement.top1 == 1 and report.agreement.kl < 1e-6
    assert "WARNING" not in str(report) and "was not measured" not in str(report)


def test_agreement_is_that_of_the_outputs(images):
    model = Net().train()
    reference = copy.deepcopy(model).eval()
    with torch.no_grad():
        before = reference(images)
    report = convert(model, select="all", images=images)
    with torch.no_grad():
        after = copy.deepcopy(model).eval()(images)
    same = (before.argmax(dim=1) == after.argmax(dim=1)).double().mean()
    kl = (before.softmax(1) * (before.log_softmax(1) - after.log_softmax(1))).sum(dim=1).mean()
    assert report.agreement.top1 == pytest.approx(same.item())
    assert report.agreement.kl == pytest.approx(kl.item(), rel=1e-3, abs=1e-7)
    assert report.agreement.kl > 0


def test_too_few_images_are_said(images):
    report = convert(Net(), images=images[:1], select="all")
    assert any("only 1 image" in note for note in report.notes)
    assert report.agreement.num_images == 1
    many = convert(Net(), images=torch.cat([images] * 3), select="all")
    assert not any("image(s)" in note for note in many.notes)


def test_agreement_by_hand():
    before = torch.tensor([[0.0, 1.0], [2.0, 0.0]])
    same = agreement_of(before, before + 3)  # softmax does not see a shift
    assert (same.top1, same.num_images) == (1, 2) and same.kl == pytest.approx(0, abs=1e-6)
    half = agreement_of(before, torch.tensor([[1.0, 0.0], [2.0, 0.0]]))
    p = torch.sigmoid(torch.tensor(1.0)).item()
    assert half.top1 == 0.5 and half.kl == pytest.approx((p - (1 - p)) / 2)


def test_a_warning_where_the_outputs_changed_a_lot():
    plan = convert(Net(), select="all").plan
    for top1 in (WARN_BELOW - 0.01, WARN_BELOW):
        text = str(ConversionReport("conv1", plan, Agreement(top1, 0.5, 40), ("a note",)))
        assert ("WARNING" in text) == (top1 < WARN_BELOW)
        assert "note: a note" in text and "on the 40 images" in text
