"""The measurements that a CPU can repeat within hours, then all tables and figures: `make bench`.

    python -m benchmarks [NAME ...]     default: all

Each is a command of its own, `python -m benchmarks.NAME`. Trainings (`benchmarks.pretrained`, `benchmarks.cifar10`)
and what needs a GPU (`benchmarks.gpu`) are not among them.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

from benchmarks.kit import command
from benchmarks.kit.store import ROOT

MEASUREMENTS = ("selecting", "theory", "pretrained.squeezenet", "pretrained.evaluation", "cost", "peers")
LAST = ("kit.tables", "kit.figures")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(MEASUREMENTS)}")
    names = parser.parse_args().names or MEASUREMENTS
    if unknown := [name for name in names if name not in MEASUREMENTS]:
        parser.error(f"expected names out of {', '.join(MEASUREMENTS)}, got {', '.join(unknown)}")
    for name in (*names, *LAST):
        print(f"== {name}", flush=True)
        subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], cwd=ROOT, check=True)


if __name__ == "__main__":
    command.of_folder("benchmarks")
    main()
