"""All measurements of this package, then the tables and the figures: `python -m benchmarks.run [NAME ...]`."""

from __future__ import annotations

import argparse
import importlib

from benchmarks import figures, tables

NAMES = ("models", "partner", "image_model", "prediction", "selection", "squeezenet", "theory", "speed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*NAMES, []], default=NAMES, help="default: all")
    for name in parser.parse_args().names:
        print(f"== {name}")
        importlib.import_module(f"benchmarks.{name}").main()
    for page in tables.PAGES:
        page.write_text(tables.filled(page.read_text()))
    figures.draw()


if __name__ == "__main__":
    main()
