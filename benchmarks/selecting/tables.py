"""The tables of which channels to pool by the modulus."""

from __future__ import annotations

from benchmarks.kit.markdown import machine_line, read, table

# The tables, by the names that pages call them.
__all__ = [
    "models",
    "partner",
    "image_model",
    "prediction",
    "fidelity",
    "cuts",
]

STATISTICS = {
    "correlation_blur1": "correlation, blur=1",
    "correlation_blur3": "correlation, blur=3",
    "gap": "gap",
    "instability_max": "instability of RMax",
    "instability_blur1": "of CMod, blur=1",
    "instability_blur3": "of CMod, blur=3",
}


def models() -> str:
    record = read("models")[0]
    rows = [[tier, str(count)] for tier, count in record["counts"].items()]
    total = sum(record["counts"].values())
    return (
        table(["tier of the census", "models"], rows)
        + f"\n\nBit-equal in evaluation: {record['eval_bit_equal']} of {total}; after revert: "
        f"{record['revert_bit_equal']} of {total}; in training the stem's largest difference is "
        f"{record['train_max_difference_over_std']:.1e} of its output's std.\n\n{machine_line(record)}"
    )


def partner() -> str:
    rows = []
    for record in read("partner"):
        means, wrong = record["correlation_with_rmax"], record["wrong_side_energy_median"]
        rows.append(
            [
                record["partner"],
                str(record["blur"]),
                f"{means['above_1.2']:.3f} / {means['up_to_1.2']:.3f}",
                f"{wrong['above_1.2']:.4f} / {wrong['up_to_1.2']:.4f}",
            ]
        )
    header = ["partner", "blur", "correlation with RMax, above / up to 1.2 rad/px", "wrong-side energy (median)"]
    return table(header, rows) + "\n\n" + machine_line(read("partner")[0])


def image_model() -> str:
    """The synthetic pictures' mean absolute errors where they were fitted."""
    record = read("image_model")[0]
    errors = record["mean_absolute_error"]
    names = [*STATISTICS, "gain", "offset"]
    rows = [[name, *(f"{values[n]:.3f}" for n in names)] for name, values in errors.items()]
    return table(["filters", *STATISTICS.values(), "gain", "offset / rms"], rows) + "\n\n" + machine_line(record)


def prediction() -> str:
    """Pearson correlation / mean absolute error of the predictions, and in brackets those of other photos."""
    rows = []
    for record in read("prediction"):
        cells = [record["filters"], f"{record['group']}, {record['num_filters']}"]
        for name in STATISTICS:
            shown = [
                f"{record[of][name]['pearson']:.3f} / {record[of][name]['mean_absolute_error']:.3f}"
                for of in ("agreement", "ceiling")
            ]
            cells.append(f"{shown[0]} ({shown[1]})")
        rows.append(cells)
    first = read("prediction")[0]
    return (
        table(["filters", "which, number", *STATISTICS.values()], rows)
        + f"\n\nTime for 64 filters of 7x7: {first['seconds_for_64_filters']:.2f} s. {machine_line(first)}"
    )


def fidelity() -> str:
    rows = []
    for record in (r for r in read("selection") if r["kind"] == "selection_fidelity"):
        correlations = record["correlation_with_fidelity"]
        rows.append([record["filters"], *(f"{correlations[name]:+.2f}" for name in correlations)])
    first = next(r for r in read("selection") if r["kind"] == "selection_fidelity")
    return table(["filters", *first["correlation_with_fidelity"]], rows) + "\n\n" + machine_line(first)


def cuts() -> str:
    rows = []
    for record in (r for r in read("selection") if r["kind"] == "selection_zero_shot"):
        rows.append(
            [
                {"fidelity": "fidelity, 100 photos", "prediction": "predicted correlation, no images"}[record["cut"]],
                f"{record['value']:.2f}",
                ", ".join(map(str, record["channels"])),
                f"{record['mean_top1_change']:+.2f}",
                ", ".join(f"{change:+.1f}" for change in record["top1_change"]),
            ]
        )
    return table(["cut on", "at least", "channels (of 96) per split", "mean top-1 change", "per split"], rows)
