"""The figures of evaluations, from their records."""

from __future__ import annotations

import pytest
from PIL import Image
from torch import nn

from mixpool.evaluation.evaluate import evaluate
from mixpool.evaluation.model_input import ModelInput
from mixpool.evaluation.plots import TITLES, plot_curves, write_figures
from mixpool.evaluation.protocols import PROTOCOLS
from mixpool.evaluation.table import table_rows
from mixpool.figures import blank_figure, inch_axes, plain_axes


def record_of(model, value, **fields):
    path = {"horizontal": {}, "vertical": {}, "diagonal": {}}
    steps = [str(k) for k in range(1, 9)]
    return {
        "model": model,
        "num_images": 10,
        "summary": {"top1": value, "flip_probability": {d: {k: value / int(k) for k in steps} for d in path}},
        "ci95": {
            "top1": [value - 1, value + 1],
            "flip_probability": {d: {k: [value - 2, value + 2] for k in steps} for d in path},
        },
        **fields,
    }


def test_figures(tmp_path):
    found = [record_of(f"model {number}", 40.0 - 3 * number) for number in range(7)]
    figure = plot_curves(found, "flip_probability")
    panels = [axes for axes in figure.axes if axes.lines]
    assert [len(axes.lines) for axes in panels] == [7, 7, 7]
    assert panels[0].lines[2].get_ydata().tolist() == pytest.approx([34 / k for k in range(1, 9)])
    styles = {(line.get_color(), line.get_linestyle()) for line in panels[0].lines}
    assert len(styles) == 7
    (path,) = write_figures(found, tmp_path)
    assert path.name == "evaluation-flip-probability.png" and Image.open(path).size[0] > 1000
    with pytest.raises(ValueError, match="found none of 'kl'"):
        plot_curves(found, "kl")


def test_every_curve_has_a_title_and_every_number_a_row(tmp_path):
    from mixpool.evaluation.result import METRICS

    assert set(TITLES) == {name for name, metric in METRICS.items() if metric.axes}
    images = [(Image.new("RGB", (40, 40), (9 * i, 99, 3)), 0) for i in range(3)]
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    result = evaluate(net, images, protocols=[*PROTOCOLS, "stem"], model_input=ModelInput(32), workers=0)
    assert result.summary().keys() == METRICS.keys()
    assert len(table_rows([result.as_record(model="net")])) > len(METRICS)
    assert len(write_figures([result.as_record(model="net")], tmp_path)) == len(TITLES)


def test_a_plain_panel_has_no_frame_above_and_to_the_right():
    axes = inch_axes(blank_figure(3, 3), 1, 1, 1, 1)
    plain_axes(axes)
    assert {side for side, spine in axes.spines.items() if spine.get_visible()} == {"left", "bottom"}
