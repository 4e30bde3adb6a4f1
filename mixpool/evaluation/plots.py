"""Figures of evaluations, several models side by side, drawn from their records and from nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure

from mixpool.evaluation.result import METRICS
from mixpool.evaluation.shifts import DIRECTIONS
from mixpool.figures import (
    MAX_COLOR,
    MODULUS_COLOR,
    MUTED,
    OTHER_COLORS,
    TEXT,
    blank_figure,
    inch_axes,
    plain_axes,
    save_figure,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Record = Mapping[str, Any]

COLORS = (MAX_COLOR, MODULUS_COLOR, *OTHER_COLORS)
MARKERS = "so^Dvp"
TITLES = {
    "flip_probability": "How often the class changes between crops some pixels apart",
    "kl": "Divergence of the outputs from those of the crop that has not moved",
    "stem_change": "How much the stem's output changes",
}
Y_LABELS = {"%": "flips (%)", "nats": "KL divergence (nats)", "std": "rms change / std"}
DIRECTION_NAMES = {"horizontal": "to the side", "vertical": "down", "diagonal": "along both axes"}
WIDTH, HEIGHT = 10.2, 3.6  # inches, without the legend
LEGEND_ROW, LEGEND_LETTERS = 0.2, 130  # inches, and what fits beside each other


def plot_curves(found: Sequence[Record], metric: str) -> Figure:
    """A curve of `TITLES` over the shift: a panel per direction, a line per model with its 95 % interval over images.

    ValueError if none of the records has it.
    """
    found = [record for record in found if metric in record["summary"]]
    if metric not in TITLES or not found:
        raise ValueError(f"expected records with a curve out of {', '.join(TITLES)}, found none of {metric!r}")
    columns = max(1, min(4, len(found), LEGEND_LETTERS // (8 + max(len(record["model"]) for record in found))))
    legend_height = LEGEND_ROW * math.ceil(len(found) / columns)
    height = HEIGHT + legend_height
    figure = blank_figure(WIDTH, height)
    figure.text(0.2 / WIDTH, 1 - 0.3 / height, TITLES[metric], size=12.5, weight="bold", va="center", **TEXT)
    counts = sorted({record["num_images"] for record in found})
    images = f"{counts[0]} images" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} images"
    note = f"{images}; bands: 95 % bootstrap intervals over images; lower is steadier"
    figure.text(0.2 / WIDTH, 1 - 0.57 / height, note, size=9, va="center", color=MUTED)
    panels: list[Axes] = []
    for column, direction in enumerate(DIRECTIONS):
        axes = inch_axes(figure, 0.75 + 3.15 * column, 0.6 + legend_height, 2.9, 2.05)
        for number, record in enumerate(found):
            _draw_curve(axes, record, metric, direction, number)
        _style(axes, direction, METRICS[metric].axes[1])
        panels.append(axes)
    top = max(axes.get_ylim()[1] for axes in panels)
    for axes in panels:
        axes.set_ylim(0, top)
    for axes in panels[1:]:
        axes.tick_params(labelleft=False)
    panels[0].set_ylabel(Y_LABELS[METRICS[metric].unit], size=9.5)
    handles, labels = panels[0].get_legend_handles_labels()
    style = {"frameon": False, "fontsize": 9, "handlelength": 1.8, "labelspacing": 0.3}
    figure.legend(handles, labels, loc="lower center", ncols=columns, **style)
    return figure


def write_figures(found: Sequence[Record], folder: str | Path, prefix: str = "evaluation") -> list[Path]:
    """A figure per curve that any of the records has, as PREFIX-NAME.png in a folder; returns the paths."""
    present = [metric for metric in TITLES if any(metric in record["summary"] for record in found)]
    return [
        save_figure(plot_curves(found, metric), Path(folder) / f"{prefix}-{metric.replace('_', '-')}.png")
        for metric in present
    ]


def _draw_curve(axes: Axes, record: Record, metric: str, direction: str, number: int) -> None:
    curve, ends = record["summary"][metric][direction], record["ci95"][metric][direction]
    shifts = [float(shift) for shift in curve]
    low, high = zip(*ends.values(), strict=True)
    color, marker = COLORS[number % len(COLORS)], MARKERS[number % len(MARKERS)]
    # With more models than colours the line tells them apart.
    line = ("-", "--", ":", "-.")[number // len(COLORS) % 4]
    axes.fill_between(shifts, low, high, color=color, alpha=0.15, linewidth=0)
    axes.plot(shifts, list(curve.values()), color=color, ls=line, marker=marker, ms=3.6, lw=1.7, label=record["model"])


def _style(axes: Axes, direction: str, shifts: Sequence[str]) -> None:
    last = max(float(shift) for shift in shifts)
    axes.set(xlim=(0, last * 1.02), xticks=range(int(last) + 1))
    axes.set_title(DIRECTION_NAMES[direction], size=10, pad=5, **TEXT)
    axes.set_xlabel("shift (px)", size=9.5, labelpad=2)
    plain_axes(axes)
