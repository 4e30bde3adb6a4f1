"""What a stabilization found, did and changed: for people, as a record, and as a picture."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixpool import records
from mixpool.stabilization.agreement import SHIFTS, Steadiness, interval_of
from mixpool.stabilization.repair import Repaired
from mixpool.stabilization.treat import Decimator


@dataclass(frozen=True)
class StabilizationReport:
    """What `stabilize` found, did and changed; `print` it.

    Attributes:
        decimators: every layer that decimates, and what was done with it.
        plan: name -> treatment, as `treat` takes it.
        stem: pooling of the stem in the end, of `stabilize`'s words.
        repaired: what the repair did, in the order of the data.
        before, after: the stock and the stabilized network on the images that neither fitted nor chose.
        num_images: (to fit on, to choose by, to report on).
        settings: what was asked for.
        notes: what else a user should know.
        seconds: of the whole.
        kept_bytes: memory that the kept stock weights take until `finalize`.
    """

    decimators: tuple[Decimator, ...]
    plan: dict[str, str]
    stem: str
    repaired: tuple[Repaired, ...]
    before: Steadiness
    after: Steadiness
    num_images: tuple[int, int, int]
    settings: dict[str, Any]
    notes: tuple[str, ...]
    seconds: float
    kept_bytes: int

    @property
    def same_class(self) -> dict[str, float] | None:
        """Share of the images that keep their class, percent, with its interval; None if it is no classifier."""
        if self.before.classes is None:
            return None
        return interval_of(100 * (self.before.classes == self.after.classes).double())

    def ratio(self, name: str) -> float:
        """A mean after over before, such as "flips_1px"; NaN where there was nothing before."""
        before, after = (s.summary()[name]["mean"] for s in (self.before, self.after))
        return after / before if before else float("nan")

    def as_record(self) -> dict[str, Any]:
        """JSON: one record."""
        return records.stamp(
            "stabilization",
            stem=self.stem,
            plan=self.plan,
            decimators=[vars(own) for own in self.decimators],
            repaired=[vars(own) for own in self.repaired],
            before=self.before.summary(),
            after=self.after.summary(),
            same_class=self.same_class,
            num_images=self.num_images,
            settings=self.settings,
            notes=list(self.notes),
            seconds=round(self.seconds, 2),
            kept_bytes=self.kept_bytes,
        )

    def __str__(self) -> str:
        treated = sum(own.treatment is not None for own in self.decimators)
        lines = [f"{treated} of {len(self.decimators)} decimating layers low-passed, stem: {self.stem}"]
        lines += [f"  {own}" for own in self.decimators]
        refitted = sum(own.what == "refitted" for own in self.repaired)
        lines.append(f"{refitted} layers refitted in {self.seconds:.0f} s on {self.num_images[0]} images")
        lines += [f"  {own.name or 'statistics'} left: {own.why}" for own in self.repaired if own.what == "left"]
        lines.append(f"on {self.num_images[2]} other images (95 % interval), before -> after:")
        before, after = self.before.summary(), self.after.summary()
        names = {"top1": "top-1, %"}
        names |= {f"flips_{k}px": f"flips at {k} px, %" for k in SHIFTS}
        what = "KL" if self.before.flips is not None else "relative change"
        names |= {f"movement_{k}px": f"{what} at {k} px" for k in SHIFTS}
        for name, title in names.items():
            if name in before:
                lines.append(f"  {title:18s} {_shown(before[name])} -> {_shown(after[name])}")
        if self.same_class is not None:
            lines.append(f"  {'same class, %':18s} {_shown(self.same_class)}")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def plot(self, path: str | Path) -> Path:
        """Flips (or the outputs' change) before and after, over the shift, as a .png or .svg."""
        from mixpool.figures import MAX_COLOR, MODULUS_COLOR, blank_figure, inch_axes, plain_axes, save_figure

        name, title = ("flips", "flips, %") if self.before.flips is not None else ("movement", "relative change")
        figure = blank_figure(4.6, 3.3)
        axes = inch_axes(figure, 0.7, 0.6, 3.7, 2.5)
        plain_axes(axes)
        for label, found, color in (("stock", self.before, MAX_COLOR), ("stabilized", self.after, MODULUS_COLOR)):
            points = [found.summary()[f"{name}_{k}px"] for k in SHIFTS]
            means, low, high = ([point[key] for point in points] for key in ("mean", "low", "high"))
            axes.plot(SHIFTS, means, marker="o", color=color, label=label)
            axes.fill_between(SHIFTS, low, high, color=color, alpha=0.15, lw=0)
        axes.set(xlabel="shift of the picture, pixels", ylabel=title, xticks=SHIFTS)
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False, fontsize=9)
        return save_figure(figure, path)


def _shown(interval: dict[str, float]) -> str:
    return "{mean:.3g} ({low:.3g} to {high:.3g})".format(**interval)
