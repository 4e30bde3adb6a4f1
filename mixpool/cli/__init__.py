"""The command `mixpool`: a file for each of its commands."""

from mixpool.cli.command import main

__all__ = ["main"]
