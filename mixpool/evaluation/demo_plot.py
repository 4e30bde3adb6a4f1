"""The demonstration's picture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from matplotlib.figure import Figure
from torch import Tensor

from mixpool.evaluation.demo import POOLINGS, SHIFTS, DemoResult
from mixpool.figures import (
    MAX_COLOR,
    MODULUS_COLOR,
    MUTED,
    OTHER_COLORS,
    TEXT,
    blank_figure,
    image_axes,
    inch_axes,
    plain_axes,
)
from mixpool.selection.plot import filter_tiles

DEMO_WIDTH, DEMO_HEIGHT = 10.0, 4.8  # inches

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_demo(result: DemoResult, title: str, subtitle: str) -> Figure:
    """The README's first picture: a photo, a filter, two poolings before and after a shift by one pixel, the curves."""
    figure = blank_figure(DEMO_WIDTH, DEMO_HEIGHT)
    for text, y, style in (
        (title, DEMO_HEIGHT - 0.28, {"size": 13.5, "weight": "bold", **TEXT}),
        (subtitle, DEMO_HEIGHT - 0.58, {"size": 9, "color": MUTED}),
    ):
        figure.text(0.02, y / DEMO_HEIGHT, text, va="center", **style)
    _draw_input(figure, result.photo, result.kernel, result.channel)
    _draw_maps(figure, result.maps)
    _draw_curves(inch_axes(figure, 7.50, 0.52, 2.35, 2.93), result)
    return figure


def _draw_input(figure: Figure, photo: Tensor, kernel: Tensor, channel: int) -> None:
    axes = image_axes(figure, 0.20, 1.80, 1.93)
    axes.imshow(photo.permute(1, 2, 0).numpy(), interpolation="bilinear")
    axes.set_title("photo", size=10, pad=4, **TEXT)
    parts = filter_tiles(torch.stack([kernel.real, kernel.imag]))
    for left, tile, name in ((0.20, parts[0], "W"), (1.19, parts[1], "V")):
        axes = image_axes(figure, left, 0.52, 0.94)
        axes.imshow(tile, interpolation="nearest")
        axes.set_xlabel(name, size=10, style="italic", labelpad=3, **TEXT)
    figure.text(0.02, 1.58 / DEMO_HEIGHT, f"filter {channel}: W + iV", size=10, va="center", **TEXT)


def _draw_maps(figure: Figure, maps: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    side, step, left = 1.46, 1.52, 2.55
    bottoms = (2.27, 0.52)
    for (name, (before, after)), bottom, color in zip(maps.items(), bottoms, (MAX_COLOR, MODULUS_COLOR), strict=True):
        # One scale per pooling: a mean is smaller than a maximum, and the change is counted in the map's own spread.
        low, top = (float(torch.quantile(before, share)) for share in (0.02, 0.995))
        change = float((after - before).square().mean().sqrt() / before.std(correction=0))
        for i, map_ in enumerate((before - low, after - low, (after - before).abs())):
            axes = image_axes(figure, left + i * step, bottom, side, color if i == 2 else "#BBBBBB")
            axes.imshow(map_.numpy(), cmap="magma", vmin=0, vmax=top - low, interpolation="nearest")
            if bottom == bottoms[0]:
                axes.set_title(("photo as it is", "moved by 1 px", "|difference|")[i], size=10, pad=4, **TEXT)
        axes.set_xlabel(f"change {change:.2f}", size=9.5, weight="bold", color=color, labelpad=3)
        style = {"rotation": 90, "ha": "center", "va": "center", "size": 11, "weight": "bold"}
        figure.text((left - 0.14) / DEMO_WIDTH, (bottom + side / 2) / DEMO_HEIGHT, name, color=color, **style)


def _draw_curves(axes: Axes, result: DemoResult) -> None:
    others = iter(OTHER_COLORS)
    fixed = {"max pooling": MAX_COLOR, "mixpool": MODULUS_COLOR}
    markers = iter("s^Do")
    for name in POOLINGS:
        color = fixed.get(name) or next(others)
        width = 2.6 if name == "mixpool" else 1.5
        style = {"color": color, "lw": width, "marker": next(markers, "o"), "ms": 3.8, "clip_on": False}
        axes.plot([0, *SHIFTS], [0, *result.mean_change(name)], label=name, **style)
    axes.set(xlim=(0, max(SHIFTS) + 0.15), ylim=(0, None), xticks=[0, *SHIFTS])
    axes.set_xlabel("shift (px)", size=9.5, labelpad=2)
    axes.set_title(f"change, mean of {result.report.num_complex} channels", size=10, pad=18, **TEXT)
    axes.text(0.5, 1.025, "rms change / std, all photos", transform=axes.transAxes, ha="center", size=8.5, color=MUTED)
    plain_axes(axes)
    axes.legend(loc="lower right", fontsize=9, frameon=False, labelspacing=0.35, borderaxespad=0.1, handlelength=1.6)
