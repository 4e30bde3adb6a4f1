"""What the GPU's records say: the project's targets, met or missed.

Everything here reads records and runs no model. A speedup is the median time of the one over that of the other, both
from one interleaved run. "Compiled" is the fastest that torch.compile made of it, in any of the modes that ran.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import NamedTuple

MODES = {"forward": "inference", "full": "training"}
COMPILED = ("compiled", "max-autotune", "max-autotune no graphs")
TUNED = ("max-autotune", "max-autotune no graphs")


class Target(NamedTuple):
    """A number that the project wants; `value` computes it, None where it was not measured."""

    text: str
    goal: float
    is_at_most: bool
    form: str
    value: Callable[[list[dict]], float | None]

    def is_met(self, value: float) -> bool:
        return value <= self.goal if self.is_at_most else value >= self.goal


def of_case(
    found: Iterable[dict], kind: str, plan: str, mode: str, *, case="resnet_stem", dtype=None, layout=None
) -> dict[str, dict]:
    """provider -> record of one case at its largest batch, without what was skipped; bfloat16 channels_last if None."""
    wanted = [
        r
        for r in found
        if (r["kind"], r.get("case"), r.get("plan"), r.get("mode")) == (kind, case, plan, mode)
        and r["dtype"] == (dtype or "bfloat16")
        and r["layout"] == (layout or "channels_last")
        and "skipped" not in r
    ]
    largest = max((r["params"]["N"] for r in wanted), default=None)
    return {r["provider"]: r for r in wanted if r["params"]["N"] == largest}


def fastest(providers: dict[str, dict], name: str, variants: Iterable[str] = COMPILED) -> float | None:
    """Milliseconds of the fastest way to compile a provider that was measured."""
    times = [providers[key]["ms"]["p50"] for v in variants if (key := f"{name} {v}") in providers]
    return min(times, default=None)


def _fused(providers: dict[str, dict]) -> float | None:
    return providers["fused"]["ms"]["p50"] if "fused" in providers else None


def _quotient(above: float | None, below: float | None) -> float | None:
    return None if above is None or below is None else above / below


def stem_speedup(plan: str, mode: str, base: str) -> Callable[[list[dict]], float | None]:
    """The fused path over "stock" (eager) or "stock compiled"."""

    def value(found: list[dict]) -> float | None:
        providers = of_case(found, "speed", plan, mode)
        if base == "stock":
            return _quotient(providers["stock"]["ms"]["p50"] if "stock" in providers else None, _fused(providers))
        return _quotient(fastest(providers, "stock"), _fused(providers))

    return value


def held_share(found: list[dict]) -> float | None:
    """Memory that the fused stem holds between forward and backward over that of the stock one."""
    providers = of_case(found, "memory", "mix", "full")
    held = [providers.get(name, {}).get("held_mib") for name in ("fused", "stock")]
    return _quotient(*held)


def share_of_floor(plan: str) -> Callable[[list[dict]], float | None]:
    def value(found: list[dict]) -> float | None:
        fused = of_case(found, "speed", plan, "forward").get("fused")
        return None if fused is None else fused["fraction_of_floor"]

    return value


def model_speedup(suffix: str) -> Callable[[list[dict]], float | None]:
    """ResNet-50 in training: images per second of mixpool over stock."""

    def value(found: list[dict]) -> float | None:
        speed = {
            r["provider"]: r["images_per_s"]
            for r in found
            if r["kind"] == "model_speed" and (r["case"], r["mode"]) == ("resnet50", "training") and "skipped" not in r
        }
        return _quotient(speed.get(f"mixpool fused{suffix}"), speed.get(f"stock{suffix}"))

    return value


def passing(dtype: str, field: str) -> Callable[[list[dict]], float | None]:
    """Share of the accuracy cases of a dtype that pass."""

    def value(found: list[dict]) -> float | None:
        cases = [r for r in found if r["kind"] == "accuracy" and r["dtype"] == dtype and "skipped" not in r]
        return sum(bool(r[field]) for r in cases) / len(cases) if cases else None

    return value


TARGETS = (
    Target("mix, inference, over compiled stock", 2.0, False, "{:.2f} x", stem_speedup("mix", "forward", "")),
    Target("mix, inference, over eager stock", 4.0, False, "{:.2f} x", stem_speedup("mix", "forward", "stock")),
    Target("mix, training, over compiled stock", 1.3, False, "{:.2f} x", stem_speedup("mix", "full", "")),
    Target("mix, training, over eager stock", 2.5, False, "{:.2f} x", stem_speedup("mix", "full", "stock")),
    Target("mix, memory held for backward, of eager's", 0.25, True, "{:.0%}", held_share),
    Target("all-max, inference, over compiled stock", 2.0, False, "{:.2f} x", stem_speedup("max", "forward", "")),
    Target("all-cmod, inference, of the roofline", 0.5, False, "{:.0%}", share_of_floor("cmod")),
    Target("ResNet-50 training, mixpool over stock, eager", 1.0, False, "{:.3f} x", model_speedup("")),
    Target("ResNet-50 training, mixpool over stock, compiled", 1.0, False, "{:.3f} x", model_speedup(" compiled")),
    Target("bfloat16 cases within twice eager's error", 1.0, False, "{:.0%}", passing("bfloat16", "within")),
    Target("float16 cases within twice eager's error", 1.0, False, "{:.0%}", passing("float16", "within")),
    Target("bfloat16 cases bitwise repeatable", 1.0, False, "{:.0%}", passing("bfloat16", "bitwise_repeatable")),
)


def target_rows(found: list[dict]) -> list[list[str]]:
    """What, target, measured, "met" or "missed" or "not measured"."""
    rows = []
    for target in TARGETS:
        value = target.value(found)
        goal = ("<= " if target.is_at_most else ">= ") + target.form.format(target.goal)
        if value is None:
            rows.append([target.text, goal, "-", "not measured"])
        else:
            rows.append([target.text, goal, target.form.format(value), "met" if target.is_met(value) else "missed"])
    return rows


def summary(found: list[dict]) -> str:
    """The short table that a run prints last."""
    rows = target_rows(found)
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    floors = {
        f"{plan} {MODES[mode]}": of_case(found, "speed", plan, mode).get("fused")
        for plan in ("mix", "max", "cmod", "modulus")
        for mode in MODES
    }
    shares = [f"{name} {r['fraction_of_floor']:.0%}" for name, r in floors.items() if r is not None]
    if shares:
        lines.append("share of the roofline's floor: " + ", ".join(shares))
    checks = [f"{r['check']} {r.get('status') or 'skipped: ' + r['skipped']}" for r in found if r["kind"] == "check"]
    lines += ["checks: " + "; ".join(checks)] if checks else []
    odd = sorted({f"{n}: {s}" for r in found for n, s in r.get("odd_images", {}).items() if s != "passed"})
    lines += ["odd images: " + "; ".join(odd)] if odd else []
    reasons = Counter(r["skipped"] for r in found if "skipped" in r and "fused" in r.get("provider", ""))
    lines += [f"fused skipped {count} times: {reason}" for reason, count in reasons.most_common(5)]
    if any(r.get("dry") for r in found):
        lines.append("dry run: these numbers mean nothing")
    return "\n".join(lines)
