"""What a run leaves for people to look at: a table with a row per epoch, and the picture of its curves."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SUMMARY, CURVES = "summary.csv", "curves.png"
SERIES = {
    "loss": {"train_loss": "training", "val_loss": "validation", "ema_loss": "validation, moving average"},
    "top-1 (%)": {"val_top1": "validation", "ema_top1": "validation, moving average"},
    "learning rate": {"lr": "learning rate"},
}


def write_summary(folder: Path, history: Sequence[dict[str, Any]]) -> None:
    """summary.csv: one row per finished epoch; what was not measured in an epoch is empty."""
    names = list(dict.fromkeys(name for row in history for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    partial = folder / f".{SUMMARY}.partial"
    partial.write_text(text.getvalue())
    partial.replace(folder / SUMMARY)


def draw_curves(folder: Path, history: Sequence[dict[str, Any]], title: str) -> None:
    """curves.png: loss, accuracy and learning rate over the epochs."""
    from mixpool.figures import (
        MAX_COLOR,
        MODULUS_COLOR,
        OTHER_COLORS,
        TEXT,
        blank_figure,
        inch_axes,
        plain_axes,
        save_figure,
    )

    figure = blank_figure(10.4, 3.4)
    figure.text(0.06, 0.93, title, size=11, **TEXT)
    for number, (quantity, series) in enumerate(SERIES.items()):
        axes = inch_axes(figure, 0.6 + 3.35 * number, 0.55, 2.75, 2.35)
        colors = iter((MAX_COLOR, MODULUS_COLOR, OTHER_COLORS[1]) if number == 0 else (MODULUS_COLOR, OTHER_COLORS[1]))
        for name, label in series.items():
            points = [(row["epoch"] + 1, row[name]) for row in history if row.get(name) is not None]
            if points:
                axes.plot(*zip(*points), color=next(colors), lw=1.8, marker="o", ms=2.5, label=label)
        axes.set_title(quantity, size=10, **TEXT)
        axes.set_xlabel("epochs", size=9)
        axes.xaxis.get_major_locator().set_params(integer=True)
        plain_axes(axes)
        if number == 0:
            axes.legend(fontsize=8.5, frameon=False)
    save_figure(figure, folder / CURVES)
