"""The figure of CIFAR-10, from its records: flips over shifts, and how accurate and how steady every design is."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure

from mixpool.figures import MAX_COLOR, MODULUS_COLOR, MUTED, OTHER_COLORS, TEXT, blank_figure, inch_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RECIPE = "half"
# Of the networks with a name of their own: label, colour, marker, line.
NETWORKS = {
    "stock": ("stock (max pooling)", MAX_COLOR, "s", "-"),
    "blurpool": ("BlurPool", OTHER_COLORS[0], "D", "-"),
    "cmod": ("CMod (paper 2)", OTHER_COLORS[1], "^", "-"),
    "mixpool": ("mixpool", MODULUS_COLOR, "o", "-"),
    "dense": ("dense stem, which hardly aliases", MUTED, "v", "--"),
}
SHIFTS = range(1, 9)  # pixels
LABELLED_LEFT = ("free", "gabor", "no_max_blur")  # whose labels would lie on another's point on the right


def plot_cifar10(found: Sequence[dict[str, Any]]) -> Figure:
    """Flips at every horizontal shift, and top-1 against flips at 1 pixel; means over seeds, one point per network.

    Args:
        found: the records of `benchmarks.cifar10`.
    """
    runs: dict[str, list[dict[str, Any]]] = {}
    for record in found:
        if record["recipe"] == RECIPE:
            runs.setdefault(record["variant"], []).append(record)
    figure = blank_figure(10.0, 4.5)
    figure.text(0.02, 0.945, "Trained from scratch on CIFAR-10 with different stems", size=13, weight="bold", **TEXT)
    first = next(iter(runs.values()))[0]
    about = f"ResNet-18 with half the channels behind the stem, {first['epochs']} epochs in bfloat16, means over seeds."
    figure.text(0.02, 0.89, about, size=9, color=MUTED)
    curves = inch_axes(figure, 0.65, 1.1, 4.0, 2.5)
    _draw_curves(curves, runs)
    _draw_designs(inch_axes(figure, 5.55, 1.1, 4.2, 2.5), runs)
    handles, labels = curves.get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=5, frameon=False, fontsize=8.5, bbox_to_anchor=(0.5, 0.03))
    return figure


def _draw_curves(axes: Axes, runs: dict[str, list[dict[str, Any]]]) -> None:
    for variant, (label, color, marker, line) in NETWORKS.items():
        if variant not in runs:
            continue
        flips = [
            mean(record["summary"]["flip_probability"]["horizontal"][str(shift)] for record in runs[variant])
            for shift in SHIFTS
        ]
        axes.plot(SHIFTS, flips, line, color=color, marker=marker, markersize=4.5, linewidth=1.6, label=label)
    axes.set_ylim(bottom=0)
    _finish(axes, "Changed classes, %", "horizontal shift (px); the stem's stride is 4")


def _draw_designs(axes: Axes, runs: dict[str, list[dict[str, Any]]]) -> None:
    """All networks; those with antialiased later layers are hollow."""
    for variant, records in runs.items():
        top1 = mean(record["top1"] for record in records)
        flips = mean(record["flip"][f"{way}1"] for record in records for way in "hvd")
        name, is_later = variant.removesuffix("_aa"), variant.endswith("_aa")
        _, color, marker, _ = NETWORKS.get(name, ("", "#9A9A9A", ".", ""))
        face = "white" if is_later else color
        axes.plot(flips, top1, marker, color=color, markerfacecolor=face, markersize=8 if name in NETWORKS else 6)
        if name not in NETWORKS:
            shown = name.replace("_", " ")
            side, way = ("right", -5) if name in LABELLED_LEFT else ("left", 4)
            axes.annotate(shown, (flips, top1), (way, -3), textcoords="offset points", size=6.5, color=MUTED, ha=side)
    axes.margins(0.12)
    _finish(axes, "Top-1, % (hollow: later layers blurred too)", "changed classes at 1 px, mean of h, v and d, %")


def _finish(axes: Axes, title: str, label: str) -> None:
    axes.set_title(title, size=10.5, pad=5, loc="left", **TEXT)
    axes.set_xlabel(label, size=8.5, labelpad=3)
    axes.tick_params(labelsize=8.5, length=2, color=MUTED)
    axes.grid(color="#E4E4E4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
