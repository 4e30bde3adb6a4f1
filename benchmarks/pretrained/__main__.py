"""`python -m benchmarks.pretrained`: the command of `run.py`."""

import sys

from benchmarks.kit import command
from benchmarks.pretrained.run import main

if __name__ == "__main__":
    command.of_folder("benchmarks.pretrained")
    sys.exit(main())
