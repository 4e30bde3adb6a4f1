"""Long runs, each in a process of its own with one thread and a log file, a few at a time."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from benchmarks.kit.store import ROOT


class Row(Protocol):
    """What one run is: values that its command takes, and the name of its folder."""

    name: str

    def __iter__(self): ...


def run_each(module: str, rows: Sequence[Row], output: Path, processes: int) -> None:
    """`python -m MODULE --output OUTPUT --one *ROW` for every row, in order, so many at a time.

    Raises:
        SystemExit: some of them failed; the others ran all the same.
    """
    with ThreadPoolExecutor(processes) as pool:
        failed = sum(status != 0 for status in pool.map(lambda row: _run(module, row, output), rows))
    if failed:
        raise SystemExit(f"{failed} of {len(rows)} runs failed; their logs are in {output}")


def _run(module: str, row: Row, output: Path) -> int:
    command = [sys.executable, "-m", module, "--output", str(output), "--one", *map(str, row)]
    with (output / f"{row.name}.log").open("a") as log:
        print(f"{row.name}: see {log.name}", flush=True)
        done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=log, stderr=log)
    print(f"{row.name}: {'finished' if done.returncode == 0 else f'failed with {done.returncode}'}", flush=True)
    return done.returncode
