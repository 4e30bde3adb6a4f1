"""Time of several calls side by side: interleaved in rounds, on a GPU by its own clock and with a cold L2 cache."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import statistics
import time
from collections.abc import Callable

import torch

FLUSH_BYTES = 256 * 2**20  # several times any L2 cache
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # of glibc's malloc.h
WARM_UP_SECONDS = 0.3  # of work before a measurement, so that the clocks have risen

Samples = dict[str, list[list[float]]]  # name -> milliseconds, round by round


class DeviceLost(RuntimeError):
    """The CUDA context is broken (an illegal access, say): nothing more can run in this process."""


def synchronize(device: str) -> None:
    """Wait for the device; DeviceLost if a kernel has broken the context."""
    if device == "cpu":
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        raise DeviceLost(_first_line(error)) from error


def attempt(call: Callable[[], object], device: str) -> str | None:
    """Run a call and wait for it; the reason if it failed. DeviceLost if nothing can run any more."""
    try:
        call()
        synchronize(device)
    except DeviceLost:
        raise
    except Exception as error:  # whatever a compiler, a kernel or the memory raises belongs into the record
        synchronize(device)
        return reason_of(error)
    return None


def reason_of(error: BaseException) -> str:
    """One line of an error, for a record."""
    return f"{type(error).__name__}: {_first_line(error)}"[:300]


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")


def interleave(calls: dict[str, Callable[[], object]], rounds: int, repeats: int, device: str) -> Samples:
    """Milliseconds of every call; `repeats` calls one after another in each round, the order turns between rounds.

    All calls have run before (compiled, tuned, captured). On a GPU the time is that between two events around the call,
    the host's launches included where the GPU waits for them.
    """
    samples: Samples = {name: [] for name in calls}
    measure = _events if device == "cuda" else _wall
    if device == "cuda":
        flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
        until = time.perf_counter() + WARM_UP_SECONDS
        while time.perf_counter() < until:
            for call in calls.values():
                call()
            synchronize(device)
    else:
        flush = None
    names = list(calls)
    for turn in range(rounds):
        at = turn % max(1, len(names))
        for name in names[at:] + names[:at]:
            samples[name].append(measure(calls[name], repeats, flush))
    return samples


def _wall(call: Callable[[], object], repeats: int, flush: None) -> list[float]:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return times


def _events(call: Callable[[], object], repeats: int, flush: torch.Tensor) -> list[float]:
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in events:
        flush.zero_()
        start.record()
        call()
        end.record()
    synchronize("cuda")
    return [start.elapsed_time(end) for start, end in events]


def spread(values: list[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile and number."""
    values = sorted(values)
    quantiles = statistics.quantiles(values, n=5, method="inclusive") if len(values) > 1 else values * 4
    return {"p50": statistics.median(values), "p20": quantiles[0], "p80": quantiles[3], "n": len(values)}


def milliseconds(rounds: list[list[float]]) -> dict[str, float]:
    """`spread` of all calls of all rounds."""
    return spread([value for values in rounds for value in values])


def ratio(rounds: list[list[float]], base: list[list[float]]) -> dict[str, float]:
    """`spread` of the times over those of `base`, round by round: both ran under the same load and clocks."""
    return spread([statistics.median(a) / statistics.median(b) for a, b in zip(rounds, base, strict=True)])


def rounded(values: dict[str, float]) -> dict[str, float]:
    """Five digits, as no clock has more."""
    return {name: float(f"{value:.5g}") if isinstance(value, float) else value for name, value in values.items()}


def keep_heap() -> None:
    """Never give memory back to the system, in this process (glibc; elsewhere nothing happens).

    Otherwise glibc takes and gives back the large tensors of some calls in every round and those of others never,
    depending on what ran before: the same stem takes 14 or 30 ms.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_TOP_PAD, 64 * 2**20)):
            mallopt(option, value)


def release() -> None:
    """Forget all compiled code and give its memory back."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Budget:
    """Seconds that may be spent, and how much longer things take than was thought."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end = clock() + seconds
        self._expected = self._spent = 1.0

    @property
    def left(self) -> float:
        """Seconds; negative when overdrawn."""
        return self._end - self._clock()

    @property
    def pace(self) -> float:
        """Seconds spent per second that was expected, so far."""
        return self._spent / self._expected

    def allows(self, expected: float) -> bool:
        """Whether something expected to take so many seconds still fits, at the pace so far."""
        return expected * self.pace <= self.left

    @contextlib.contextmanager
    def spending(self, expected: float):
        """Learn the pace from a piece of work that was expected to take so many seconds."""
        start = self._clock()
        yield
        self._expected += expected
        self._spent += self._clock() - start
