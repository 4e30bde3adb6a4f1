"""Figures of filter banks and of the demo. They take data, return a matplotlib Figure, and never run a model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse, Rectangle
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from mixpool.plan import ChannelPlan
    from mixpool.report import ConversionReport

# Okabe and Ito's colours, which stay apart in every kind of colour blindness.
MODULUS_COLOR = "#0072B2"
MAX_COLOR = "#D55E00"
OTHER_COLORS = ("#E69F00", "#009E73", "#CC79A7", "#56B4E9")
MUTED = "#5A5A5A"
TEXT = {"color": "#222222"}
DEMO_WIDTH, DEMO_HEIGHT = 10.0, 4.8  # inches


# --- the filter bank --------------------------------------------------------------------------------------------------


def plot_filter_bank(weight: Tensor, report: ConversionReport | ChannelPlan) -> Figure:
    """All filters, those on modulus pooling framed in blue, beside their centre frequencies in the frequency plane.

    Args:
        weight: (C, I, kH, kW) of the stem's convolution. RGB filters are drawn in colour, zero is mid-gray; with
            another number of inputs the strongest spatial pattern of the filter is drawn in gray.
        report: what `convert` returned, or its plan.
    Raises:
        ValueError: the number of filters is not that of the plan.
    """
    plan = getattr(report, "plan", report)
    if weight.ndim != 4 or len(weight) != len(plan.kinds):
        raise ValueError(f"expected a weight of {len(plan.kinds)} filters, got {tuple(weight.shape)}")
    columns = math.ceil(math.sqrt(len(weight)))
    rows = math.ceil(len(weight) / columns)
    figure = blank_figure(10.0, 5.0)
    figure.text(0.025, 0.95, "Filters of the stem; blue frame: modulus pooling", size=12, weight="bold", **TEXT)
    figure.text(0.555, 0.95, "Where they lie in the frequency plane", size=12, weight="bold", **TEXT)
    bank = figure.add_axes((0.025, 0.04, 0.47, 0.88))
    _draw_bank(bank, weight, plan.is_modulus, rows, columns)
    _draw_frequency_plane(figure.add_axes((0.60, 0.165, 0.36, 0.69)), plan)
    return figure


def _draw_bank(axes: Axes, weight: Tensor, is_modulus: Sequence[bool], rows: int, columns: int) -> None:
    """One tile per filter in the order of the channels, row by row."""
    axes.set(xlim=(0, columns), ylim=(rows, 0), aspect="equal", anchor="NW")
    axes.axis("off")
    margin = 0.12
    for channel, (tile, modulus) in enumerate(zip(_tiles(weight), is_modulus, strict=True)):
        row, column = divmod(channel, columns)
        left, right, top, bottom = column + margin, column + 1 - margin, row + margin, row + 1 - margin
        axes.imshow(tile, extent=(left, right, bottom, top), interpolation="nearest", zorder=1)
        frame = (
            {"edgecolor": MODULUS_COLOR, "linewidth": 2.6} if modulus else {"edgecolor": "#BBBBBB", "linewidth": 0.6}
        )
        axes.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, zorder=2, **frame))
    axes.set(xlim=(0, columns), ylim=(rows, 0))


def _tiles(weight: Tensor) -> np.ndarray:
    """(C, kH, kW, 3) in [0, 1], 0.5 where the filter is zero."""
    weight = weight.detach().to("cpu", torch.float64)
    if weight.shape[1] != 3:
        # The first right singular vector of (I, kH kW): the pattern that most inputs share, up to its sign.
        _, _, patterns = torch.linalg.svd(weight.flatten(2), full_matrices=False)
        weight = patterns[:, :1].reshape(len(weight), 1, *weight.shape[2:]).expand(-1, 3, -1, -1)
    peak = weight.abs().amax(dim=(1, 2, 3), keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    return (0.5 + 0.5 * weight / peak).permute(0, 2, 3, 1).numpy()


def _draw_frequency_plane(axes: Axes, plan: ChannelPlan) -> None:
    """Centre frequencies, solid in the half plane they are given in and faint at their mirror image."""
    stats = plan.stats
    fy, fx = stats.center_frequency.unbind(dim=1)
    is_modulus = torch.tensor(plan.is_modulus)
    axes.add_patch(Rectangle((-math.pi, -math.pi), 2 * math.pi, 2 * math.pi, facecolor="#F5F5F5", edgecolor="#888888"))
    stride_y, stride_x = stats.stride
    axes.add_patch(Ellipse((0, 0), math.pi / stride_x, math.pi / stride_y, fc="white", ec=MUTED, ls="--"))
    for chosen, color, marker, label in (
        (~is_modulus, MAX_COLOR, "s", "max pooling"),
        (is_modulus, MODULUS_COLOR, "o", "modulus"),
    ):
        axes.scatter(-fx[chosen], -fy[chosen], s=16, c=color, marker=marker, alpha=0.22, linewidths=0, zorder=2)
        label = f"{label}: {int(chosen.sum())} channels"
        style = {"edgecolors": "white", "linewidths": 0.5, "zorder": 3}
        axes.scatter(fx[chosen], fy[chosen], s=34, c=color, marker=marker, label=label, **style)
    ticks = [-math.pi, -math.pi / 2, 0, math.pi / 2, math.pi]
    names = ["−π", "−π/2", "0", "π/2", "π"]
    limits = (-1.06 * math.pi, 1.06 * math.pi)
    axes.set(xlim=limits, ylim=limits[::-1], aspect="equal", xticks=ticks, yticks=ticks)
    axes.set_xticklabels(names)
    axes.set_yticklabels(names)
    axes.set_xlabel("horizontal frequency fx (rad/px)", size=9)
    axes.set_ylabel("vertical frequency fy (rad/px), down", size=9)
    axes.tick_params(labelsize=9, length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    note = "dashed: a quarter wave per step of the convolution; square: Nyquist; faint: mirror images"
    axes.text(0.5, -0.205, note, transform=axes.transAxes, ha="center", size=7.5, color=MUTED)
    axes.legend(loc="lower center", bbox_to_anchor=(0.46, 0.965), ncols=2, frameon=False, fontsize=9, handletextpad=0.1)


# --- the demo ---------------------------------------------------------------------------------------------------------


def plot_demo(
    photo: Tensor,
    kernel: Tensor,
    maps: Mapping[str, tuple[Tensor, Tensor]],
    curves: Mapping[str, Sequence[float]],
    shifts: Sequence[int],
    *,
    title: str,
    subtitle: str,
    channel: int,
    num_swapped: int,
) -> Figure:
    """The picture at the top of the README: one photo, one filter, two poolings before and after one pixel, the curves.

    Args:
        photo: (3, H, W) in [0, 1].
        kernel: (I, kH, kW) complex kernel W + iV of the channel that is shown.
        maps: two poolings, max pooling first: name -> (map of the photo, map of the photo moved by one pixel), each
            (H_out, W_out).
        curves: pooling -> change at each shift; "mixpool" is drawn strongest.
        shifts: pixels, one per value of a curve.
        title, subtitle: lines on top.
        channel: number of the channel that is shown.
        num_swapped: how many channels the curves average over.
    """
    figure = blank_figure(DEMO_WIDTH, DEMO_HEIGHT)
    for text, y, style in (
        (title, DEMO_HEIGHT - 0.28, {"size": 13.5, "weight": "bold", **TEXT}),
        (subtitle, DEMO_HEIGHT - 0.58, {"size": 9, "color": MUTED}),
    ):
        figure.text(0.02, y / DEMO_HEIGHT, text, va="center", **style)
    _draw_input(figure, photo, kernel, channel)
    _draw_maps(figure, maps)
    _draw_curves(inch_axes(figure, 7.50, 0.52, 2.35, 2.93), curves, shifts, num_swapped)
    return figure


def _draw_input(figure: Figure, photo: Tensor, kernel: Tensor, channel: int) -> None:
    axes = _image_axes(figure, 0.20, 1.80, 1.93)
    axes.imshow(photo.permute(1, 2, 0).numpy(), interpolation="bilinear")
    axes.set_title("photo", size=10, pad=4, **TEXT)
    parts = _tiles(torch.stack([kernel.real, kernel.imag]))
    for left, tile, name in ((0.20, parts[0], "W"), (1.19, parts[1], "V")):
        axes = _image_axes(figure, left, 0.52, 0.94)
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
            axes = _image_axes(figure, left + i * step, bottom, side, color if i == 2 else "#BBBBBB")
            axes.imshow(map_.numpy(), cmap="magma", vmin=0, vmax=top - low, interpolation="nearest")
            if bottom == bottoms[0]:
                axes.set_title(("photo as it is", "moved by 1 px", "|difference|")[i], size=10, pad=4, **TEXT)
        axes.set_xlabel(f"change {change:.2f}", size=9.5, weight="bold", color=color, labelpad=3)
        style = {"rotation": 90, "ha": "center", "va": "center", "size": 11, "weight": "bold"}
        figure.text((left - 0.14) / DEMO_WIDTH, (bottom + side / 2) / DEMO_HEIGHT, name, color=color, **style)


def _draw_curves(axes: Axes, curves: Mapping[str, Sequence[float]], shifts: Sequence[int], num_swapped: int) -> None:
    others = iter(OTHER_COLORS)
    fixed = {"max pooling": MAX_COLOR, "mixpool": MODULUS_COLOR}
    markers = iter("s^Do")
    for name, curve in curves.items():
        color = fixed.get(name) or next(others)
        width = 2.6 if name == "mixpool" else 1.5
        axes.plot(
            [0, *shifts],
            [0, *curve],
            color=color,
            lw=width,
            marker=next(markers, "o"),
            ms=3.8,
            label=name,
            clip_on=False,
        )
    axes.set(xlim=(0, max(shifts) + 0.15), ylim=(0, None), xticks=[0, *shifts])
    axes.set_xlabel("shift (px)", size=9.5, labelpad=2)
    axes.set_title(f"change, mean of {num_swapped} channels", size=10, pad=18, **TEXT)
    axes.text(0.5, 1.025, "rms change / std, all photos", transform=axes.transAxes, ha="center", size=8.5, color=MUTED)
    axes.tick_params(labelsize=8.5, length=2, color=MUTED)
    axes.grid(axis="y", color="#E4E4E4", lw=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(loc="lower right", fontsize=9, frameon=False, labelspacing=0.35, borderaxespad=0.1, handlelength=1.6)


# --- figures ----------------------------------------------------------------------------------------------------------


def save_figure(figure: Figure, path: str | Path, dpi: int = 160) -> Path:
    """Write a figure; the suffix of `path` gives the format, PNG without one. Returns the path.

    Raises:
        ValueError: matplotlib cannot write that format.
        OSError: the file cannot be written.
    """
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


def _image_axes(figure: Figure, left: float, bottom: float, side: float, frame: str = "#BBBBBB") -> Axes:
    """Square axes without ticks, in inches."""
    axes = inch_axes(figure, left, bottom, side, side)
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(edgecolor=frame, linewidth=1.0)
    return axes
