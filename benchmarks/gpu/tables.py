"""The tables of the measurements on GPUs, from records/gpu.jsonl."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.gpu import summary
from benchmarks.gpu.summary import COMPILED, MODES, TUNED, fastest, of_case
from benchmarks.kit.markdown import read, table
from benchmarks.kit.store import RECORDS

# The tables, by the names that pages call them.
__all__ = [
    "gpu_targets",
    "gpu",
    "gpu_others",
    "gpu_memory",
    "gpu_models",
]

NO_GPU = "No GPU measurements yet."


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
    return _for_each_gpu(lambda found: table(["what", "target", "measured", ""], summary.target_rows(found)))


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
        for plan in ("max", "cmod", "modulus", "mix"):
            for mode, name in MODES.items():
                providers = of_case(here, "speed", plan, mode, case=case, dtype=dtype, layout=layout)
                if not providers:
                    continue
                size = next(iter(providers.values()))["params"]["N"]
                setting = f"{case.removesuffix('_stem')} {size}, {dtype} {layout}"
                rows.append([setting, plan, name, *_gpu_cells(providers)])
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
                r["plan"],
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
