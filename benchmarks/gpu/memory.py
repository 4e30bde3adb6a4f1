"""Memory of a training step of the stem on a GPU."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.cases import Case, how_compiled, shrunk
from benchmarks.gpu.providers import Bench, autocast_of, compiled, full_call
from benchmarks.kit import timing
from benchmarks.kit.stems import CMOD, MIX, PLANS, RESNET, Unavailable
from benchmarks.kit.store import NOT_RUN, Store
from benchmarks.kit.timing import Budget, DeviceLost, release

MEMORY_PROVIDERS = ("stock", "stock compiled", "reference", "reference compiled", "fused")


def run_memory(store: Store, budget: Budget, device: str, *, quick=False, dry=False, again=False) -> None:
    """Bytes of one training step: held between forward and backward (output included), and at the peak."""
    plans = (CMOD,) if dry else (MIX,) if quick else PLANS
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
