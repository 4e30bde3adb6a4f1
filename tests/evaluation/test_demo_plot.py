"""The figure of the demo: what it shows can be read off its artists."""

import pytest
import torch

from mixpool.conversion.report import ConversionReport
from mixpool.evaluation.demo import POOLINGS, DemoResult
from mixpool.evaluation.demo_plot import plot_demo
from mixpool.filters.gabor import gabor_bank
from mixpool.selection.plan import ChannelPlan
from mixpool.selection.stats import analyze


def demo_figure():
    names = ["max"] * 7 + ["modulus"] * 2
    plan = ChannelPlan(tuple(names), ("",) * 9, analyze(gabor_bank(9), 2), None)
    result = DemoResult(
        report=ConversionReport("conv", plan, None, ()),
        changes={name: 0.1 * i * torch.arange(1.0, 9)[:, None].expand(8, 9) for i, name in enumerate(POOLINGS, 1)},
        photo=torch.rand(3, 64, 64),
        channel=7,
        kernel=torch.complex(torch.randn(3, 7, 7), torch.randn(3, 7, 7)),
        maps={name: (torch.rand(56, 56), torch.rand(56, 56)) for name in ("max pooling", "mixpool")},
        num_photos=1,
    )
    return plot_demo(result, "T", "S")


def test_demo_draws_its_data():
    figure = demo_figure()
    curves = {line.get_label(): line.get_ydata() for line in figure.axes[-1].lines}
    assert list(curves["mixpool"]) == pytest.approx([0.4 * k for k in range(9)]) and set(curves) == set(POOLINGS)
    assert figure.axes[-1].get_title() == "change, mean of 2 channels"
    texts = [text.get_text() for text in figure.texts]
    assert "T" in texts and "S" in texts and "filter 7: W + iV" in texts


def test_demo_leaves_nothing_outside_the_picture():
    figure = demo_figure()
    figure.canvas.draw()
    box = figure.get_tightbbox()
    assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= 10 and box.y1 <= figure.get_figheight()
