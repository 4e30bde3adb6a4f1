"""Make the tables in the READMEs and in docs/ from the records; `--check` only says whether they are up to date.

python -m benchmarks.tables [--check]

From the GPU's records comes also `mixpool/fused/measured.json`, by which the fused path knows where it is the default.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import mean

from benchmarks import gpu_summary
from benchmarks.gpu_summary import COMPILED, MODES, TUNED, fastest, of_case
from benchmarks.store import RECORDS
from mixpool import records
from mixpool.theory_table import summary_rows

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "benchmarks" / "README.md", ROOT / "docs" / "theory.md")
MEASURED = ROOT / "mixpool" / "fused" / "measured.json"
NO_GPU = "No GPU measurements yet."


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def machine_line(record: dict) -> str:
    machine, code = record["machine"], record["code"]
    dirty = " with uncommitted changes" if code["dirty"] else ""
    return (
        f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}, Python {machine['python']}; "
        f"commit {code['commit']}{dirty}, `{record['command']}`, {record['time_utc'][:10]}."
    )


def read(name: str, folder: Path = RECORDS) -> list[dict]:
    """The records of a file; ValueError if some come from a dry run, whose numbers mean nothing."""
    found = list(records.read(folder / f"{name}.jsonl"))
    if any(record.get("dry") for record in found):
        raise ValueError(f"expected measurements in {name}.jsonl, got records of a dry run")
    return found


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


# --- the GPU ----------------------------------------------------------------------------------------------------------


def gpu_records() -> dict[str, list[dict]]:
    """GPU -> its records; empty before anything was measured."""
    found = read("gpu") if (RECORDS / "gpu.jsonl").exists() else []
    names = sorted({record["machine"]["gpu"] for record in found if record["machine"]["gpu"]})
    return {name: [record for record in found if record["machine"]["gpu"] == name] for name in names}


def _for_each_gpu(make: Callable[[list[dict]], str]) -> str:
    by_gpu = gpu_records()
    if not by_gpu:
        return NO_GPU
    return "\n\n".join(f"{make(found)}\n\n{_gpu_line(found)}" for found in by_gpu.values())


def _gpu_line(found: list[dict]) -> str:
    """The parts of a run may come from several calls, days and commits."""
    machine = found[0]["machine"]
    commits = sorted(
        {f"{r['code']['commit']}{' with uncommitted changes' if r['code']['dirty'] else ''}" for r in found}
    )
    days = sorted({r["time_utc"][:10] for r in found})
    return (
        f"{machine['gpu']}, driver {machine['driver']}, torch {machine['torch']}, Triton {machine['triton']}, "
        f"cuDNN {machine['cudnn']}, Python {machine['python']}; commit {', '.join(commits)}, "
        f"`python -m benchmarks.gpu`, {', '.join(days)}."
    )


def gpu_targets() -> str:
    """What was aimed at and what came out."""
    return _for_each_gpu(lambda found: table(["what", "target", "measured", ""], gpu_summary.target_rows(found)))


def gpu() -> str:
    """The ResNet stem at the largest batch, bfloat16 channels_last."""
    return _for_each_gpu(lambda found: _gpu_table(found, [("resnet_stem", None, "bfloat16", "channels_last")]))


def gpu_others() -> str:
    """The same for every other stem, batch, dtype and layout."""

    def make(found: list[dict]) -> str:
        settings = {
            (r["case"], r["params"]["N"], r["dtype"], r["layout"])
            for r in found
            if r["kind"] == "speed" and (r["case"], r["params"]["N"], r["dtype"], r["layout"]) != _main_setting(found)
        }
        return _gpu_table(found, sorted(settings))

    return _for_each_gpu(make)


def _main_setting(found: list[dict]) -> tuple:
    batches = [r["params"]["N"] for r in found if r["kind"] == "speed" and r["case"] == "resnet_stem"]
    return ("resnet_stem", max(batches, default=None), "bfloat16", "channels_last")


def _gpu_table(found: list[dict], settings: list[tuple]) -> str:
    """A row per setting, plan and pass; times of the fastest torch.compile mode that was measured."""
    rows = []
    for case, batch, dtype, layout in settings:
        here = [r for r in found if batch is None or r.get("params", {}).get("N") == batch]
        for plan, blur in (("max", 3), ("modulus", 1), ("modulus", 3), ("mix", 3)):
            for mode, name in MODES.items():
                options = {"case": case, "blur": blur, "dtype": dtype, "layout": layout}
                providers = of_case(here, "speed", plan, mode, **options)
                if not providers:
                    continue
                size = next(iter(providers.values()))["params"]["N"]
                label = plan if plan == "max" else f"{plan} blur={blur}"
                setting = f"{case.removesuffix('_stem')} {size}, {dtype} {layout}"
                rows.append([setting, label, name, *_gpu_cells(providers)])
    header = ["stem and batch", "plan", "pass", "stock ms", "stock compiled", "reference compiled", "fused"]
    header += ["over stock", "over stock compiled", "over reference compiled", "GB/s", "TFLOP/s", "of the floor"]
    return table(header, rows)


def _gpu_cells(providers: dict[str, dict]) -> list[str]:
    stock = providers["stock"]["ms"]["p50"] if "stock" in providers else None
    times = [stock, fastest(providers, "stock"), fastest(providers, "reference", (*TUNED, *COMPILED))]
    cells = ["-" if ms is None else f"{ms:.3f}" for ms in times]
    fused = providers.get("fused")
    if fused is None:
        return [*cells, "not run", *["-"] * 6]
    ms = fused["ms"]["p50"]
    ratios = ["-" if base is None else f"{base / ms:.2f} x" for base in times]
    achieved = [f"{fused['gb_per_s']:.0f}", f"{fused['tflop_per_s']:.0f}", f"{fused['fraction_of_floor']:.0%}"]
    return [*cells, f"{ms:.3f}", *ratios, *achieved]


def gpu_memory() -> str:
    """MiB of one training step of the stem: held between forward and backward, and at the peak."""

    def make(found: list[dict]) -> str:
        rows = [
            [
                r["plan"] if r["plan"] == "max" else f"{r['plan']} blur={r['params']['blur']}",
                r["provider"],
                f"{r['held_mib']:.0f}",
                f"{r['peak_mib']:.0f}",
            ]
            for r in found
            if r["kind"] == "memory" and r.get("held_mib") is not None
        ]
        return table(["plan", "stem", "held for backward, MiB", "peak, MiB"], rows)

    return _for_each_gpu(make)


def gpu_models() -> str:
    """Whole networks, images per second."""

    def make(found: list[dict]) -> str:
        rows = [
            [
                f"{r['case']} {r['params']['N']}",
                r["mode"],
                r["provider"],
                f"{r['images_per_s']:.0f}",
                f"{1 / r['ratio_to_stock']['p50']:.3f} x" if "ratio_to_stock" in r else "-",
            ]
            for r in found
            if r["kind"] == "model_speed" and "skipped" not in r
        ]
        return table(["model and batch", "pass", "stem", "images/s", "speed over stock"], rows)

    return _for_each_gpu(make)


def measured() -> str:
    """The text of mixpool/fused/measured.json: a JSON list, one entry on a line."""
    entries = [entry for found in gpu_records().values() for entry in gpu_summary.measured(found)]
    lines = ",\n".join(f"  {json.dumps(entry)}" for entry in entries)
    return f"[\n{lines}\n]\n" if entries else "[]\n"


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
        print(f"out of date: {path.relative_to(ROOT)}; run python -m benchmarks.tables", file=sys.stderr)
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
