"""Figures: their colours, axes placed in inches, and how they are saved."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, which stay apart in every kind of colour blindness.
MODULUS_COLOR = "#0072B2"
MAX_COLOR = "#D55E00"
OTHER_COLORS = ("#E69F00", "#009E73", "#CC79A7", "#56B4E9")
MUTED = "#5A5A5A"
TEXT = {"color": "#222222"}


def save_figure(figure: Figure, path: str | Path, dpi: int = 160) -> Path:
    """Write a figure, as PNG where `path` has no suffix, and return its path; ValueError for an unknown format."""
    path = Path(path)
    path = path if path.suffix else path.with_suffix(".png")
    if path.suffix[1:].lower() not in figure.canvas.get_supported_filetypes():
        raise ValueError(f"expected a picture named *.png, *.pdf or *.svg, got {path}")
    figure.savefig(path, dpi=dpi)
    return path


def blank_figure(width: float, height: float) -> Figure:
    """An empty white figure, inches; it draws without a window."""
    figure = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def inch_axes(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    """Axes placed in inches."""
    total_width, total_height = figure.get_size_inches()
    return figure.add_axes((left / total_width, bottom / total_height, width / total_width, height / total_height))


def image_axes(figure: Figure, left: float, bottom: float, side: float, frame: str = "#BBBBBB") -> Axes:
    """Square axes without ticks, in inches."""
    axes = inch_axes(figure, left, bottom, side, side)
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(edgecolor=frame, linewidth=1.0)
    return axes


def plain_axes(axes: Axes) -> None:
    """The look of a panel of curves: small ticks, a pale grid across, no frame above and to the right."""
    axes.tick_params(labelsize=8.5, length=2, color=MUTED)
    axes.grid(axis="y", color="#E4E4E4", lw=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
