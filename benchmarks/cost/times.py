"""Time of stems and networks on this CPU against stock, all variants of a case interleaved in one process.

A case is measured as a whole or not at all. A variant that cannot run (no compiler, say) gets a record with the reason
and never another one's time: compilation is of the whole graph, and in evaluation its output is compared with eager's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.cost.models import BLUR_STEM, ENERGY, NETWORKS, STEMS, TIMM_AA, build, random_images, variants_of
from benchmarks.kit import timing
from benchmarks.kit.stems import Unavailable
from benchmarks.kit.store import NOT_RUN, Store
from benchmarks.kit.timing import Budget, release, rounded
from mixpool import records

MODES = ("forward", "training")
BATCH, SIZE = 8, 224
# Where every variant costs minutes of compilation or of large batches.
FEW = ("stock", BLUR_STEM, TIMM_AA, "mixpool", ENERGY)
BATCHES, SIZES = (1, 4, 16, 64), (128, 224, 320, 448)
MIN_ROUNDS, MAX_ROUNDS = 3, 41
# Seconds that a case's rounds may take, when the fewest do not take longer.
SECONDS = {"stem": 8.0, "network": 15.0}
# Seconds that torch.compile is expected to take for one variant on two cores (forward, training); only for the budget.
COMPILE_SECONDS = {"stem": (4, 8), "resnet18": (20, 30), "alexnet": (6, 10), "resnet34": (35, 55), "resnet50": (45, 75)}


class Case(NamedTuple):
    """What is timed together: "forward" in evaluation, or in "training" forward and backward for the parameters."""

    kind: str  # of the record: "cost_time" or "cost_growth"
    subject: str
    mode: str
    is_compiled: bool = False
    layout: str = "NCHW"
    batch: int = BATCH
    size: int = SIZE

    def variants(self) -> tuple[str, ...]:
        found = variants_of(self.subject)
        needs_few = self.subject in NETWORKS and (self.is_compiled or self.kind == "cost_growth")
        return tuple(name for name in found if name in FEW) if needs_few else found

    @property
    def seconds(self) -> float:
        """What the case is expected to take."""
        size = "stem" if self.subject in STEMS else self.subject
        compilation = COMPILE_SECONDS[size][self.mode == "training"] * len(self.variants()) if self.is_compiled else 0
        return SECONDS["stem" if self.subject in STEMS else "network"] * 1.5 + compilation

    def record(self, variant: str, **fields: Any) -> dict[str, Any]:
        # The size belongs to the name, by which the store tells records apart.
        name = f"{self.subject} {self.size} px" if self.kind == "cost_growth" else self.subject
        return records.stamp(
            self.kind,
            case=name,
            subject=self.subject,
            provider=f"{variant} compiled" if self.is_compiled else variant,
            variant=variant,
            is_compiled=self.is_compiled,
            mode=self.mode,
            dtype="float32",
            layout=self.layout,
            params={"N": self.batch, "H": self.size, "W": self.size},
            **fields,
        )

    def __str__(self) -> str:
        how = "compiled" if self.is_compiled else "eager"
        return f"{self.subject} {self.mode} {how} {self.layout} {self.batch} x {self.size} px"


def time_cases() -> list[Case]:
    """Everything eager first, then what torch.compile makes of it, the most telling and the quickest first."""
    layouts = {subject: ("NCHW", "channels_last") if subject in STEMS else ("NCHW",) for subject in (*STEMS, *NETWORKS)}
    eager = [
        Case("cost_time", subject, mode, layout=layout)
        for subject, found in layouts.items()
        for layout in found
        for mode in MODES
    ]
    order = ("resnet18", "alexnet", "resnet34", "resnet50")
    places = [(stem, "NCHW") for stem in STEMS] + [("resnet18", "NCHW")] + [(stem, "channels_last") for stem in STEMS]
    places += [(network, "NCHW") for network in order[1:]]
    compiled = [Case("cost_time", subject, mode, True, layout) for subject, layout in places for mode in MODES]
    return eager + compiled


def growth_cases() -> list[Case]:
    """The forward pass of the ResNet stem and of ResNet-18 over batches, and at batch 8 over resolutions."""
    settings = [(batch, SIZE) for batch in BATCHES] + [(BATCH, size) for size in SIZES]
    return [
        Case("cost_growth", subject, "forward", batch=batch, size=size)
        for subject in ("resnet stem", "resnet18")
        for batch, size in sorted(settings, key=lambda pair: (pair[1] != SIZE, pair))
    ]


def run_cases(cases: Iterable[Case], store: Store, budget: Budget, *, again: bool = False) -> None:
    """Time what this code has not been timed on, on as many threads; a case is written when it is done."""
    timing.keep_heap()
    for case in cases:
        blank = [case.record(variant) for variant in case.variants()]
        if not again and all(_is_done(record, store) for record in blank):
            continue
        if not budget.allows(case.seconds):
            # A time that an earlier code had stays until there is a new one.
            store.add(*({**record, "skipped": NOT_RUN + "out of time"} for record in blank if not _old(record, store)))
            print(f"{case}: out of time; another call goes on here", flush=True)
            continue
        with budget.spending(case.seconds):
            found = timed(case)
        names = {_what(record) for record in found}
        store.drop(lambda old, names=names: _what(old) in names)
        store.add(*found)


def _is_done(record: dict, store: Store) -> bool:
    found = store.find(record)
    return store.has(record) and found["machine"]["threads"] == record["machine"]["threads"]


def _old(record: dict, store: Store) -> bool:
    return any(_what(other) == _what(record) for other in store)


def _what(record: dict) -> tuple:
    """What was timed, whatever the code and the machine."""
    return (*(record.get(name) for name in ("kind", "case", "provider", "mode", "layout")), record["params"]["N"])


def timed(case: Case) -> list[dict[str, Any]]:
    """The records of one case."""
    release()
    calls: dict[str, Callable[[], object]] = {}
    reasons: dict[str, str] = {}
    x = random_images(case.batch, case.size, case.layout)
    for variant in case.variants():
        try:
            calls[variant] = prepared(case, variant, x)
        except Unavailable as error:
            reasons[variant] = str(error)
    samples = timing.interleave(calls, num_rounds(calls, case), 1, "cpu")
    print(case, flush=True)
    found = []
    for variant in case.variants():
        if variant in reasons:
            found.append(case.record(variant, skipped=reasons[variant]))
            print(f"    {variant:19s} skipped: {reasons[variant]}", flush=True)
            continue
        ms = timing.milliseconds(samples[variant])
        fields: dict[str, Any] = {"ms": rounded(ms), "ms_per_image": rounded({"p50": ms["p50"] / case.batch})["p50"]}
        ratio = ""
        if "stock" in samples:
            fields["ratio_to_stock"] = rounded(timing.ratio(samples[variant], samples["stock"]))
            ratio = "{p50:.2f} x stock ({p20:.2f} to {p80:.2f})".format(**fields["ratio_to_stock"])
        found.append(case.record(variant, **fields))
        print(f"    {variant:19s} {ms['p50']:8.1f} ms   {ratio}, {ms['n']} rounds", flush=True)
    return found


def num_rounds(calls: dict[str, Callable[[], object]], case: Case) -> int:
    """As many rounds as fit into the case's seconds, by one round that does not count."""
    one = sum(times[0][0] for times in timing.interleave(calls, 1, 1, "cpu").values()) / 1e3
    seconds = SECONDS["stem" if case.subject in STEMS else "network"]
    return MAX_ROUNDS if one == 0 else max(MIN_ROUNDS, min(MAX_ROUNDS, int(seconds / one)))


def prepared(case: Case, variant: str, x: Tensor) -> Callable[[], object]:
    """One pass of a variant, which has run once; Unavailable with the reason if it cannot."""
    made: list[Callable[[], object]] = []

    def prepare() -> None:
        module = build(case.subject, variant).train(case.mode == "training")
        run = compiled(module) if case.is_compiled else module
        made.append(training_pass(module, run, x) if case.mode == "training" else forward_pass(run, x))
        out = made[0]()
        if case.is_compiled and case.mode == "forward":
            check_same(out, forward_pass(module, x)())

    reason = timing.attempt(prepare, "cpu")
    if reason is not None:
        raise Unavailable(reason)
    return made[0]


def compiled(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """torch.compile of the whole graph: a part that it cannot take is an error, not a return to eager."""
    return torch.compile(module, fullgraph=True, dynamic=False)


def check_same(out: Tensor, expected: Tensor) -> None:
    """RuntimeError unless the outputs agree, to a thousandth of the largest."""
    difference, largest = (out - expected).abs().max().item(), expected.abs().max().item()
    if not difference <= 1e-3 * largest:  # also where it is NaN
        raise RuntimeError(f"compiled differs by {difference:.3g} from eager, whose largest output is {largest:.3g}")


def forward_pass(run: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], Tensor]:
    @torch.no_grad()
    def forward() -> Tensor:
        return run(x)

    return forward


def training_pass(module: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """Forward, and backward for all parameters from one random upstream gradient."""
    parameters = list(module.parameters())
    upstream: list[Tensor] = []

    def step() -> tuple[Tensor, ...]:
        out = run(x)
        if not upstream:
            upstream.append(torch.randn_like(out))  # in the output's own memory format
        return torch.autograd.grad(out, parameters, upstream[0])

    return step
