"""The tables of the theory's experiment, from its records (`Experiment.as_record`): its summary, and its shifts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from benchmarks.kit.markdown import machine_line, read, table

__all__ = ["theory", "theory_shifts"]  # the tables, by the names that pages call them

# A number of the summary and what it is called; "-" belongs to the line above. All are of the analytic packets alone;
# changes in a correlation are those to the side.
ROWS = {
    "correlation_gamma_gap": "correlation of gamma and gap",
    "correlation_gamma_gap_spread": "- without packets whose phases pile up",
    "correlation_gamma_blurred_gap": "- gap to CMod (mean) instead",
    "correlation_predicted_gap": "correlation of predicted and measured gap",
    "correlation_predicted_gap_spread": "- without packets whose phases pile up",
    "correlation_theory_phases_gap": "correlation of gap, and gap with the theory's phases",
    "correlation_theory_phases_gap_spread": "- without packets whose phases pile up",
    "correlation_gap_change": "correlation of gap and change of RMax, 1 px",
    "correlation_gap_change_spread": "- without packets whose phases pile up",
    "correlation_turned_gap": "- gap turned by the advance of the phase",
    "correlation_gap_change_half": "correlation of gap and change of RMax, 0.5 px",
    "correlation_turned_gap_half": "- gap turned by the advance of the phase",
    "correlation_expected_change": "correlation of expected and measured change of RMax",
    "correlation_predicted_change": "correlation of predicted and measured change of RMax",
    "mean_gamma": "mean gamma",
    "mean_gap": "mean gap",
    "mean_gap_flat_envelope": "- were the modulus constant in each window",
    "mean_gap_theory_phases": "- were the phases the theory's",
    "change_max_horizontal": "mean change of RMax, 1 px to the side",
    "change_blur1_horizontal": "- of CMod (centre), the paper's",
    "change_blur3_horizontal": "- of CMod (mean), mixpool's",
    "ratio_blur1_horizontal": "change of RMax over CMod (centre), 1 px to the side",
    "ratio_blur1_vertical": "- 1 px down",
    "ratio_blur1_diagonal": "- 1 px along both axes",
    "ratio_blur3_horizontal": "change of RMax over CMod (mean), 1 px to the side",
    "ratio_blur3_vertical": "- 1 px down",
    "ratio_blur3_diagonal": "- 1 px along both axes",
}


def summary_rows(found: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Label and one cell per record, "value (low to high)", of the numbers that any of the records holds."""
    rows = [["", *(f"depth {record['params']['depth']}" for record in found)]]
    rows.append(["photos", *(str(record["num_photos"]) for record in found)])
    rows.append(["analytic packets", *(f"{record['num_analytic']} of {record['num_packets']}" for record in found)])
    rows.append(["- of these, phases pile up", *(str(record["num_crowded"]) for record in found)])
    for name, label in ROWS.items():
        if any(name in record["summary"] for record in found):
            rows.append([label, *(_cell(record, name) for record in found)])
    return rows


def _cell(record: Mapping[str, Any], name: str) -> str:
    value, interval = record["summary"].get(name), record["ci95"].get(name)
    if value is None or (name.endswith("_spread") and record["num_crowded"] == 0):
        return "-"
    return f"{value:.3f}" + ("" if not interval or None in interval else f" ({interval[0]:.3f} to {interval[1]:.3f})")


def summary_text(found: Sequence[Mapping[str, Any]]) -> str:
    """The same in columns, for a terminal."""
    rows = summary_rows(found)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        [label.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))]
        for label, *cells in rows
    )
    return "\n".join("  ".join(line) for line in lines)


def theory() -> str:
    found = read("theory")
    header, *rows = summary_rows(found)
    return table(header, rows) + "\n\n" + machine_line(found[0])


def theory_shifts() -> str:
    """Mean change over the analytic packets, RMax / CMod (centre) / CMod (mean), a row per shift."""
    found = read("theory")
    columns = [(record, i, direction) for record in found for i, direction in enumerate(record["params"]["directions"])]
    rows = []
    for j, shift in enumerate(found[0]["params"]["shifts"]):
        cells = [f"{shift:g} px"]
        for record, i, _ in columns:
            kept = [packet for packet, is_analytic in enumerate(record["is_analytic"]) if is_analytic]
            means = [
                mean(record[f"change_{name}"][i][j][packet] for packet in kept) for name in ("max", "blur1", "blur3")
            ]
            cells.append(" / ".join(f"{value:.2f}" for value in means))
        rows.append(cells)
    return table(["shift", *(f"depth {record['params']['depth']}, {name}" for record, _, name in columns)], rows)
