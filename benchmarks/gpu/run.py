"""Everything that needs a GPU, in one command: tests, times, memory, whole networks; JSON lines, a short table last.

    python -m benchmarks.gpu                             all parts; each stops at its limit, together under 25 minutes
    python -m benchmarks.gpu --only stem --output DIR    one part; DIR/gpu.jsonl grows case by case
    python -m benchmarks.gpu --dry                       end to end on a CPU, tiny, within a minute; no number counts
    python -m benchmarks.gpu --collect FILE ...          merge fetched files into records/gpu.jsonl, with their commits

Each part runs in a process of its own, which is started again where a kernel has broken the CUDA context. A rerun with
the same --output goes on with what is missing (or was cut by the budget); --again measures anew.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# Seconds of GPU time per part, the most important part first; together under 25 minutes.
PARTS = {"tests": 330, "stem": 400, "memory": 50, "models": 320, "table": 220, "profile": 45, "shapes": 100}
QUICK = ("tests", "stem", "memory")
ON_REQUEST = {"tune": 240}  # for who sets the table of mixpool/ops/fused/blocks.py
DRY_SECONDS = 400.0  # it takes 40, but nothing should be left out on a busy machine
GRACE = 20.0  # seconds over its budget after which a part is killed: it hangs, or compiles without end
DEVICE_LOST = 75  # exit status of a part whose CUDA context is broken
MAX_STARTS = 6


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    if args.collect:
        return collect(args.collect)
    if args.child_until is not None:
        return child(args)
    if not args.dry and not has_gpu():
        print("no CUDA device here; --dry runs everything on the CPU, tiny", file=sys.stderr)
        return 2
    folder = Path(tempfile.mkdtemp(prefix="mixpool-gpu-") if args.output is None else args.output).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    print(f"records: {folder / 'gpu.jsonl'}, log: {folder / 'gpu.log'}", flush=True)
    parts = args.only or list(QUICK if args.quick else PARTS)
    limits = {**PARTS, **ON_REQUEST}
    end = time.monotonic() + (args.budget or (DRY_SECONDS if args.dry else sum(limits[part] for part in parts)))
    statuses = {}
    for group in [parts] if args.dry else [[part] for part in parts]:
        seconds = end - time.monotonic()
        if not args.dry and (args.budget is None or len(parts) > 1):
            seconds = min(seconds, limits[group[0]])
        statuses |= dict.fromkeys(group, run_part(group, folder, seconds, args))
    print_summary(folder / "gpu.jsonl", statuses)
    return int(any(statuses.values()))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*PARTS, *ON_REQUEST]
    parser.add_argument("--only", nargs="+", choices=names, metavar="PART", help=f"of {', '.join(names)}")
    parser.add_argument("--output", help="folder of gpu.jsonl and the logs; default a new temporary one")
    parser.add_argument("--budget", type=float, help="seconds for all parts; several keep their own limits too")
    parser.add_argument("--quick", action="store_true", help="tests, and only the cases of the targets")
    parser.add_argument("--again", action="store_true", help="measure also what --output holds already")
    parser.add_argument("--dry", action="store_true", help="tiny, on the CPU, Triton's interpreter for the fused path")
    parser.add_argument("--collect", nargs="+", metavar="FILE", type=Path, help="merge into records/gpu.jsonl")
    # of the monotonic clock, which all processes share
    parser.add_argument("--child-until", type=float, metavar="SECONDS", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    args.only = [part for part in names if part in args.only] if args.only else args.only
    return args


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def collect(files: list[Path]) -> int:
    from benchmarks.kit import store

    number, complaints = store.collect(files, store.RECORDS / "gpu.jsonl")
    print(f"{number} records in {store.RECORDS / 'gpu.jsonl'}; now python -m benchmarks.kit.tables")
    for complaint in complaints:
        print(complaint, file=sys.stderr)
    return 0


# --- a part in its own process ----------------------------------------------------------------------------------------


def run_part(parts: list[str], folder: Path, seconds: float, args: argparse.Namespace) -> int:
    """Run parts in another process until they are done or their time is up; the exit status, 0 if all is well."""
    end = time.monotonic() + seconds
    status = 0
    for start in range(MAX_STARTS):
        left = end - time.monotonic()
        print(f"== {' '.join(parts)}: {max(left, 0):.0f} s left{', again' if start else ''}", flush=True)
        command = child_command(parts, folder, end, args, again=args.again and start == 0)
        status = run_child(command, max(left, 0) + GRACE, folder, args.dry)
        if status != DEVICE_LOST:
            break
    if status not in (0, DEVICE_LOST):
        print(f"{' '.join(parts)} ended with status {status}; the end of the log:", flush=True)
        print("".join((folder / "gpu.log").read_text(errors="replace").splitlines(keepends=True)[-15:]), flush=True)
    return status


def child_command(parts: list[str], folder: Path, end: float, args: argparse.Namespace, *, again: bool) -> list[str]:
    command = [sys.executable, "-m", "benchmarks.gpu", "--child-until", f"{end:.1f}"]
    command += ["--only", *parts, "--output", str(folder)]
    flags = {"--dry": args.dry, "--quick": args.quick, "--again": again}
    return command + [flag for flag, is_set in flags.items() if is_set]


def run_child(command: list[str], seconds: float, folder: Path, dry: bool) -> int:
    """Its output comes here, its warnings and torch's tuning tables go to the log; killed after its time."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if dry:  # before any import of triton
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    with open(folder / "gpu.log", "a") as log:
        process = subprocess.Popen(
            command, cwd=Path(__file__).parents[2], stderr=log, env=environment, preexec_fn=os.setpgrp
        )
        try:
            return process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            print("killed: it did not end in its time", flush=True)
            return 124
        finally:  # and its children: compilers' workers, pytest
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def child(args: argparse.Namespace) -> int:
    """Run some parts here, with one budget."""
    import torch

    from benchmarks.gpu import checks, kernels, memory, models, stem, tune
    from benchmarks.kit.store import Store
    from benchmarks.kit.timing import Budget, DeviceLost

    device = "cpu" if args.dry else "cuda"
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    if args.dry:
        torch.set_num_threads(1)
    store, budget = Store(Path(args.output) / "gpu.jsonl"), Budget(args.child_until - time.monotonic())
    options = {"quick": args.quick, "dry": args.dry, "again": args.again}
    runs = {"tests": checks.run_checks, "memory": memory.run_memory, "profile": kernels.run_profile}
    runs |= {"models": models.run_models, "tune": tune.run_tune}
    try:
        for part in args.only:
            if part in runs:
                runs[part](store, budget, device, **options)
            else:
                stem.run_speed(part, store, budget, device, **options)
    except DeviceLost as error:
        print(f"the CUDA context is broken: {error}", flush=True)
        return DEVICE_LOST
    return 0


# --- the end ----------------------------------------------------------------------------------------------------------


def print_summary(path: Path, statuses: dict[str, int]) -> None:
    from benchmarks.gpu.summary import summary
    from mixpool import records

    found = list(records.read(path)) if path.exists() else []
    skipped = [record for record in found if "skipped" in record]
    print(f"\n== summary: {len(found)} records, {len(skipped)} of them skipped with a reason")
    if found:
        machine, code = found[-1]["machine"], found[-1]["code"]
        print(
            f"{machine['gpu'] or machine['cpu']}, driver {machine['driver']}, torch {machine['torch']}, Triton "
            f"{machine['triton']}, cuDNN {machine['cudnn']}; commit {code['commit']}, sources {code['source']}"
        )
        print(summary(found))
    bad = {part: status for part, status in statuses.items() if status}
    if bad:
        print(f"parts that did not end well (exit status): {bad}")
