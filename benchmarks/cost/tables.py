"""The tables of what mixpool costs on a CPU, from records/cost.jsonl: stock's own numbers, the others' ratios to it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from benchmarks.cost.models import SUBJECTS, VARIANTS
from benchmarks.kit.markdown import machine_line, read, table
from benchmarks.kit.store import NOT_RUN, RECORDS

# The tables, by the names that pages call them.
__all__ = [
    "cost_count",
    "cost_short",
    "cost_time",
    "cost_growth",
    "speed",
    "speed_training",
    "lowpass",
]

EMPTY = "Not run yet."
OTHERS = tuple(name for name in VARIANTS if name != "stock")


def cost_count() -> str:
    """Parameters, FLOPs and saved activations per image; a row per quantity."""
    found = _read("cost_count")
    if not found:
        return EMPTY
    others = [name for name in OTHERS if any(r["provider"] == name for r in found)]
    rows = []
    for subject in SUBJECTS:
        by_variant = {r["provider"]: r for r in found if r["case"] == subject}
        stock = by_variant.get("stock")
        if stock is None:
            continue
        pixels = "{H} x {W}".format(**stock["params"])
        quantities: dict[str, tuple[Callable[[dict], float], str, str]] = {
            "parameters, M": (lambda r: r["num_parameters"] / 1e6, "{:.3f}", "{:.3f}"),
            f"GFLOP, {pixels}": (lambda r: r["flops_per_image"] / 1e9, "{:.3f}", "{:.3f}"),
            "saved, MiB": (lambda r: r["saved_bytes"] / r["params"]["N"] / 2**20, "{:.1f}", "{:.2f}"),
        }
        for label, (value, form, ratio_form) in quantities.items():
            ratios = [
                ratio_form.format(value(by_variant[name]) / value(stock)) if name in by_variant else "-"
                for name in others
            ]
            rows.append([subject, label, form.format(value(stock)), *ratios])
    return _with_lines(table(["network", "per image", "stock", *others], rows), found)


def cost_short() -> str:
    """ResNet-18 as a whole, for the first page: a row per variant, what it costs beside stock."""
    found = {
        r["variant"] if "variant" in r else r["provider"]: r for r in _read("cost_count") if r["case"] == "resnet18"
    }
    timed = [
        r for r in _read("cost_time") if r["subject"] == "resnet18" and r["layout"] == "NCHW" and "skipped" not in r
    ]
    if "stock" not in found or not timed:
        return EMPTY
    stock = found["stock"]
    ways = {"forward": ("forward", False), "compiled": ("forward", True), "training": ("training", False)}
    rows = []
    for variant in (name for name in VARIANTS if name in found):
        cells = [
            f"{found[variant][key] / stock[key]:.2f}" for key in ("num_parameters", "flops_per_image", "saved_bytes")
        ]
        for mode, is_compiled in ways.values():
            same = [r for r in timed if (r["variant"], r["mode"], r["is_compiled"]) == (variant, mode, is_compiled)]
            cells.append(_ratio(same[0] if same else None))
        rows.append([variant, *cells])
    header = ["ResNet-18, times stock", "parameters", "FLOPs", "saved activations", *ways]
    shown = [r for r in timed if r["is_compiled"] is False or r["mode"] == "forward"]
    return _with_lines(table(header, rows), shown)


def cost_time() -> str:
    """A row per network, layout, pass and way of running it; the ratios are to stock run in the same way."""
    return _timed("cost_time", _time_label, ["network", "batch", "pass", "run", "layout"], _time_order)


def cost_growth() -> str:
    """A row per batch and resolution."""

    def label(record: dict) -> tuple[str, ...]:
        return record["subject"], str(record["params"]["N"]), str(record["params"]["H"])

    def order(record: dict) -> tuple:
        size = record["params"]["H"]
        return SUBJECTS.index(record["subject"]), size != 224, record["params"]["N"], size

    return _timed("cost_growth", label, ["network", "batch", "pixels"], order)


def _time_label(record: dict) -> tuple[str, ...]:
    how = "compiled" if record["is_compiled"] else "eager"
    return record["subject"], str(record["params"]["N"]), record["mode"], how, record["layout"]


def _time_order(record: dict) -> tuple:
    return SUBJECTS.index(record["subject"]), record["layout"] != "NCHW", record["mode"], record["is_compiled"]


def _timed(
    kind: str, label: Callable[[dict], tuple[str, ...]], header: list[str], order: Callable[[dict], tuple]
) -> str:
    """Rows of what was measured, and below them what was not and why."""
    found = _read(kind)
    groups: dict[tuple[str, ...], dict[str, dict]] = {}
    for record in sorted(found, key=order):
        groups.setdefault(label(record), {})[record["variant"]] = record
    others = [name for name in OTHERS if any(name in by_variant for by_variant in groups.values())]
    rows, notes = [], []
    for name, by_variant in groups.items():
        missing = {variant: r["skipped"] for variant, r in by_variant.items() if "skipped" in r}
        if len(missing) < len(by_variant):
            stock = by_variant.get("stock", {})
            first = f"{stock['ms_per_image']:.2f}" if "ms_per_image" in stock else "failed"
            rows.append([*name, first, *(_ratio(by_variant.get(variant)) for variant in others)])
            notes += [f"{', '.join(name)}: {variant} failed, {reason}." for variant, reason in missing.items()]
        elif all(reason.startswith(NOT_RUN) for reason in missing.values()):
            notes.append(f"{', '.join(name)}: not run.")
        else:
            notes.append(f"{', '.join(name)}: all failed, {next(iter(missing.values()))}.")
    if not rows:
        return "\n\n".join([EMPTY, *_as_list(notes)])
    text = table([*header, "stock, ms per image", *others], rows)
    measured = [record for record in found if "skipped" not in record]
    return _with_lines("\n\n".join([text, *_as_list(notes)]), measured)


def _ratio(record: dict | None) -> str:
    if record is None:
        return "-"
    if "skipped" in record:
        return "failed"
    if "ratio_to_stock" not in record:  # stock failed
        return f"{record['ms_per_image']:.2f} ms"
    return "{p50:.2f} ({p20:.2f} to {p80:.2f})".format(**record["ratio_to_stock"])


def _as_list(notes: list[str]) -> list[str]:
    return ["\n".join(f"- {note}" for note in notes)] if notes else []


def _with_lines(text: str, found: Iterable[dict]) -> str:
    """With the line of every machine, commit, command and day that the records come from."""
    return "\n\n".join([text, *dict.fromkeys(machine_line(record) for record in found)])


def _read(kind: str) -> list[dict]:
    path = RECORDS / "cost.jsonl"
    return [record for record in read("cost", RECORDS) if record["kind"] == kind] if path.exists() else []


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


def lowpass() -> str:
    """The window's mean by two average pools, beside the depthwise convolution; a row per layout and way."""
    found = read("lowpass")
    rows = []
    for record in found:
        cells = [record["layout"], record["provider"]]
        for name in ("forward", "backward"):
            ratio = record["ratio"][name]
            cells.append(f"{record['ms'][name]['p50']:.2f}")
            cells.append(f"{ratio['p50']:.2f} ({ratio['p20']:.2f} to {ratio['p80']:.2f})")
        rows.append(cells)
    header = ["layout", "way", "forward, ms", "times the convolution", "backward, ms", "times the convolution"]
    return table(header, rows) + "\n\n" + machine_line(found[0])
