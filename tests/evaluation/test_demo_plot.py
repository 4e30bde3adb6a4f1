"""The figure of the demo: what it shows can be read off its artists."""

import torch

from mixpool.evaluation.demo_plot import plot_demo


def demo_figure():
    maps = {name: (torch.rand(56, 56), torch.rand(56, 56)) for name in ("max pooling", "mixpool")}
    curves = {name: [0.1 * i, 0.2 * i] for i, name in enumerate(["max pooling", "BlurPool", "CMod", "mixpool"], 1)}
    kernel = torch.complex(torch.randn(3, 7, 7), torch.randn(3, 7, 7))
    return plot_demo(
        torch.rand(3, 64, 64), kernel, maps, curves, [1, 2], title="T", subtitle="S", channel=7, num_swapped=9
    )


def test_demo_draws_its_data():
    figure = demo_figure()
    curves = {line.get_label(): line.get_ydata() for line in figure.axes[-1].lines}
    assert list(curves["mixpool"]) == [0, 0.4, 0.8] and set(curves) == {"max pooling", "BlurPool", "CMod", "mixpool"}
    texts = [text.get_text() for text in figure.texts]
    assert "T" in texts and "S" in texts and "filter 7: W + iV" in texts


def test_demo_leaves_nothing_outside_the_picture():
    figure = demo_figure()
    figure.canvas.draw()
    box = figure.get_tightbbox()
    assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= 10 and box.y1 <= figure.get_figheight()
