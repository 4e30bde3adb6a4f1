"""A filter bank as a picture: its tiles, and where they lie in the frequency plane."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse, Rectangle
from torch import Tensor

from mixpool.figures import MAX_COLOR, MODULUS_COLOR, MUTED, TEXT, blank_figure
from mixpool.selection.plan import ChannelPlan

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_filter_bank(weight: Tensor, plan: ChannelPlan) -> Figure:
    """All filters, those on modulus pooling framed in blue, beside their centre frequencies in the frequency plane.

    Args:
        weight: (C, I, kH, kW) of the stem's convolution. RGB filters are drawn in colour, zero is mid-gray; with
            another number of inputs the strongest spatial pattern of the filter is drawn in gray.
        plan: of these channels.
    """
    if weight.ndim != 4 or len(weight) != len(plan.poolings):
        raise ValueError(f"expected a weight of {len(plan.poolings)} filters, got {tuple(weight.shape)}")
    columns = math.ceil(math.sqrt(len(weight)))
    rows = math.ceil(len(weight) / columns)
    figure = blank_figure(10.0, 5.0)
    figure.text(0.025, 0.95, "Filters of the stem; blue frame: modulus pooling", size=12, weight="bold", **TEXT)
    figure.text(0.555, 0.95, "Where they lie in the frequency plane", size=12, weight="bold", **TEXT)
    bank = figure.add_axes((0.025, 0.04, 0.47, 0.88))
    _draw_bank(bank, weight, plan.is_complex, rows, columns)
    _draw_frequency_plane(figure.add_axes((0.60, 0.165, 0.36, 0.69)), plan)
    return figure


def _draw_bank(axes: Axes, weight: Tensor, is_complex: Sequence[bool], rows: int, columns: int) -> None:
    """One tile per filter in the order of the channels, row by row."""
    axes.set(xlim=(0, columns), ylim=(rows, 0), aspect="equal", anchor="NW")
    axes.axis("off")
    margin = 0.12
    for channel, (tile, modulus) in enumerate(zip(filter_tiles(weight), is_complex, strict=True)):
        row, column = divmod(channel, columns)
        left, right, top, bottom = column + margin, column + 1 - margin, row + margin, row + 1 - margin
        axes.imshow(tile, extent=(left, right, bottom, top), interpolation="nearest", zorder=1)
        frame = (
            {"edgecolor": MODULUS_COLOR, "linewidth": 2.6} if modulus else {"edgecolor": "#BBBBBB", "linewidth": 0.6}
        )
        axes.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, zorder=2, **frame))
    axes.set(xlim=(0, columns), ylim=(rows, 0))


def filter_tiles(weight: Tensor) -> np.ndarray:
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
    is_complex = torch.tensor(plan.is_complex)
    axes.add_patch(Rectangle((-math.pi, -math.pi), 2 * math.pi, 2 * math.pi, facecolor="#F5F5F5", edgecolor="#888888"))
    stride_y, stride_x = stats.stride
    axes.add_patch(Ellipse((0, 0), math.pi / stride_x, math.pi / stride_y, fc="white", ec=MUTED, ls="--"))
    for chosen, color, marker, label in (
        (~is_complex, MAX_COLOR, "s", "max pooling"),
        (is_complex, MODULUS_COLOR, "o", "modulus"),
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
