"""The measurements behind the choice of channels, one after the other, each into its own file of records.

    python -m benchmarks.selecting [PART ...]       about 25 minutes on 2 cores; default: all parts

Each part is a command, too: `python -m benchmarks.selecting.PART --help` says what it measures.
"""

from __future__ import annotations

import argparse
import importlib

PARTS = ("models", "partner", "image_model", "prediction", "selection")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}")
    parts = parser.parse_args().parts or PARTS
    if unknown := [part for part in parts if part not in PARTS]:
        parser.error(f"expected parts out of {', '.join(PARTS)}, got {', '.join(unknown)}")
    for part in parts:
        print(f"== {part}", flush=True)
        importlib.import_module(f"benchmarks.selecting.{part}").main()
