"""Make the tables in the READMEs and in docs/ from the records; `--check` only says whether they are up to date.

python -m benchmarks.kit.tables [--check]

From the GPU's records comes also `mixpool/fused/measured.json`, by which the fused path knows where it is the default.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import mean

from benchmarks.cifar10.tables import (
    cifar10,
    cifar10_30_float32,
    cifar10_alexnet,
    cifar10_bound,
    cifar10_designs,
    cifar10_designs_float32,
    cifar10_first,
    cifar10_float32,
    cifar10_full,
    cifar10_later,
    cifar10_short,
    cifar10_straight,
)
from benchmarks.cost.tables import cost_count, cost_growth, cost_short, cost_time
from benchmarks.gpu.tables import gpu, gpu_memory, gpu_models, gpu_others, gpu_targets, measured
from benchmarks.kit.markdown import machine_line, read, table
from benchmarks.kit.store import ROOT
from benchmarks.peers.tables import peers_cost, peers_functions, peers_network, peers_stability
from benchmarks.pretrained.tables import pretrained
from benchmarks.pretrained.tables_evaluation import evaluation, evaluation_speed
from benchmarks.theory.tables import summary_rows

PAGES = (ROOT / "README.md", ROOT / "benchmarks" / "README.md", ROOT / "docs" / "theory.md")
MEASURED = ROOT / "mixpool" / "fused" / "measured.json"


def conversion() -> str:
    rows = []
    for record in read("squeezenet"):
        low, high = record["top1_change_ci95"]
        change = record["stem_change_1px"]
        given = f"{record['calibration_images']} photos" if record["calibration_images"] else "none"
        rows.append(
            [
                f"{given}, split {record['seed']}",
                f"{record['num_modulus']} of {record['channels']}",
                f"{record['top1']['stock']:.1f} -> {record['top1']['mixpool']:.1f} ({low:+.1f} to {high:+.1f})",
                f"{record['agreement']:.1f}",
                f"{change['max']:.3f} -> {change['modulus']:.3f} (-{record['stem_change_fall']:.0%})",
            ]
        )
    header = ["images given", "modulus channels", "top-1 % (95 % interval of the change)", "same class %"]
    return table([*header, "stem change at 1 px"], rows) + "\n\n" + machine_line(read("squeezenet")[0])


def shifts() -> str:
    calibrated = [r for r in read("squeezenet") if r["calibration_images"]]
    rows = []
    for name in calibrated[0]["shifts"]:
        cells = [name]
        for quantity, form in (("flips", "{:.1f}"), ("kl", "{:.4f}")):
            for model in ("stock", "mixpool"):
                cells.append(form.format(mean(r["shifts"][name][model][quantity] for r in calibrated)))
        rows.append(cells)
    header = ["shift", "flips % stock", "flips % mixpool", "KL stock", "KL mixpool"]
    return table(header, rows)


def speed() -> str:
    return _speed_of("forward")


def speed_training() -> str:
    return _speed_of("full")


def _speed_of(mode: str) -> str:
    """One pass: a row per stem, a pair of columns per layout."""
    found = [record for record in read("cpu") if record["mode"] == mode]
    rows = []
    for record in (r for r in found if r["layout"] == "NCHW"):
        cells = [record["provider"], f"{record['params']['num_modulus']} of {record['params']['C_out']}"]
        for layout in ("NCHW", "channels_last"):
            same = next(r for r in found if r["layout"] == layout and r["provider"] == record["provider"])
            ratio = same["ratio_to_stock"]
            cells.append(f"{same['ms']['p50']:.0f}")
            cells.append(f"{ratio['p50']:.2f} ({ratio['p20']:.2f} to {ratio['p80']:.2f})")
        rows.append(cells)
    header = [
        "stem",
        "modulus channels",
        "NCHW ms",
        "NCHW, times stock",
        "channels_last ms",
        "channels_last, times stock",
    ]
    return table(header, rows) + "\n\n" + machine_line(found[0])


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


STATISTICS = {
    "correlation_blur1": "correlation, blur=1",
    "correlation_blur3": "correlation, blur=3",
    "gap": "gap",
    "instability_max": "instability of RMax",
    "instability_blur1": "of CMod, blur=1",
    "instability_blur3": "of CMod, blur=3",
}


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


def image_model() -> str:
    """The synthetic pictures' mean absolute errors where they were fitted."""
    record = read("image_model")[0]
    errors = record["mean_absolute_error"]
    names = [*STATISTICS, "gain", "offset"]
    rows = [[name, *(f"{values[n]:.3f}" for n in names)] for name, values in errors.items()]
    return table(["filters", *STATISTICS.values(), "gain", "offset / rms"], rows) + "\n\n" + machine_line(record)


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


TABLES: dict[str, Callable[[], str]] = {
    f.__name__: f
    for f in (
        conversion,
        shifts,
        speed,
        speed_training,
        partner,
        fidelity,
        cuts,
        prediction,
        image_model,
        models,
        theory,
        theory_shifts,
        gpu,
        gpu_targets,
        gpu_others,
        gpu_memory,
        gpu_models,
        evaluation,
        evaluation_speed,
        pretrained,
        cifar10,
        cifar10_alexnet,
        cifar10_30_float32,
        cifar10_bound,
        cifar10_designs,
        cifar10_designs_float32,
        cifar10_first,
        cifar10_float32,
        cifar10_full,
        cifar10_later,
        cifar10_short,
        cifar10_straight,
        cost_count,
        cost_time,
        cost_growth,
        cost_short,
        peers_functions,
        peers_cost,
        peers_stability,
        peers_network,
    )
}


def filled(text: str) -> str:
    """The page with every `<!-- table:NAME -->` block made anew."""

    def fill(match: re.Match) -> str:
        return f"<!-- table:{match[1]} -->\n{TABLES[match[1]]()}\n<!-- /table -->"

    return re.sub(r"<!-- table:(\w+) -->.*?<!-- /table -->", fill, text, flags=re.DOTALL)


def contents() -> dict[Path, str]:
    """What every generated file should hold."""
    files = {page: filled(page.read_text()) for page in PAGES}
    return files | ({MEASURED: measured()} if MEASURED.parent.is_dir() else {})


def stale() -> list[Path]:
    """The generated files that hold something else."""
    return [path for path, text in contents().items() if not path.exists() or path.read_text() != text]


def write() -> None:
    """Bring all of them up to date."""
    for path, text in contents().items():
        path.write_text(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a table is out of date")
    if not parser.parse_args().check:
        write()
        return 0
    found = stale()
    for path in found:
        print(f"out of date: {path.relative_to(ROOT)}; run python -m benchmarks.kit.tables", file=sys.stderr)
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
