"""`python -m benchmarks.gpu`: the command of `run.py`."""

import sys

from benchmarks.gpu.run import main
from benchmarks.kit import command

if __name__ == "__main__":
    command.of_folder("benchmarks.gpu")
    sys.exit(main())
