"""Which blocks a kernel runs fastest with, side by side: what the table of mixpool/ops/fused/blocks.py is to be set by.

    python -m benchmarks.gpu --only tune        on request only; stops after 4 minutes

One kernel at a time, half of the channels of ResNet's stem (every other one, as in the mix), batch 256, bfloat16,
channels_last. Every candidate's output is compared with that of the table's entry.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.kit import timing
from benchmarks.kit.store import NOT_RUN, Store
from benchmarks.kit.timing import Budget, rounded
from mixpool import records
from mixpool.ops.fused.blocks import TABLES, Blocks
from mixpool.ops.fused.geometry import KINDS, StemGeometry

PURPOSES = ("inference", "training", "backward")
SECONDS = 3.0  # to compile one candidate
ROUNDS, REPEATS = 5, 10


def candidates(kind: str, purpose: str) -> list[Blocks]:
    """The table's entry first, then what differs from it in a few ways."""
    entry = TABLES[purpose][kind]
    changes: list[dict[str, int]] = [{"stages": 2}, {"rows": 2 * entry.rows, "num_warps": 2 * entry.num_warps}]
    changes += [{"slice": entry.slice // 2}, {"num_warps": 12 - entry.num_warps}]
    if kind != "modulus1":
        changes += [{"strip": 28}, {"strip": 7}]
    if purpose == "backward":
        changes = [change for change in changes if "stages" not in change] + [{"chunk": entry.chunk // 2}]
    return [entry, *(entry._replace(**change) for change in changes)]


def run_tune(store: Store, budget: Budget, device: str, *, quick=False, dry=False, again=False) -> None:
    """Time the candidates of every kernel; a candidate that does not compile or differs is recorded with the reason."""
    kinds, purposes = (("modulus1",), PURPOSES[:1]) if dry else (KINDS, PURPOSES)
    for purpose in purposes:
        for kind in kinds:
            found = candidates(kind, purpose)[: 2 if dry else None]
            blank = {blocks: record(kind, purpose, blocks, dry=dry) for blocks in found}
            if not again and all(store.has(r) for r in blank.values()):
                continue
            if not budget.allows(SECONDS * len(found)):
                store.add(*(r | {"skipped": NOT_RUN + "out of budget"} for r in blank.values()))
                continue
            with budget.spending(SECONDS * len(found)):
                store.add(*timed(kind, purpose, blank, device, dry))


def record(kind: str, purpose: str, blocks: Blocks, *, dry: bool, **fields: Any) -> dict[str, Any]:
    return records.stamp(
        "tune",
        case="resnet_stem",
        provider=" ".join(f"{name}={value}" for name, value in blocks._asdict().items()),
        mode=purpose,
        dtype="float16" if dry else "bfloat16",
        layout="channels_last",
        plan=kind,
        params={"N": 2 if dry else 256, "n_channels": 4 if dry else 32},
        **({"dry": True} if dry else {}),
        **fields,
    )


def timed(kind: str, purpose: str, blank: dict[Blocks, dict], device: str, dry: bool) -> list[dict]:
    """The records of one kernel's candidates."""
    build, calls, reasons, expected = problem(kind, purpose, device, dry), {}, {}, None
    for blocks in blank:
        made: list[tuple[Callable, Tensor]] = []

        def run(blocks: Blocks = blocks, made: list = made) -> None:
            made.append(build(blocks))
            made[0][0]()

        reason = timing.attempt(run, device)
        if reason is None:
            call, out = made[0]
            result = out.float().sum(0) if purpose == "backward" else out.float()
            expected = result if expected is None else expected
            if purpose != "backward":  # whose partial sums are laid out by the blocks
                error = ((result - expected).abs().max() / expected.abs().max()).item()
                reason = None if error < 0.02 else f"differs from the table's entry by {error:.2g}"
        if reason is None:
            calls[blocks] = call
        else:
            reasons[blocks] = reason
    samples = timing.interleave(calls, 1 if dry else ROUNDS, 1 if dry else REPEATS, device)
    found = []
    for blocks, r in blank.items():
        fields = {"skipped": reasons[blocks]} if blocks in reasons else {"ms": timing.milliseconds(samples[blocks])}
        found.append(r | {name: rounded(v) if isinstance(v, dict) else v for name, v in fields.items()})
    print(f"{kind} {purpose}:", flush=True)
    for r in sorted(found, key=lambda r: r.get("ms", {}).get("p50", 1e9)):
        print(f"    {r['ms']['p50'] if 'ms' in r else r['skipped'][:60]}  {r['provider']}", flush=True)
    return found


def problem(kind: str, purpose: str, device: str, dry: bool) -> Callable[[Blocks], tuple[Callable[[], None], Tensor]]:
    """A function that makes a kernel's call with given blocks, and the tensor that it writes."""
    from mixpool.ops.fused import launch

    size, n_images, n = (20, 2, 4) if dry else (224, 256, 32)
    dtype = torch.float16 if dry else torch.bfloat16
    generator = torch.Generator(device).manual_seed(0)
    geometry = StemGeometry(7, 2, 3, 1, False, 3, size, size)

    def random(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, device=device, generator=generator).to(of)

    x = random(n_images, 3, size, size).contiguous(memory_format=torch.channels_last)
    weight, imag = (random(m, 3, 7, 7, of=torch.float32) / 12 for m in (2 * n, n))
    out = random(n_images, 2 * n, *geometry.pooled_size).contiguous(memory_format=torch.channels_last)
    places = torch.randint(0, 9, (n_images, 32, *geometry.pooled_size), device=device, generator=generator)
    places = places.to(torch.int8).contiguous(memory_format=torch.channels_last)
    channels = torch.arange(1, 2 * n, 2, device=device)
    vector = torch.rand(2 * n, device=device, generator=generator)

    def build(blocks: Blocks) -> tuple[Callable[[], None], Tensor]:
        matrix = launch.Matrix.cut(kind, blocks, n, geometry.depth(kind))
        packed = x.new_empty((matrix.groups, matrix.depth, matrix.columns))
        launch.pack(matrix, geometry, x, weight, None if kind == "max" else imag, channels, packed)()
        arguments = (matrix, geometry, x, packed, channels)
        if purpose == "backward":
            coefficients = torch.full((2, matrix.groups * matrix.columns), 1e-4, device=device)
            argmax = places if kind == "max" else None
            return launch.backward(*arguments, out, argmax=argmax, coefficients=coefficients)
        written = torch.zeros_like(out)
        if purpose == "inference":
            call, _ = launch.forward(*arguments, written)
        else:
            argmax = torch.empty_like(places) if kind == "max" else None
            call, _ = launch.forward(*arguments, written, argmax=argmax, pivot=vector, with_sums=True)
        return call, written

    return build
