"""Make the tables of all pages from the records; `--check` only says whether they are up to date.

    python -m benchmarks.kit.tables [--check]

A page names a table in a comment, `<!-- table:NAME -->`; the function of this name is in the `tables.py` of a question,
whose `__all__` lists its tables.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.kit.store import ROOT

BENCHMARKS = ROOT / "benchmarks"
PAGES = (
    ROOT / "README.md",
    *(ROOT / "docs" / f"{name}.md" for name in ("stabilize", "theory")),
    *sorted(BENCHMARKS.glob("**/README.md")),
)
QUESTIONS = tuple(sorted(file.parent.name for file in BENCHMARKS.glob("*/tables.py") if file.parent.name != "kit"))
BLOCK = re.compile(r"<!-- table:(\w+) -->.*?<!-- /table -->", flags=re.DOTALL)


@functools.cache
def makers() -> dict[str, Callable[[], str]]:
    """Name -> function of every table of every question."""
    found: dict[str, Callable[[], str]] = {}
    for question in QUESTIONS:
        module = importlib.import_module(f"benchmarks.{question}.tables")
        twice = found.keys() & set(module.__all__)
        assert not twice, f"expected one table of each name, {question} has another {', '.join(twice)}"
        found |= {name: getattr(module, name) for name in module.__all__}
    return found


def filled(text: str) -> str:
    """The page with every `<!-- table:NAME -->` block made anew."""
    return BLOCK.sub(lambda match: f"<!-- table:{match[1]} -->\n{makers()[match[1]]()}\n<!-- /table -->", text)


def stale() -> list[Path]:
    """The pages whose tables are others."""
    return [page for page in PAGES if filled(text := page.read_text()) != text]


def write() -> None:
    """Bring all of them up to date."""
    for page in PAGES:
        page.write_text(filled(page.read_text()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a table is out of date")
    if not parser.parse_args().check:
        write()
        return 0
    found = stale()
    for path in found:
        print(f"out of date: {path.relative_to(ROOT)}; run python -m benchmarks.kit.tables", file=sys.stderr)
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
