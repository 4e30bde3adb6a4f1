"""All measurements of this package, then the tables and the figures: `python -m benchmarks [NAME ...]`.

Those that need a GPU are a command of their own, `python -m benchmarks.gpu`.
"""

from __future__ import annotations

import argparse
import importlib

from benchmarks.kit import figures, tables

NAMES = (
    "selecting.models",
    "selecting.partner",
    "selecting.image_model",
    "selecting.prediction",
    "selecting.selection",
    "pretrained.squeezenet",
    "theory",
    "cost.stem",
    "cost",
    "peers",
    "pretrained.evaluation",
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
