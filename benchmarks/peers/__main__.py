"""`python -m benchmarks.peers`: the options of `run.py`."""

import argparse
from pathlib import Path

from benchmarks.kit import command
from benchmarks.kit.store import RECORDS
from benchmarks.peers import run


def main() -> None:
    parser = argparse.ArgumentParser(description=run.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=run.PARTS, default=list(run.PARTS), help="parts (default: all)")
    parser.add_argument("--output", type=Path, default=RECORDS / "peers.jsonl", help="file of the records")
    run.main(**vars(parser.parse_args()))


if __name__ == "__main__":
    command.of_folder("benchmarks.peers")
    main()
