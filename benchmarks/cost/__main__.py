"""`python -m benchmarks.cost`: the options of `run.py`."""

import argparse
from pathlib import Path

from benchmarks.cost import run
from benchmarks.kit import command
from benchmarks.kit.store import RECORDS


def main() -> None:
    parser = argparse.ArgumentParser(description=run.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=run.PARTS, default=run.PARTS, help="parts (default: all)")
    parser.add_argument(
        "--minutes", type=float, default=run.MINUTES, help="begin no case that would end later (%(default)s)"
    )
    parser.add_argument("--output", type=Path, default=RECORDS / "cost.jsonl", help="file of records (%(default)s)")
    parser.add_argument("--again", action="store_true", help="measure also what was measured already")
    options = parser.parse_args()
    run.main(options.only, options.minutes, options.output, options.again)


if __name__ == "__main__":
    command.of_folder("benchmarks.cost")
    main()
