"""`python -m benchmarks.gpu`: the command of `run.py`."""

import sys

from benchmarks.gpu.run import main

if __name__ == "__main__":
    sys.exit(main())
