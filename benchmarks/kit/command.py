"""The command lines of measurements."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable


def run(main: Callable[[], None], doc: str | None) -> None:
    """Calls main() of a measurement without options; `--help` is the module's docstring, all else is refused."""
    argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    main()


def of_folder(folder: str) -> None:
    """To be called by a folder's `__main__.py`: records and help then name the folder's command, not that file."""
    sys.argv[0] = f"python -m {folder}"
