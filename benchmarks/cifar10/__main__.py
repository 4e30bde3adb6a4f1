"""`python -m benchmarks.cifar10`: the command of `run.py`."""

import sys

from benchmarks.cifar10.run import main

if __name__ == "__main__":
    sys.exit(main())
