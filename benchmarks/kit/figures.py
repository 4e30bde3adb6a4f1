"""Draw every figure under docs/ that comes from records: `python -m benchmarks.kit.figures`.

The same records give the same files, to the bit on one version of matplotlib. (docs/demo.png is not among them: it
comes from `mixpool demo --output docs`.)
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.cifar10.plot import plot_cifar10
from benchmarks.kit.store import RECORDS, ROOT
from benchmarks.theory.plots import DPI, write_figures
from mixpool import records
from mixpool.figures import save_figure

DOCS = ROOT / "docs"


def draw(folder: Path = DOCS) -> list[Path]:
    """Write all figures into a folder; returns their paths."""
    paths = [path for record in records.read(RECORDS / "theory.jsonl") for path in write_figures(record, folder)]
    cifar10 = plot_cifar10(list(records.read(RECORDS / "cifar10.jsonl")))
    return [*paths, save_figure(cifar10, folder / "cifar10.png", dpi=DPI)]


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    for path in draw():
        print(path)


if __name__ == "__main__":
    main()
