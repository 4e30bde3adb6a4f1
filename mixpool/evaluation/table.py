"""Evaluations of several models side by side as a table, made from their records (`Evaluation.as_record`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mixpool.evaluation.result import METRICS

Record = Mapping[str, Any]

# Of each curve these points, (direction, pixels); the records and the figures have all.
SHOWN = {
    "%": (("horizontal", "1"), ("horizontal", "2"), ("horizontal", "4"), ("horizontal", "8"), ("diagonal", "1")),
    "nats": (("horizontal", "0.5"), ("horizontal", "1"), ("horizontal", "4"), ("horizontal", "8"), ("diagonal", "1")),
    "std": (("horizontal", "1"), ("diagonal", "1")),
}
_DECIMALS = {"%": 2, "nats": 4, "std": 3}


def table_rows(found: Sequence[Record]) -> list[list[str]]:
    """A header, then one row per number: label, "value (low to high)" per model, and its difference to another's.

    Models are called A, B, ... in the header, in the order of the records. A difference whose 95 % interval leaves out
    0 ends in a star.
    """
    letters = {record["model"]: letter for record, letter in zip(found, _letters(len(found)), strict=True)}
    header = [""]
    for record in found:
        header.append(letters[record["model"]])
        if record.get("difference_to"):
            header.append(f"{letters[record['model']]} - {letters[record['difference_to']]}")
    rows = [header]
    for name, metric in METRICS.items():
        if not any(name in record["summary"] for record in found):
            continue
        for path in SHOWN[metric.unit] if metric.axes else ((),):
            where = f", {path[0]} {path[1]} px" if path else ""
            row = [f"{metric.label}{where} ({metric.unit})"]
            for record in found:
                row.append(_cell(record, name, path))
                if record.get("difference_to"):
                    row.append(_cell(record["difference"], name, path, is_difference=True))
            rows.append(row)
    return rows


def table_text(found: Sequence[Record]) -> str:
    """The same in columns, for a terminal, below the names of the models."""
    names = [f"{letter}  {record['model']}" for record, letter in zip(found, _letters(len(found)), strict=True)]
    rows = table_rows(found)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))])
        for row in rows
    )
    return "\n".join([*names, "", *lines])


def _letters(count: int) -> list[str]:
    """A, B, ... Z, A1, B1, ..."""
    alphabet = [chr(ord("A") + i) for i in range(26)]
    return [alphabet[i % 26] + (str(i // 26) if i >= 26 else "") for i in range(count)]


def _cell(record: Record, name: str, path: tuple[str, ...], is_difference: bool = False) -> str:
    if name not in record["summary"]:
        return "-"
    value, ends = record["summary"][name], record["ci95"][name]
    for step in path:
        value, ends = value[step], ends[step]
    low, high = ends
    digits = _DECIMALS[METRICS[name].unit]
    sign = "+" if is_difference else ""
    star = "*" if is_difference and not low <= 0 <= high else ""
    return f"{value:{sign}.{digits}f} ({low:{sign}.{digits}f} to {high:{sign}.{digits}f}){star}"
