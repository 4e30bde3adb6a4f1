"""The table of converted pretrained classifiers, from the records of `benchmarks.pretrained`."""

from __future__ import annotations

from benchmarks.kit.markdown import at, origins, read, table
from benchmarks.kit.store import RECORDS

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
    "mixpool_max_blur": "mixpool, max_blur=3",
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
