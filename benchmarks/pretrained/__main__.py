"""`python -m benchmarks.pretrained`: the command of `run.py`."""

import sys

from benchmarks.pretrained.run import main

if __name__ == "__main__":
    sys.exit(main())
