"""The stem on a GPU: time, memory and kernels of what a model has today, of mixpool's reference and of its fused path.

One case is a stem, a plan, a batch, a dtype, a layout and a pass; its providers run interleaved, in one process:

    stock                   conv, norm, ReLU, max pool as torchvision and timm have them
    stock reordered         the same numbers, pooled before the affine step (mixpool's reference of the plan "max")
    reference, fused        mixpool with the case's plan, by the name of its backend
    ... compiled            torch.compile
    ... max-autotune        torch.compile(mode="max-autotune"): CUDA graphs, the input's address declared as fixed
    ... max-autotune no graphs    the same without CUDA graphs
    fused graph             the forward pass captured in a CUDA graph

A provider that is not there, or that fails, yields a record with the reason and never another path's time.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.gpu.roofline import floor_of
from benchmarks.kit import timing
from benchmarks.kit.stems import (
    ALEXNET,
    MAX,
    MIX,
    MODULUS1,
    MODULUS3,
    PLANS,
    RESNET,
    Plan,
    StemShape,
    Unavailable,
    images,
    mixpool_stem,
    stock_stem,
)
from benchmarks.kit.store import NOT_RUN, Store
from benchmarks.kit.timing import Budget, DeviceLost
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
        channels = self.shape.out_channels
        params = self.shape.params(self.batch) | {
            "num_modulus": self.plan.num_modulus(channels),
            "blur": self.plan.blur,
            "max_blur": 1,
        }
        return records.stamp(
            kind,
            case=self.shape.name,
            provider=provider,
            mode=self.mode,
            dtype=self.dtype,
            layout=self.layout,
            plan=self.plan.kind,
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
    Case(RESNET, MODULUS1, 256, "forward", compilers=ALL_COMPILERS),
    Case(RESNET, MIX, 256, "full", compilers=ALL_COMPILERS),
)


def cases_of(part: str, *, quick: bool = False, dry: bool = False) -> list[Case]:
    """The cases of a part, the most important first.

    "stem": the issue's targets, then the other plans of the same setting; "table": what else decides where the fused
    path is the default (single-kind plans, other dtypes and layouts, against max-autotune); "shapes": other stems and
    batches, and float32 images under autocast, against torch.compile's default.
    """
    if part == "stem":
        others = [(MODULUS3, "forward"), (MODULUS3, "full"), (MODULUS1, "full"), (MAX, "full")]
        found = [*TARGETS, *(Case(RESNET, plan, 256, mode, compilers=ALL_COMPILERS) for plan, mode in others)]
        found = found[: len(TARGETS)] if quick else found
        if dry:
            small = found[3]._replace(plan=MODULUS1, dtype="tf32", compilers=(DEFAULT,))
            found = [found[0]._replace(compilers=(DEFAULT, TUNED)), small]
    elif part == "table":
        settings = [("float16", "channels_last"), ("bfloat16", "NCHW"), ("tf32", "channels_last")]
        found = [
            Case(RESNET, plan, 256, mode, dtype, layout, (UNGRAPHED,))
            for dtype, layout in settings
            for mode in ("forward", "full")
            for plan in (MODULUS3, MAX, MODULUS1, MIX)
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
            found = [found[1]._replace(plan=MODULUS1), found[-2]]
    else:
        raise ValueError(f"expected stem, table or shapes, got {part!r}")
    return [shrunk(case) for case in found] if dry else found


def shrunk(case: Case) -> Case:
    """So small that a CPU, and Triton's interpreter (0.2 s for MODULUS1, 1.4 s for MIX), take little time.

    In float16 instead of bfloat16, which the interpreter cannot multiply.
    """
    case = case._replace(dtype="float16") if case.dtype == "bfloat16" else case
    return case._replace(shape=case.shape._replace(size=43 if case.shape == ALEXNET else 20, out_channels=8), batch=1)


# --- time -------------------------------------------------------------------------------------------------------------


def run_speed(part: str, store: Store, budget: Budget, device: str, *, quick=False, dry=False, again=False) -> None:
    """Time the cases of a part; each case's records are written when it is done."""
    setting, bench = None, None
    for case in cases_of(part, quick=quick, dry=dry):
        blank = {name: case.record(name, dry=dry) for name in case.providers()}
        if not again and all(store.has(record) for record in blank.values()):
            continue
        if not budget.allows(case.seconds(list(blank))):
            left = [name for name, record in blank.items() if again or not store.has(record)]
            store.add(*(case.record(name, dry=dry, skipped=NOT_RUN + "out of budget") for name in left))
            print(f"{case}: out of budget", flush=True)
            continue
        if case.setting != setting or bench is None:
            bench = None
            release()
            setting, bench = case.setting, Bench(case, device, dry)
        refused = {}
        if not again:  # what failed before would fail again, and may have broken the device
            refused = {
                name: found["skipped"] for name, r in blank.items() if "skipped" in (found := store.find(r) or r)
            }
            refused = {name: reason for name, reason in refused.items() if not reason.startswith(NOT_RUN)}
        with budget.spending(case.seconds(list(blank))):
            store.add(*timed(case, bench, store, refused, dry=dry))


def timed(case: Case, bench: Bench, store: Store, refused: dict[str, str], *, dry: bool) -> list[dict]:
    """The records of one case."""
    calls, reasons = {}, dict(refused)
    for name in case.providers():
        if name in reasons:
            continue
        try:
            calls[name] = bench.call(case, name)
        except Unavailable as error:
            reasons[name] = str(error)
        except DeviceLost as error:
            store.add(case.record(name, dry=dry, skipped=timing.reason_of(error)))
            raise
    try:
        samples = timing.interleave(calls, 1 if dry else ROUNDS, 1 if dry else REPEATS, bench.device)
    except Exception as error:
        reason = f"while timing: {timing.reason_of(error)}"
        lost = isinstance(error, DeviceLost)
        # Which one it was is not known; the fused ones are the new ones, so that the others still get their turn.
        blamed = [name for name in calls if not lost or name.startswith("fused")]
        store.add(*(case.record(name, dry=dry, skipped=reason) for name in blamed or calls))
        if lost:
            raise
        return []
    found = []
    print(f"{case}, ms, GB/s, TFLOP/s, share of the floor:", flush=True)
    for name in case.providers():
        if name in reasons:
            found.append(case.record(name, dry=dry, skipped=reasons[name]))
            print(f"    {name:34s} skipped: {reasons[name]}", flush=True)
            continue
        ms = timing.milliseconds(samples[name])
        plan = MAX if name.startswith(STOCK) else case.plan
        floor = floor_of(case.shape, plan, case.batch, case.dtype, case.mode == "full")
        achieved = floor.achieved(ms["p50"] * 1e3)
        fields = {"ms": rounded(ms), "floor": rounded({"dram_us": floor.dram_us, "tensor_us": floor.tensor_us})}
        fields |= {"floor": fields["floor"] | {"dram_bytes": floor.dram_bytes, "flops": floor.flops}}
        if "stock" in samples:
            fields["ratio_to_stock"] = rounded(timing.ratio(samples[name], samples["stock"]))
        found.append(case.record(name, dry=dry, **fields, **rounded(achieved)))
        print(
            f"    {name:34s} {ms['p50']:8.3f}  {achieved['gb_per_s']:6.0f}  {achieved['tflop_per_s']:5.0f}  "
            f"{achieved['fraction_of_floor']:5.0%}",
            flush=True,
        )
    return found


def rounded(values: dict[str, float]) -> dict[str, float]:
    """Five digits, as no clock has more."""
    return {name: float(f"{value:.5g}") if isinstance(value, float) else value for name, value in values.items()}


def release() -> None:
    """Forget all compiled code and give its memory back."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Bench:
    """The tensors of one setting and its providers as calls; the stock ones serve all its cases."""

    def __init__(self, case: Case, device: str, dry: bool) -> None:
        self.device, self.dry = device, dry
        self.x = images(case.shape, case.batch, case.dtype, device, case.layout)
        self.fixed = self.x.detach()  # the same memory, for CUDA graphs that need not copy it
        self._stock: dict[str, Callable[[], object] | Unavailable] = {}

    def call(self, case: Case, provider: str) -> Callable[[], object]:
        """A provider, run a few times; Unavailable with the reason if it cannot run."""
        if not provider.startswith("stock"):
            return self._built(case, provider)
        if provider not in self._stock:
            try:
                self._stock[provider] = self._built(case, provider)
            except Unavailable as error:
                self._stock[provider] = error
        found = self._stock[provider]
        if isinstance(found, Unavailable):
            raise found
        return found

    def _built(self, case: Case, provider: str) -> Callable[[], object]:
        module = self.module(case, provider)
        how = how_compiled(provider)
        x = self.fixed if how == TUNED else self.x
        made: list[Callable[[], object]] = []

        def build() -> None:
            if provider == "fused graph":
                made.append(self._captured(case, module))
            elif case.mode == "forward":
                made.append(forward_call(case, compiled(module, how, self.dry), x, self.device, how == TUNED))
            else:
                made.append(full_call(case, compiled(module, how, self.dry), module, x, self.device, how == TUNED))
            for _ in range(1 if self.dry else 4):  # CUDA graphs are recorded at the third call
                made[0]()

        if how == TUNED:
            torch._dynamo.mark_static_address(x)
        reason = timing.attempt(build, self.device)
        if reason is not None:
            raise Unavailable(why(module, self.x, reason))
        return made[0]

    def module(self, case: Case, provider: str) -> nn.Module:
        """A provider's own stem, in training or evaluation, on the device."""
        where = {"dtype": case.dtype, "device": self.device, "layout": case.layout}
        if provider == "stock reordered":
            module = mixpool_stem(case.shape, MAX, "reference", **where)
        elif provider.startswith("stock"):
            module = stock_stem(case.shape, **where)
        else:
            module = mixpool_stem(case.shape, case.plan, provider.split()[0], **where)
        return module.train(case.mode == "full")

    def _captured(self, case: Case, module: nn.Module) -> Callable[[], object]:
        if self.device == "cpu":
            raise RuntimeError("CUDA graphs need a CUDA device")
        eager = forward_call(case, module, self.x, self.device)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                eager()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = eager()

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay


def compiled(module: nn.Module, how: str | None, dry: bool = False) -> Callable[[Tensor], Tensor]:
    """The module, or torch.compile of it (without code generation in a dry run)."""
    if how is None:
        return module

    def call(x: Tensor) -> Tensor:
        return module(x)

    # Code of its own: dynamo keeps what it compiled with the code, and would try all others' guards at every call.
    call.__code__ = call.__code__.replace(co_name=f"call_{id(module)}")
    options: dict[str, Any] = {"backend": "aot_eager"} if dry else {"mode": COMPILE_MODES[how]}
    return torch.compile(call, dynamic=False, **options)


def autocast_of(case: Case, device: str) -> torch.autocast:
    return torch.autocast(device, dtype=torch.bfloat16, enabled=case.dtype == "autocast")


def forward_call(case: Case, function: Callable, x: Tensor, device: str, in_graphs: bool = False):
    """One pass in evaluation."""

    @torch.inference_mode()
    def forward() -> Tensor:
        if in_graphs:
            torch.compiler.cudagraph_mark_step_begin()
        with autocast_of(case, device):
            return function(x)

    return forward


def full_call(case: Case, function: Callable, module: nn.Module, x: Tensor, device: str, in_graphs: bool = False):
    """One pass in training: forward, and backward for all parameters from a random upstream gradient."""
    parameters = list(module.parameters())
    upstream: list[Tensor] = []

    def full() -> tuple[Tensor, ...]:
        if in_graphs:
            torch.compiler.cudagraph_mark_step_begin()
        with autocast_of(case, device):
            out = function(x)
        if not upstream:
            upstream.append(torch.randn_like(out))
        return torch.autograd.grad(out, parameters, upstream[0])

    return full


def why(module: nn.Module, x: Tensor, reason: str) -> str:
    """The reason of a failure, with what mixpool itself says about the fused path."""
    import mixpool

    question = getattr(mixpool, "why_not_fused", None)
    if question is None or getattr(module, "backend", None) != "fused":
        return reason
    try:
        answer = question(module, x)
    except Exception as error:
        answer = f"why_not_fused failed: {timing.reason_of(error)}"
    return reason if answer is None else f"{reason} [{answer}]"


# --- memory -----------------------------------------------------------------------------------------------------------

MEMORY_PROVIDERS = ("stock", "stock compiled", "reference", "reference compiled", "fused")


def run_memory(store: Store, budget: Budget, device: str, *, quick=False, dry=False, again=False) -> None:
    """Bytes of one training step: held between forward and backward (output included), and at the peak."""
    plans = (MODULUS1,) if dry else (MIX,) if quick else PLANS
    for plan in plans:
        case = Case(RESNET, plan, 256, "full")
        case = shrunk(case) if dry else case
        bench = None
        for provider in MEMORY_PROVIDERS:
            if not again and store.has(case.record(provider, "memory", dry=dry)):
                continue
            if not budget.allows(case.seconds([provider])):
                store.add(case.record(provider, "memory", dry=dry, skipped=NOT_RUN + "out of budget"))
                continue
            release()
            bench = bench or Bench(case, device, dry)
            with budget.spending(case.seconds([provider])):
                try:
                    fields = memory_fields(case, bench, provider, dry=dry)
                except DeviceLost as error:
                    store.add(case.record(provider, "memory", dry=dry, skipped=timing.reason_of(error)))
                    raise
            store.add(case.record(provider, "memory", dry=dry, **fields))
            print(f"memory: {case}: {provider}: {fields}", flush=True)


def memory_fields(case: Case, bench: Bench, provider: str, *, dry: bool) -> dict[str, Any]:
    """One provider's bytes (None on a CPU, which does not count them), or why there are none."""
    found: dict[str, Any] = {}

    def measure() -> None:
        module = bench.module(case, provider)
        function = compiled(module, how_compiled(provider), dry)
        full = full_call(case, function, module, bench.x, bench.device)
        upstream = torch.randn_like(bench_output(case, function, bench))
        for _ in range(0 if dry else 2):
            full()
        found.update(memory_of(lambda: bench_output(case, function, bench), list(module.parameters()), upstream))

    try:
        reason = timing.attempt(measure, bench.device)
    except Unavailable as error:
        reason = str(error)
    return found if reason is None else {"skipped": reason}


def bench_output(case: Case, function: Callable, bench: Bench) -> Tensor:
    with autocast_of(case, bench.device):
        return function(bench.x)


def memory_of(forward: Callable[[], Tensor], parameters: list[Tensor], upstream: Tensor) -> dict[str, float | None]:
    """MiB held after the forward pass and at the peak of both passes, above what was there before."""
    if not upstream.is_cuda:
        torch.autograd.grad(forward(), parameters, upstream)
        return {"held_mib": None, "peak_mib": None}
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = forward()
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated() - before
    torch.autograd.grad(out, parameters, upstream)
    torch.cuda.synchronize()
    return {"held_mib": held / 2**20, "peak_mib": (torch.cuda.max_memory_allocated() - before) / 2**20}


# --- kernels ----------------------------------------------------------------------------------------------------------

PROFILE_PROVIDERS = ("stock", f"stock {UNGRAPHED}", f"reference {UNGRAPHED}", "fused")
PROFILE_CALLS = 5
MAX_KERNELS = 25


def run_profile(store: Store, budget: Budget, device: str, *, quick=False, dry=False, again=False) -> None:
    """Which kernels the target case spends its time in, microseconds per call."""
    for mode in ("forward", "full"):
        case = Case(RESNET, MIX, 256, mode, compilers=(UNGRAPHED,))
        case = shrunk(case._replace(plan=MODULUS1)) if dry else case
        release()
        bench = Bench(case, device, dry)
        for provider in PROFILE_PROVIDERS[:: 3 if dry else 1]:
            blank = case.record(provider, "profile", dry=dry)
            if not again and store.has(blank):
                continue
            if not budget.allows(case.seconds([provider])):
                store.add(case.record(provider, "profile", dry=dry, skipped=NOT_RUN + "out of budget"))
                continue
            try:
                fields: dict[str, Any] = profiled(bench.call(case, provider), device, 1 if dry else PROFILE_CALLS)
            except Unavailable as error:
                fields = {"skipped": str(error)}
            except DeviceLost as error:
                store.add(case.record(provider, "profile", dry=dry, skipped=timing.reason_of(error)))
                raise
            store.add(case.record(provider, "profile", dry=dry, **fields))
            print(f"profile: {case}: {provider}: {fields.get('total_us', fields.get('skipped'))} us", flush=True)
            for kernel in fields.get("kernels", [])[:8]:
                print(f"    {kernel['us']:9.1f} us  {kernel['calls']:5.1f} x  {kernel['name'][:90]}", flush=True)


def profiled(call: Callable[[], object], device: str, number: int) -> dict[str, Any]:
    """The kernels (on a CPU the operators) of a call, the longest first."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(number):
            call()
        timing.synchronize(device)
    events = profiler.key_averages()
    if device == "cuda":
        found = [(e.key, e.self_device_time_total, e.count) for e in events if "CUDA" in str(e.device_type)]
    else:
        found = [(e.key, e.self_cpu_time_total, e.count) for e in events]
    found = sorted((row for row in found if row[1] > 0), key=lambda row: -row[1])
    kernels = [
        {"name": name[:160], "us": round(us / number, 2), "calls": count / number}
        for name, us, count in found[:MAX_KERNELS]
    ]
    return {"total_us": round(sum(us for _, us, _ in found) / number, 2), "kernels": kernels}
