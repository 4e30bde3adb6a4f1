"""The kernels in which the stem spends its time on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu.cases import UNGRAPHED, Case, shrunk
from benchmarks.gpu.providers import Bench
from benchmarks.kit import timing
from benchmarks.kit.stems import CMOD, MIX, RESNET, Unavailable
from benchmarks.kit.store import NOT_RUN, Store
from benchmarks.kit.timing import Budget, DeviceLost, release

PROFILE_PROVIDERS = ("stock", f"stock {UNGRAPHED}", f"reference {UNGRAPHED}", "fused")
PROFILE_CALLS = 5
MAX_KERNELS = 25


def run_profile(store: Store, budget: Budget, device: str, *, quick=False, dry=False, again=False) -> None:
    """Which kernels the target case spends its time in, microseconds per call."""
    for mode in ("forward", "full"):
        case = Case(RESNET, MIX, 256, mode, compilers=(UNGRAPHED,))
        case = shrunk(case._replace(plan=CMOD)) if dry else case
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
