"""All measurements of this package, then the tables and the figures: `python -m benchmarks.run [NAME ...]`.

Those that need a GPU are a command of their own, `python -m benchmarks.gpu`.
"""

from __future__ import annotations

import argparse
import importlib

from benchmarks import figures, tables

NAMES = (
    "models",
    "partner",
    "image_model",
    "prediction",
    "selection",
    "squeezenet",
    "theory",
    "cpu",
    "cost",
    "peers",
    "evaluation",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[*NAMES, []], default=NAMES, help="default: all")
    for name in parser.parse_args().names:
        print(f"== {name}")
        importlib.import_module(f"benchmarks.{name}").main()
    tables.write()
    figures.draw()


if __name__ == "__main__":
    main()
