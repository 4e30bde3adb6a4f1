"""`python -m benchmarks.stabilize`: the options of `run.py`."""

from benchmarks.kit import command
from benchmarks.stabilize.run import main

if __name__ == "__main__":
    command.of_folder("benchmarks.stabilize")
    main()
