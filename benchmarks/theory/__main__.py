"""`python -m benchmarks.theory`: the command of `run.py`."""

import sys

from benchmarks.kit import command
from benchmarks.theory.run import main

if __name__ == "__main__":
    command.of_folder("benchmarks.theory")
    sys.exit(main())
