"""Figures of the theory's experiment: what they show is what the record holds."""

import copy
import functools
import math

import numpy as np
import pytest
import torch
from matplotlib.patches import Rectangle
from PIL import Image

from benchmarks.theory import plots
from benchmarks.theory.experiment import run_experiment
from benchmarks.theory.plots import plot_frequency, plot_plane, plot_scatter, plot_shifts, write_figures
from mixpool.filters.theory import expected_gap
from mixpool.selection.compare import PoolingStats

SHIFTS = (0.5, 1, 2)


def predictor(weight, stride, *, weight_imag):
    numbers = torch.linspace(0.1, 0.9, len(weight), dtype=torch.float64)
    return PoolingStats(*3 * [numbers], *3 * [numbers[None]])


@functools.cache
def made(depth):
    """As the real one; the noise differs from photos, the number of values does not."""
    torch.manual_seed(0)
    photos = torch.rand(2, 1, 96, 96)
    return run_experiment(photos, depth, shifts=SHIFTS, predict=predictor, draws=20).as_record("noise")


@pytest.fixture(params=[2, 3])
def record(request):
    return made(request.param)


@pytest.fixture
def shallow():
    """For what does not depend on the depth."""
    return made(2)


@pytest.fixture
def plain(record):
    """A record without prediction and without half a pixel."""
    fields = {name: value for name, value in record.items() if name not in ("predicted_gap", "predicted_change")}
    del fields["turned_gap_half"]
    return fields


def analytic(record):
    return np.array(record["is_analytic"])


def offsets(axes):
    """(points, 2) of each scatter of some axes."""
    return [collection.get_offsets().data for collection in axes.collections]


def assert_inside(figure):
    """No artist reaches beyond the picture."""
    figure.canvas.draw()
    box, size = figure.get_tightbbox(), figure.get_size_inches()
    assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= size[0] and box.y1 <= size[1]


def test_the_plane_shows_each_packet_at_its_frequency(record):
    figure = plot_plane(record)
    assert_inside(figure)
    count = 2 ** record["params"]["depth"]
    panels = [axes for axes in figure.axes if axes.get_title()]
    gamma, *measured = panels
    theory = gamma.images[0].get_array()
    assert theory[0, 0] == pytest.approx(math.sqrt(1.5) * 1, abs=0.01), "one phase alone at (pi, pi) m"
    fields = record["gap"], record["change_max"][0][1], record["change_blur1"][0][1]
    for axes, values in zip(measured, fields, strict=True):
        tiles = axes.images[0].get_array()
        assert tiles.shape == (2 * count, 2 * count)
        for (fy, fx), value, shown in zip(record["center_frequency"], values, record["is_analytic"], strict=True):
            row, column = (count + math.floor(f * count / math.pi) for f in (fy, fx))
            for y, x in ((row, column), (2 * count - 1 - row, 2 * count - 1 - column)):
                assert (
                    (tiles[y, x] == pytest.approx(value))
                    if shown
                    else np.ma.getmaskarray(tiles)[y, x] or np.isnan(tiles[y, x])
                )
        hatched = [patch for patch in axes.patches if isinstance(patch, Rectangle) and patch.get_hatch()]
        assert len(hatched) == 2 * (~analytic(record)).sum()
    points = np.concatenate(offsets(gamma))
    assert len(points) == 2 * analytic(record).sum()


def test_gamma_of_the_plane_is_the_theorys(record):
    image = plot_plane(record).axes[0].images[0].get_array()
    at = expected_gap((0.0, math.pi / 2), record["params"]["stride"])
    assert image[256, 384] == pytest.approx(at.item(), abs=1e-9)


def test_scatter_plots_hold_all_packets_and_their_correlation(record):
    figure = plot_scatter(record)
    assert_inside(figure)
    panels = [axes for axes in figure.axes if axes.get_xlabel()]
    assert len(panels) == 7
    kept, names = analytic(record), [" ".join(axes.get_xlabel().split()) for axes in panels]
    expected = {
        "gamma (theory)": (record["gamma"], record["gap"], "correlation_gamma_gap"),
        "measured gap": (record["gap"], record["change_max"][0][1], "correlation_gap_change"),
        "expected change (theory)": (
            record["expected_change"][0][1],
            record["change_max"][0][1],
            "correlation_expected_change",
        ),
        "gap predicted from the filter": (record["predicted_gap"], record["gap"], "correlation_predicted_gap"),
        "measured gap, turned by the advance of the phase": (
            record["turned_gap_half"],
            record["change_max"][0][0],
            "correlation_turned_gap_half",
        ),
    }
    for name, (x, y, summary) in expected.items():
        axes = panels[names.index(name)]
        others, dots = offsets(axes)
        np.testing.assert_allclose(dots, np.stack([x, y], axis=1)[kept])
        np.testing.assert_allclose(others, np.stack([x, y], axis=1)[~kept])
        value = record["summary"][summary]
        if value is None:
            assert record["params"]["depth"] == 2 and "no correlation" in axes.get_title()
        else:
            assert axes.get_title().startswith(f"r = {value:.2f}".replace("-", "−"))


def test_scatter_plots_without_prediction_and_half_a_pixel(plain):
    figure = plot_scatter(plain)
    assert_inside(figure)
    assert sum(bool(axes.get_xlabel()) for axes in figure.axes) == 4


def test_curves_are_means_over_the_analytic_packets(record):
    figure = plot_shifts(record)
    assert_inside(figure)
    assert [axes.get_title() for axes in figure.axes] == record["params"]["directions"]
    kept = analytic(record)
    for i, axes in enumerate(figure.axes):
        lines = {line.get_label(): line for line in axes.lines}
        for name, (label, *_) in plots.POOLINGS.items():
            expected = np.array(record[f"change_{name}"])[i][:, kept].mean(axis=1)
            np.testing.assert_allclose(lines[label].get_ydata(), [0, *expected])
            np.testing.assert_allclose(lines[label].get_xdata(), [0, *SHIFTS])
        np.testing.assert_allclose(lines["CMod, theory (bound α)"].get_ydata()[1:], record["bound"][i])


def test_frequency_and_orientation(record):
    figure = plot_frequency(record)
    assert_inside(figure)
    kept = analytic(record)
    theta = np.array(record["center_frequency"])[kept]
    for axes, values in zip(figure.axes, ("gap", "change", "gap", "change"), strict=True):
        points = offsets(axes)
        assert len(points) == (2 if values == "gap" else 4) and all(len(dots) == kept.sum() for dots in points)
    np.testing.assert_allclose(offsets(figure.axes[0])[1][:, 0], np.linalg.norm(theta, axis=1))
    degrees = offsets(figure.axes[2])[1][:, 0]
    assert ((degrees > 0) & (degrees < 180)).all()
    np.testing.assert_allclose(np.tan(np.radians(degrees)), theta[:, 0] / theta[:, 1])


@pytest.mark.slow
def test_files_are_small_named_by_depth_and_the_same_again(shallow, tmp_path, monkeypatch):
    before = copy.deepcopy(shallow)
    paths = write_figures(shallow, tmp_path)
    names = [f"theory-depth2-{name}.png" for name in ("plane", "scatter", "shifts", "frequency")]
    assert [path.name for path in paths] == names
    for path in paths:
        with Image.open(path) as image:
            assert image.format == "PNG" and image.width > 1200 and path.stat().st_size < 200_000
    assert shallow == before
    first = paths[2].read_bytes()
    monkeypatch.setattr(plots, "FIGURES", {"shifts": plot_shifts})
    assert [path.read_bytes() for path in write_figures(shallow, tmp_path)] == [first]


def test_a_packet_without_a_number_is_left_out(shallow):
    holed = copy.deepcopy(shallow)
    packet = holed["is_analytic"].index(True)
    for name in ("gap", "gap_theory_phases", "predicted_gap", "predicted_change", "turned_gap_half"):
        holed[name][packet] = None
    for name in ("change_max", "change_blur1", "change_blur3"):
        holed[name][0][1][packet] = None
    for draw in plots.FIGURES.values():
        assert_inside(draw(holed))
