"""The command line of a measurement that has no options: `--help` explains, and everything else is refused."""

from __future__ import annotations

import argparse
from collections.abc import Callable


def run(main: Callable[[], None], doc: str | None) -> None:
    """Calls main(), unless the command line asks for help, which is the module's docstring."""
    argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    main()
