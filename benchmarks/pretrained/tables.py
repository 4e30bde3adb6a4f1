"""The tables of converted pretrained classifiers: SqueezeNet at once, its evaluation, and all after distillation."""

from __future__ import annotations

from statistics import mean

from benchmarks.kit.markdown import at, machine_line, origins, read, table
from benchmarks.kit.store import RECORDS

# The tables, by the names that pages call them.
__all__ = [
    "conversion",
    "shifts",
    "evaluation_speed",
    "evaluation",
    "pretrained",
]

DIRECTIONS = ("horizontal", "vertical", "diagonal")
PIXELS = ("1", "2", "4", "8")
NOT_RUN = "Not run yet."
COMMAND = "python -m benchmarks.pretrained"
# In the order of the table; the records have these words in the order in which the runs ended.
NETWORKS = {"squeezenet": "SqueezeNet 1.0", "open_nsfw": "open_nsfw"}
STAGES = ("zero-shot", "calibrated", "distilled")
VARIANTS = {
    "stock": "stock",
    "blurpool": "BlurPool",
    "cmod": "CMod",
    "cmod_band_pass": "CMod, all band-pass",
    "mixpool": "mixpool",
    "mixpool_rest_blurpool": "mixpool, rest BlurPool",
}
# Where each quantity lies whose value stands with its paired difference to stock, and how it is written. KL differs by
# orders of magnitude between the networks.
FLIPS = {
    f"flips % {way[0]}{shift}": (("flip_probability", way, shift), ".2f")
    for way, shift in (("horizontal", "1"), ("vertical", "1"), ("diagonal", "1"), ("horizontal", "4"))
}
COLUMNS = {
    "consistency %": (("shift_consistency",), ".2f"),
    **FLIPS,
    "KL h1, nats": (("kl", "horizontal", "1"), ".3g"),
    "stem change h1, std": (("stem_change", "horizontal", "1"), ".3f"),
}


# --- SqueezeNet at once -----------------------------------------------------------------------------------------------


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


# --- its evaluation ---------------------------------------------------------------------------------------------------


def evaluation_speed() -> str:
    """Crops per second of a whole evaluation over those of the model alone."""
    found = [r for r in read("evaluation") if r["kind"] == "evaluation_speed"]
    rows = []
    for r in found:
        shares = [f"{r['ratio']:.0%}", f"{r['waited_share']:.0%}"]
        rows.append([r["model"], r["case"], str(r["num_images"]), f"{r['crops']:,}", *shares])
    header = ["model", "protocols", "photos", "crops", "speed of the plain forward", "time without an image"]
    return f"{table(header, rows)}\n\n{machine_line(found[0])}"


def evaluation() -> str:
    """Stock and converted side by side, without fine-tuning."""
    found = [r for r in read("evaluation") if r["kind"] == "evaluation"]
    numbers = {"top-1 %": ("top1",), "top-5 %": ("top5",), "shift consistency %": ("shift_consistency",)}
    numbers |= {"circular consistency %": ("circular_consistency",)}
    numbers |= {f"flips % {k} px {way}": ("flip_probability", way, k) for way in DIRECTIONS for k in PIXELS}
    numbers |= {f"KL, 0.01 nats, {k} px {way}": ("kl", way, k) for way in DIRECTIONS for k in ("0.5", "1", "4")}
    rows = []
    for label, path in numbers.items():
        scale = 100 if path[0] == "kl" else 1
        cells = [_with_interval(r, *path, scale=scale) for r in found]
        rows.append([label, *cells, _change(found[1]["difference"], *path, scale=scale)])
    header = [f"{found[0]['num_images']} photos", *(r["model"] for r in found), "difference"]
    return f"{table(header, rows)}\n\n{machine_line(found[0])}"


def _with_interval(record: dict, *path: str, scale: float = 1) -> str:
    low, high = at(record["ci95"], path)
    return f"{at(record['summary'], path) * scale:.2f} ({low * scale:.2f} to {high * scale:.2f})"


def _change(difference: dict, *path: str, scale: float = 1) -> str:
    low, high = at(difference["ci95"], path)
    return f"{at(difference['summary'], path) * scale:+.2f} ({low * scale:+.2f} to {high * scale:+.2f})"


# --- at once, calibrated, distilled -----------------------------------------------------------------------------------


def pretrained() -> str:
    """A row for each network, stage, variant and split."""
    if not (RECORDS / "pretrained.jsonl").exists():
        return NOT_RUN
    latest = {(r["network"], r["variant"], r["split"]): r for r in read("pretrained", RECORDS)}
    if not latest:
        return NOT_RUN
    rows = []
    for network, label in NETWORKS.items():
        for stage in STAGES:
            for variant, name in VARIANTS.items():
                for key in sorted(key for key in latest if key[:2] == (network, variant)):
                    if stage in latest[key]["stages"]:
                        rows.append([label, stage, name, str(key[2]), *_cells(latest[key]["stages"][stage])])
    header = ["network", "stage", "stem", "split", "modulus channels", "top-1 % (95 % interval)", "change of top-1"]
    first = next(iter(latest.values()))
    photos = f"{first['num_images']} photos, of which KL saw {first['kl_images']}"
    return f"{table([*header, *COLUMNS], rows)}\n\n{photos}. {origins(list(latest.values()), COMMAND)}"


def _cells(found: dict) -> list[str]:
    """What was measured at a stage: the values, and where it is not the stock network their differences to it."""
    difference = found.get("difference")
    top1, change = "-", "-"
    if "top1" in found["summary"]:
        top1 = _interval(found, ("top1",))
        change = "-" if difference is None else _interval(difference, ("top1",), "+.2f")
    cells = [str(found["num_modulus"]), top1, change]
    for path, form in COLUMNS.values():
        value = f"{at(found['summary'], path):{form}}"
        cells.append(value if difference is None else f"{value}: {_interval(difference, path, '+' + form)}")
    return cells


def _interval(found: dict, path: tuple[str, ...], form: str = ".2f") -> str:
    """Mean and, in brackets, the ends of its 95 % interval."""
    mean, (low, high) = (at(found[key], path) for key in ("summary", "ci95"))
    return f"{mean:{form}} ({low:{form}} to {high:{form}})"
