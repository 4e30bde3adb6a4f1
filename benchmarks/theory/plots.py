"""Figures of the theory's experiment, drawn from one record of it (`Experiment.as_record`) and from nothing else.

Each function takes a record, as a dict, and returns a matplotlib Figure; `write_figures` writes them all. Packets are
drawn where the frequency of their waves lies, y down, and at the mirror image of that point, which is the same packet
conjugated: both of its poolings are the same. Only gamma's map is computed here, by the theory's closed form.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from benchmarks.theory.closed_forms import frequency_map
from mixpool.figures import MAX_COLOR, MODULUS_COLOR, MUTED, OTHER_COLORS, TEXT, blank_figure, inch_axes, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

Record = Mapping[str, Any]

# The poolings in the colours of the demo's picture: RMax, CMod as the paper has it, CMod as mixpool pools.
POOLINGS = {
    "max": ("RMax (max pooling)", MAX_COLOR, "s"),
    "blur1": ("CMod, centre (paper)", OTHER_COLORS[1], "^"),
    "blur3": ("CMod, mean (mixpool)", MODULUS_COLOR, "o"),
}
COLORS = "magma"
DPI = 140
HATCHED = {"facecolor": "#EFEFEF", "edgecolor": "#C4C4C4", "hatch": "/////", "linewidth": 0}
HALF_TURNS = ([-math.pi, -math.pi / 2, 0, math.pi / 2, math.pi], ["−π", "−π/2", "0", "π/2", "π"])


def write_figures(record: Record, folder: str | Path, prefix: str = "theory") -> list[Path]:
    """All figures of a record as PREFIX-depthJ-NAME.png in a folder; returns the paths.

    Raises:
        OSError: a file cannot be written.
    """
    depth = record["params"]["depth"]
    paths = []
    for name, draw in FIGURES.items():
        path = save_figure(draw(record), Path(folder) / f"{prefix}-depth{depth}-{name}.png", dpi=DPI)
        with Image.open(path) as image:  # 256 colours are enough, and a third of the bytes
            image = image.convert("RGB").quantize(256, dither=Image.Dither.NONE)
        image.save(path, optimize=True)
        paths.append(path)
    return paths


# --- the frequency plane ----------------------------------------------------------------------------------------------


def plot_plane(record: Record) -> Figure:
    """Gamma over the whole plane beside the measured gap, and both instabilities, one tile per packet."""
    figure = blank_figure(10.0, 9.55)
    stride = record["params"]["stride"]
    _titles(
        figure,
        "Where the two poolings differ, and where they move",
        f"{_subject(record)} A tile is a packet's square of the plane; hatched: not analytic along one axis or both.",
    )
    row = _reference_row(record)
    gap_scale = Normalize(0, max(0.8, _ceiling(record, "gap")))
    change_scale = Normalize(0, max(0.8, _ceiling(record, "change_max")))
    places = {(0, 0): (0.62, 4.86), (0, 1): (5.32, 4.86), (1, 0): (0.62, 0.62), (1, 1): (5.32, 0.62)}

    axes = _plane_axes(figure, *places[0, 0], f"theory: gamma at stride {stride}")
    gamma = frequency_map(stride, record["params"]["window"], size=513)
    image = axes.imshow(
        gamma.expected_gap.numpy(),
        extent=(-math.pi, math.pi, math.pi, -math.pi),
        cmap=COLORS,
        norm=gap_scale,
        interpolation="bilinear",
    )
    _draw_centers(axes, record)
    axes.set_ylabel("vertical frequency (rad/px), down", size=9)
    _color_bar(figure, image, axes, "expected gap of a pure wave", extend="max")

    panels = (
        (places[0, 1], record["gap"], gap_scale, "measured gap", "||RMax − CMod|| / ||CMod||"),
        (places[1, 0], row("change_max"), change_scale, "RMax, photo moved by 1 px to the side", "relative change"),
        (places[1, 1], row("change_blur1"), change_scale, "CMod (centre), the same", "relative change"),
    )
    for place, values, scale, title, label in panels:
        axes = _plane_axes(figure, *place, title)
        image = _draw_tiles(axes, record, values, scale)
        _color_bar(figure, image, axes, label)
        if place[0] < 1:
            axes.set_ylabel("vertical frequency (rad/px), down", size=9)
        if place[1] < 1:
            axes.set_xlabel("horizontal frequency (rad/px)", size=9)
    return figure


def _plane_axes(figure: Figure, left: float, bottom: float, title: str) -> Axes:
    axes = inch_axes(figure, left, bottom, 3.6, 3.6)
    axes.set(xlim=(-math.pi, math.pi), ylim=(math.pi, -math.pi), xticks=HALF_TURNS[0], yticks=HALF_TURNS[0])
    axes.set_xticklabels(HALF_TURNS[1])
    axes.set_yticklabels(HALF_TURNS[1])
    axes.set_title(title, size=10.5, pad=5, **TEXT)
    axes.tick_params(labelsize=8.5, length=2, color=MUTED)
    for spine in axes.spines.values():
        spine.set(edgecolor="#888888", linewidth=0.8)
    return axes


def _draw_tiles(axes: Axes, record: Record, values: list[float], scale: Normalize) -> AxesImage:
    """Analytic packets in colour and the others hatched, in the square of the plane that each of them fills."""
    count = 2 ** record["params"]["depth"]
    side = math.pi / count
    plane = np.full((2 * count, 2 * count), np.nan)
    for (fy, fx), value, is_analytic in zip(record["center_frequency"], values, record["is_analytic"], strict=True):
        row, column = count + int(fy // side), count + int(fx // side)
        mirror = 2 * count - 1 - row, 2 * count - 1 - column
        if is_analytic:
            plane[row, column] = plane[mirror] = np.nan if value is None else value
        else:
            for y, x in ((row, column), mirror):
                axes.add_patch(Rectangle(((x - count) * side, (y - count) * side), side, side, zorder=2, **HATCHED))
    extent = (-math.pi, math.pi, math.pi, -math.pi)
    return axes.imshow(plane, extent=extent, cmap=COLORS, norm=scale, interpolation="nearest", zorder=1)


def _draw_centers(axes: Axes, record: Record) -> None:
    centers = _array(record["center_frequency"])[_analytic(record)]
    for sign in (1, -1):
        axes.scatter(sign * centers[:, 1], sign * centers[:, 0], s=7, c="white", edgecolors="black", linewidths=0.4)
    axes.set(xlim=(-math.pi, math.pi), ylim=(math.pi, -math.pi))


def _color_bar(figure: Figure, image: AxesImage, axes: Axes, label: str, extend: str = "neither") -> None:
    box = axes.get_position()
    width = figure.get_figwidth()
    bar_axes = figure.add_axes((box.x1 + 0.10 / width, box.y0, 0.13 / width, box.height))
    bar = figure.colorbar(image, cax=bar_axes, extend=extend, extendfrac=0.03)
    bar.ax.tick_params(labelsize=8.5, length=2, color=MUTED)
    bar.outline.set(edgecolor="#888888", linewidth=0.8)
    bar.set_label(label, size=8.5, labelpad=3)


# --- scatter plots ----------------------------------------------------------------------------------------------------


def plot_scatter(record: Record) -> Figure:
    """What is expected against what is measured, a point per packet, with correlations: first the gap, then RMax."""
    row = _reference_row(record)
    gap, change = ("measured gap", record["gap"]), ("change of RMax, 1 px", row("change_max"))
    upper = [
        ("gamma (theory)", record["gamma"], gap, "correlation_gamma_gap"),
        (
            "gap of the theory's phases,\nthe photos' modulus",
            record["gap_theory_phases"],
            gap,
            "correlation_theory_phases_gap",
        ),
    ]
    lower = [
        ("expected change (theory)", row("expected_change"), change, "correlation_expected_change"),
        ("measured gap", record["gap"], change, "correlation_gap_change"),
    ]
    if "turned_gap_half" in record:
        half = "change of RMax, 0.5 px", _reference_row(record, 0.5)("change_max")
        lower.append(
            (
                "measured gap, turned by the\nadvance of the phase",
                record["turned_gap_half"],
                half,
                "correlation_turned_gap_half",
            )
        )
    if "predicted_gap" in record:
        upper.append(("gap predicted\nfrom the filter", record["predicted_gap"], gap, "correlation_predicted_gap"))
        predicted = "change predicted\nfrom the filter", record["predicted_change"]
        lower.append((*predicted, change, "correlation_predicted_change"))

    columns = 1 + len(upper)  # the first row ends with the legend
    side, gap_x, gap_y = 2.5, 0.72, 1.02
    width, height = 0.12 + columns * (side + gap_x), 2 * (side + gap_y) + 0.68
    figure = blank_figure(width, height)
    _titles(figure, "What the theory expects of each packet, and what photos say", _subject(record))
    for i, panels in enumerate((upper, lower)):
        for j, (x_label, x, (y_label, y), name) in enumerate(panels):
            left, bottom = 0.62 + j * (side + gap_x), 0.66 + (1 - i) * (side + gap_y)
            axes = inch_axes(figure, left, bottom, side, side)
            points = _draw_points(axes, record, x, y)
            axes.set_xlabel(x_label, size=9, labelpad=2)
            axes.set_ylabel(y_label, size=9, labelpad=2)
            axes.set_title(_correlation_text(record, name), size=9, pad=5, **TEXT)
    _scatter_legend(figure, record, points, 0.62 + (columns - 1) * (side + gap_x), 0.66 + side + gap_y)
    return figure


def _scatter_legend(figure: Figure, record: Record, points: Any, left: float, bottom: float) -> None:
    """Beside the first row, in inches: what dots, colours, crosses, lines and numbers mean."""
    width, height = figure.get_size_inches()
    lines = [
        f"dot: one of {record['num_analytic']} analytic packets",
        "cross: not analytic, not counted",
        "dashed: equal",
        "r: correlation (95 % interval over photos)",
    ]
    if record["num_crowded"]:
        lines.append(f"without the {record['num_crowded']}: those whose phases")
        lines.append(f"   pile up, gamma > {record['params']['crowded_gamma']:g}")
    for i, line in enumerate(lines):
        figure.text((left - 0.1) / width, (bottom + 2.4 - 0.22 * i) / height, line, size=8.8, va="center", **TEXT)
    bar = figure.colorbar(
        points, cax=inch_axes(figure, left - 0.05, bottom + 0.45, 2.2, 0.13), orientation="horizontal"
    )
    bar.ax.tick_params(labelsize=8.5, length=2, color=MUTED)
    bar.outline.set_visible(False)
    bar.ax.set_title("frequency |θ| (rad/px)", size=8.8, loc="left", pad=4, **TEXT)


def _draw_points(axes: Axes, record: Record, x: list[float], y: list[float]) -> Any:
    kept, x, y = _analytic(record), _array(x), _array(y)
    frequency = np.linalg.norm(_array(record["center_frequency"]), axis=1)
    axes.scatter(x[~kept], y[~kept], s=14, c="#BBBBBB", marker="x", linewidths=0.8, zorder=2)
    points = axes.scatter(
        x[kept],
        y[kept],
        s=24,
        c=frequency[kept],
        cmap="viridis",
        vmin=0,
        vmax=math.pi * math.sqrt(2),
        edgecolors="white",
        linewidths=0.5,
        zorder=3,
    )
    top = 1.06 * float(np.nanmax(np.concatenate([x, y]), initial=1e-3))
    axes.plot([0, top], [0, top], color="#999999", lw=0.8, ls="--", zorder=1)
    axes.set(xlim=(0, top), ylim=(0, top))
    _plain_axes(axes, "both")
    return points


def _correlation_text(record: Record, name: str) -> str:
    """r with its interval, over how many packets; and what is left of it without those whose phases pile up."""
    summary, interval = record["summary"], record["ci95"].get(name)
    if summary[name] is None:
        return "no correlation: one of them is constant"
    text = f"r = {_number(summary[name])}"
    if interval is not None and None not in interval:
        text += f" ({_number(interval[0])} to {_number(interval[1])})"
    if record["num_crowded"] and f"{name}_spread" in summary:
        text += f"; {_number(summary[f'{name}_spread'])} without the {record['num_crowded']}"
    return text


# --- shifts -----------------------------------------------------------------------------------------------------------


def plot_shifts(record: Record) -> Figure:
    """Instability of all poolings against the shift, in each direction, with what the theory says of it."""
    params = record["params"]
    directions, shifts, kept = params["directions"], params["shifts"], _analytic(record)
    figure = blank_figure(10.6, 4.9)
    _titles(
        figure,
        "How much the pooled maps change when the photo moves",
        f"{_subject(record)} Lines: mean of {kept.sum()} analytic packets; bands: 10th to 90th percentile.",
    )
    curves = {name: _array(record[f"change_{name}"])[:, :, kept] for name in POOLINGS}
    top = 1.06 * max(float(np.nanquantile(values, 0.9, axis=2).max()) for values in curves.values())
    width = 3.0
    for i, direction in enumerate(directions):
        axes = inch_axes(figure, 0.62 + i * (width + 0.28), 1.05, width, 2.85)
        for name, (label, color, marker) in POOLINGS.items():
            values = np.concatenate([np.zeros((1, kept.sum())), curves[name][i]])  # nothing moves at 0 px
            ends = np.nanquantile(values, (0.1, 0.9), axis=1)
            at = [0, *shifts]
            axes.fill_between(at, *ends, color=color, alpha=0.13, linewidth=0)
            axes.plot(at, np.nanmean(values, axis=1), color=color, marker=marker, ms=4, lw=1.9, label=label)
        expected = np.nanmean(_array(record["expected_change"])[i][:, kept], axis=1)
        axes.plot([0, *shifts], [0, *expected], color=MAX_COLOR, lw=1.2, ls=":", label="RMax, theory (pure wave)")
        axes.plot([0, *shifts], [0, *record["bound"][i]], color=MUTED, lw=1.2, ls="--", label="CMod, theory (bound α)")
        axes.set(xlim=(0, 1.03 * max(shifts)), ylim=(0, top))
        ticks = [0, *(shift for shift in shifts if shift == int(shift))]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_title(direction, size=10.5, pad=5, **TEXT)
        axes.set_xlabel("shift (px along each axis)" if direction == "diagonal" else "shift (px)", size=9, labelpad=2)
        if i == 0:
            axes.set_ylabel("||X(moved) − X|| / ||X||", size=9)
        else:
            axes.set_yticklabels([])
        for multiple in range(params["stride"], math.floor(max(shifts)) + 1, params["stride"]):
            axes.axvline(multiple, color="#DADADA", lw=0.8, zorder=0)
        _plain_axes(axes, "y")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="lower center", ncols=5, frameon=False, fontsize=8.8, bbox_to_anchor=(0.5, 0.055)
    )
    note = f"gray verticals: multiples of the convolution's stride of {params['stride']} px"
    figure.text(0.5, 0.025, note, size=8, color=MUTED, ha="center")
    return figure


# --- frequency and orientation ----------------------------------------------------------------------------------------


def plot_frequency(record: Record) -> Figure:
    """Gap and instabilities of each analytic packet against its frequency and against its orientation."""
    kept, row = _analytic(record), _reference_row(record)
    theta = _array(record["center_frequency"])[kept]
    orientation = np.degrees(np.arctan2(theta[:, 0], theta[:, 1])) % 180
    figure = blank_figure(10.0, 7.3)
    _titles(
        figure,
        "Gap and change against frequency and orientation",
        f"{_subject(record)} {kept.sum()} analytic packets.",
    )
    gray = {"facecolors": "none", "edgecolors": MUTED, "linewidths": 0.9, "s": 22, "marker": "D"}
    changes = {name: _array(row(f"change_{name}"))[kept] for name in POOLINGS}
    abscissas = (np.linalg.norm(theta, axis=1), "frequency |θ| (rad/px)"), (orientation, "orientation (degrees)")
    for j, (x, x_label) in enumerate(abscissas):
        upper = inch_axes(figure, 0.72 + j * 4.72, 3.97, 4.3, 2.35)
        upper.scatter(x, _array(record["gamma"])[kept], label="gamma (theory)", **gray)
        upper.scatter(x, _array(record["gap"])[kept], s=22, c="black", label="measured gap", linewidths=0)
        lower = inch_axes(figure, 0.72 + j * 4.72, 0.95, 4.3, 2.35)
        lower.scatter(x, _array(row("expected_change"))[kept], label="RMax, theory (pure wave)", **gray)
        for name, (label, color, marker) in POOLINGS.items():
            lower.scatter(x, changes[name], s=20, c=color, marker=marker, label=label, linewidths=0)
        for axes in (upper, lower):
            axes.set_ylim(bottom=0)
            axes.set_xlabel(x_label, size=9, labelpad=2)
            axes.set_xlim((0, math.pi * math.sqrt(2)) if j == 0 else (0, 180))
            if j == 1:
                axes.set_xticks(range(0, 181, 45))
            _plain_axes(axes, "both")
        if j == 0:
            upper.set_ylabel("gap", size=9)
            lower.set_ylabel("relative change, 1 px to the side", size=9)
    for axes, bottom in zip(figure.axes[:2], (0.515, 0.045), strict=True):
        handles, labels = axes.get_legend_handles_labels()
        anchor = {"loc": "center", "bbox_to_anchor": (0.5, bottom if axes is figure.axes[1] else 0.893)}
        figure.legend(handles, labels, ncols=4, frameon=False, fontsize=9, handletextpad=0.2, **anchor)
    return figure


FIGURES = {"plane": plot_plane, "scatter": plot_scatter, "shifts": plot_shifts, "frequency": plot_frequency}


# --- parts of the figures ---------------------------------------------------------------------------------------------


def _titles(figure: Figure, title: str, subtitle: str) -> None:
    height = figure.get_figheight()
    figure.text(0.02, 1 - 0.28 / height, title, size=13, weight="bold", va="center", **TEXT)
    figure.text(0.02, 1 - 0.56 / height, subtitle, size=9, va="center", color=MUTED)


def _subject(record: Record) -> str:
    params = record["params"]
    return f"DT-CWPT depth {params['depth']}, stride {params['stride']}, {record['num_photos']} photos."


def _plain_axes(axes: Axes, grid: str) -> None:
    axes.grid(axis=grid, color="#E8E8E8", lw=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8.5, length=2, color=MUTED)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _reference_row(record: Record, shift: float = 1) -> Callable[[str], list[float]]:
    """Function from the name of a (D, S, n) field to its row for a shift to the side."""
    params = record["params"]
    i, j = params["directions"].index("horizontal"), params["shifts"].index(shift)
    return lambda name: record[name][i][j]


def _ceiling(record: Record, name: str) -> float:
    """The largest value of the analytic packets, at one pixel to the side; 0 if there is none."""
    values = record[name] if np.ndim(record[name]) == 1 else _reference_row(record)(name)
    return float(np.nanmax(_array(values)[_analytic(record)], initial=0))


def _analytic(record: Record) -> np.ndarray:
    return np.array(record["is_analytic"], dtype=bool)


def _array(values: Any) -> np.ndarray:
    """None becomes NaN."""
    return np.array(values, dtype=float)


def _number(value: float) -> str:
    return f"{value:.2f}".replace("-", "−")
