"""The picture of the demonstration: it draws what it is given, inside its edges."""

from __future__ import annotations

import pytest
import torch

from mixpool.evaluation.demo_plot import plot_demo

POOLINGS = ("max pooling", "BlurPool", "CMod", "mixpool")


@pytest.fixture
def figure():
    maps = {name: (torch.rand(56, 56), torch.rand(56, 56)) for name in ("max pooling", "mixpool")}
    curves = {name: [0.1 * i, 0.2 * i] for i, name in enumerate(POOLINGS, 1)}
    kernel = torch.complex(torch.randn(3, 7, 7), torch.randn(3, 7, 7))
    return plot_demo(
        torch.rand(3, 64, 64), kernel, maps, curves, [1, 2], title="T", subtitle="S", channel=7, num_swapped=9
    )


def test_it_draws_its_data(figure):
    curves = {line.get_label(): line.get_ydata() for line in figure.axes[-1].lines}
    assert list(curves["mixpool"]) == [0, 0.4, 0.8] and set(curves) == set(POOLINGS)
    texts = [text.get_text() for text in figure.texts]
    assert "T" in texts and "S" in texts and "filter 7: W + iV" in texts


def test_nothing_is_outside_the_picture(figure):
    figure.canvas.draw()
    box = figure.get_tightbbox()
    assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= 10 and box.y1 <= figure.get_figheight()
