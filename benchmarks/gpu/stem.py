"""Times of the stem on a GPU: the providers of a case interleaved in one process (`providers.py`)."""

from __future__ import annotations

from benchmarks.gpu.cases import REPEATS, ROUNDS, STOCK, Case, cases_of
from benchmarks.gpu.providers import Bench
from benchmarks.gpu.roofline import floor_of
from benchmarks.kit import timing
from benchmarks.kit.stems import MAX, Unavailable
from benchmarks.kit.store import NOT_RUN, Store
from benchmarks.kit.timing import Budget, DeviceLost, release, rounded


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
