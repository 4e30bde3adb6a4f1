"""The tables of stock and converted evaluated side by side, from the records of `benchmarks.evaluation`."""

from __future__ import annotations

from benchmarks.kit.markdown import at, machine_line, read, table

DIRECTIONS = ("horizontal", "vertical", "diagonal")
PIXELS = ("1", "2", "4", "8")


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
        cells = [_interval(r, *path, scale=scale) for r in found]
        rows.append([label, *cells, _difference(found[1]["difference"], *path, scale=scale)])
    header = [f"{found[0]['num_images']} photos", *(r["model"] for r in found), "difference"]
    return f"{table(header, rows)}\n\n{machine_line(found[0])}"


def _interval(record: dict, *path: str, scale: float = 1) -> str:
    low, high = at(record["ci95"], path)
    return f"{at(record['summary'], path) * scale:.2f} ({low * scale:.2f} to {high * scale:.2f})"


def _difference(difference: dict, *path: str, scale: float = 1) -> str:
    low, high = at(difference["ci95"], path)
    return f"{at(difference['summary'], path) * scale:+.2f} ({low * scale:+.2f} to {high * scale:+.2f})"
