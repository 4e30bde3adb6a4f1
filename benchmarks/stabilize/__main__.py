"""`python -m benchmarks.stabilize`."""

from benchmarks.kit.command import of_folder
from benchmarks.stabilize.run import main

of_folder("benchmarks.stabilize")
main()
