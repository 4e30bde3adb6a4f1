"""`python -m benchmarks.selecting`: the command of `run.py`."""

import sys

from benchmarks.kit import command
from benchmarks.selecting.run import main

if __name__ == "__main__":
    command.of_folder("benchmarks.selecting")
    sys.exit(main())
