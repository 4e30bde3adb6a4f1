"""The tables of what was evaluated and trained, from the records of the same names."""

from __future__ import annotations

from benchmarks.markdown import machine_line, read, table
from benchmarks.store import RECORDS

NOT_RUN = "Not run yet."
DIRECTIONS = ("horizontal", "vertical", "diagonal")
PIXELS = ("1", "2", "4", "8")


def evaluation_speed() -> str:
    """Crops per second of a whole evaluation over those of the model alone."""
    found = [r for r in _read("evaluation") if r["kind"] == "evaluation_speed"]
    rows = []
    for r in found:
        shares = [f"{r['ratio']:.0%}", f"{r['waited_share']:.0%}"]
        rows.append([r["model"], r["case"], str(r["num_images"]), f"{r['crops']:,}", *shares])
    header = ["model", "protocols", "photos", "crops", "speed of the plain forward", "time without an image"]
    return _with_line(table(header, rows), found)


def evaluation() -> str:
    """Stock and converted side by side, without fine-tuning."""
    found = [r for r in _read("evaluation") if r["kind"] == "evaluation"]
    if not found:
        return NOT_RUN
    numbers = {"top-1 %": ("top1",), "top-5 %": ("top5",), "shift consistency %": ("shift_consistency",)}
    numbers |= {"circular consistency %": ("circular_consistency",)}
    numbers |= {f"flips % {k} px {way}": ("flip_probability", way, k) for way in DIRECTIONS for k in PIXELS}
    numbers |= {f"KL, 0.01 nats, {k} px {way}": ("kl", way, k) for way in DIRECTIONS for k in ("0.5", "1", "4")}
    rows = []
    for label, path in numbers.items():
        scale = 100 if path[0] == "kl" else 1
        cells = [_interval(r, *path, scale=scale) for r in found]
        rows.append([label, *cells, _difference(found[1]["difference"], *path, scale=scale)])
    header = [f"{found[0]['num_images']} photos", *(r["model"] for r in found), "difference"]
    return _with_line(table(header, rows), found)


def finetune() -> str:
    """The converted network less the stock one, before and after both were distilled in the same way."""
    found = _read("finetune")
    numbers = {"top-1 %": ("top1",), "shift consistency %": ("shift_consistency",)}
    numbers |= {f"flips % {k} px {way}": ("flip_probability", way, k) for way in DIRECTIONS for k in ("1", "4")}
    rows = []
    for record in found:
        for label, path in numbers.items():
            for when in ("before", "after"):
                values = [_at(record["results"][f"{model} {when}"], path) for model in ("stock", "mixpool")]
                shown = [f"{value:.2f}" for value in values]
                difference = _difference(record["differences"][f"mixpool - stock, {when}"], *path)
                rows.append([str(record["seed"]), label, when, *shown, difference])
    header = ["split", "quantity", "distillation", "stock", "mixpool", "difference (95 % interval)"]
    return _with_line(table(header, rows), found)


def _read(name: str) -> list[dict]:
    return read(name) if (RECORDS / f"{name}.jsonl").exists() else []


def _with_line(text: str, found: list[dict]) -> str:
    return f"{text}\n\n{machine_line(found[0])}" if found else NOT_RUN


def _at(values, path: tuple[str, ...]):
    for name in path:
        values = values[name]
    return values


def _interval(record: dict, *path: str, scale: float = 1) -> str:
    low, high = _at(record["ci95"], path)
    return f"{_at(record['summary'], path) * scale:.2f} ({low * scale:.2f} to {high * scale:.2f})"


def _difference(difference: dict, *path: str, scale: float = 1) -> str:
    low, high = _at(difference["ci95"], path)
    return f"{_at(difference['summary'], path) * scale:+.2f} ({low * scale:+.2f} to {high * scale:+.2f})"
