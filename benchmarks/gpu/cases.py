"""What is timed of a stem on a GPU: the cases, the ways to compile it, and their order."""

from __future__ import annotations

from typing import Any, NamedTuple

from benchmarks.kit.stems import ALEXNET, CMOD, MAX, MIX, MODULUS, PLANS, RESNET, Plan, StemShape
from mixpool import records

DEFAULT, TUNED, UNGRAPHED = "compiled", "max-autotune", "max-autotune no graphs"
COMPILE_MODES = {DEFAULT: None, TUNED: "max-autotune", UNGRAPHED: "max-autotune-no-cudagraphs"}
ROUNDS, REPEATS = 10, 10
# Seconds that a provider is expected to take, compilation mostly; what has run corrects them (Budget.pace).
SECONDS = {DEFAULT: 6.0, TUNED: 15.0, UNGRAPHED: 12.0, None: 0.5}
STOCK = ("stock", "stock reordered")


class Case(NamedTuple):
    """What is timed together; `compilers` are the ways in which stock and reference are compiled."""

    shape: StemShape
    plan: Plan
    batch: int
    mode: str  # "forward" or "full": forward in evaluation, or forward and backward for the weights in training
    dtype: str = "bfloat16"
    layout: str = "channels_last"
    compilers: tuple[str, ...] = (DEFAULT,)

    @property
    def setting(self) -> tuple:
        """What cases share whose stock providers are the same."""
        return (self.shape, self.batch, self.mode, self.dtype, self.layout, self.compilers)

    def providers(self) -> list[str]:
        names = ["stock", *(f"stock {name}" for name in self.compilers)]
        names += [] if self.plan == MAX else ["stock reordered"]
        names += ["reference", *(f"reference {name}" for name in self.compilers), "fused"]
        if self.plan == MIX or TUNED in self.compilers:
            names.append("fused compiled")
        return [*names, "fused graph"] if self.mode == "forward" else names

    def record(self, provider: str, kind: str = "speed", *, dry: bool = False, **fields: Any) -> dict[str, Any]:
        params = self.shape.params(self.batch) | {"num_complex": self.plan.num_complex(self.shape.out_channels)}
        return records.stamp(
            kind,
            case=self.shape.name,
            provider=provider,
            mode=self.mode,
            dtype=self.dtype,
            layout=self.layout,
            plan=self.plan.name,
            params=params,
            **({"dry": True} if dry else {}),
            **fields,
        )

    def seconds(self, providers: list[str]) -> float:
        """Expected, for the budget."""
        return sum(SECONDS[how_compiled(name)] for name in providers) * (1.5 if self.mode == "full" else 1) + 3

    def __str__(self) -> str:
        return f"{self.shape.name} N={self.batch} {self.plan.name} {self.mode} {self.dtype} {self.layout}"


def how_compiled(provider: str) -> str | None:
    """The key of COMPILE_MODES in a provider's name."""
    return next((name for name in (UNGRAPHED, TUNED, DEFAULT) if provider.endswith(f" {name}")), None)


# --- which cases, in which order --------------------------------------------------------------------------------------

ALL_COMPILERS = (DEFAULT, TUNED, UNGRAPHED)
TARGETS = (  # the numbers
    Case(RESNET, MIX, 256, "forward", compilers=ALL_COMPILERS),
    Case(RESNET, MAX, 256, "forward", compilers=ALL_COMPILERS),
    Case(RESNET, CMOD, 256, "forward", compilers=ALL_COMPILERS),
    Case(RESNET, MIX, 256, "full", compilers=ALL_COMPILERS),
)


def cases_of(part: str, *, quick: bool = False, dry: bool = False) -> list[Case]:
    """The cases of a part, the most important first.

    "stem": the issue's targets, then the other plans of the same setting; "table": what else decides where the fused
    path is worth it (plans of one pooling, other dtypes and layouts, against max-autotune); "shapes": other stems and
    batches, and float32 images under autocast, against torch.compile's default.
    """
    if part == "stem":
        others = [(MODULUS, "forward"), (MODULUS, "full"), (CMOD, "full"), (MAX, "full")]
        found = [*TARGETS, *(Case(RESNET, plan, 256, mode, compilers=ALL_COMPILERS) for plan, mode in others)]
        found = found[: len(TARGETS)] if quick else found
        if dry:
            small = found[3]._replace(plan=CMOD, dtype="tf32", compilers=(DEFAULT,))
            found = [found[0]._replace(plan=CMOD, compilers=(DEFAULT, TUNED)), small]
    elif part == "table":
        settings = [("float16", "channels_last"), ("bfloat16", "NCHW"), ("tf32", "channels_last")]
        found = [
            Case(RESNET, plan, 256, mode, dtype, layout, (UNGRAPHED,))
            for dtype, layout in settings
            for mode in ("forward", "full")
            for plan in (MODULUS, MAX, CMOD, MIX)
        ]
        found = found[:4] if quick else found
        if dry:
            found = [found[2]]
    elif part == "shapes":
        found = [Case(RESNET, MIX, 256, mode, "autocast") for mode in ("forward", "full")]
        found += [
            Case(shape, plan, batch, mode)
            for shape, batch in ((RESNET, 64), (ALEXNET, 256))
            for mode in ("forward", "full")
            for plan in PLANS
        ]
        found = found[:2] if quick else found
        if dry:
            found = [found[1]._replace(plan=CMOD), found[-2]._replace(compilers=())]
    else:
        raise ValueError(f"expected stem, table or shapes, got {part!r}")
    return [shrunk(case) for case in found] if dry else found


def shrunk(case: Case) -> Case:
    """So small that a CPU, and Triton's interpreter (0.2 s for CMOD, 1.4 s for MIX), take little time.

    In float16 instead of bfloat16, which the interpreter cannot multiply.
    """
    case = case._replace(dtype="float16") if case.dtype == "bfloat16" else case
    return case._replace(shape=case.shape._replace(size=43 if case.shape == ALEXNET else 20, out_channels=8), batch=1)
