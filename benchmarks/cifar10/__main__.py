"""`python -m benchmarks.cifar10`: the command of `run.py`."""

import sys

from benchmarks.cifar10.run import main
from benchmarks.kit import command

if __name__ == "__main__":
    command.of_folder("benchmarks.cifar10")
    sys.exit(main())
