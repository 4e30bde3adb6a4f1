"""A file of records that grows while it is measured: a run that was cut goes on where it stopped.

A record is known by what was measured, on which GPU and from which code; a new one replaces the old one of the same
name. Records of a device without git carry no commit but the hash of the sources: `identified` finds the commit.
"""

from __future__ import annotations

import functools
import subprocess
from collections.abc import Callable
from pathlib import Path

from mixpool import records

ROOT = Path(__file__).parents[2]
RECORDS = ROOT / "benchmarks" / "records"
NOT_RUN = "not run: "  # how the reason of what a later run may still measure begins

_NAMES = ("kind", "case", "plan", "provider", "mode", "dtype", "layout", "check", "dry")


def identity(record: dict) -> tuple:
    """What was measured, on which machine and from which code."""
    params = record.get("params", {})
    code, machine = record["code"], record["machine"]
    what = tuple(record.get(name) for name in _NAMES)
    return (*what, params.get("N"), code.get("source"), machine.get("gpu"), machine.get("torch"))


def is_finished(record: dict) -> bool:
    """Whether a rerun need not repeat it: it was measured, or refused for good."""
    return not str(record.get("skipped", "")).startswith(NOT_RUN)


class Store:
    """The records of one file, written again with each new one, whole or not at all."""

    def __init__(self, path: Path) -> None:
        self.path = path
        found = list(records.read(path)) if path.exists() else []
        self._records = {identity(record): record for record in found}

    def __iter__(self):
        return iter(self._records.values())

    def add(self, *new: dict) -> None:
        for record in new:
            self._records[identity(record)] = record
        records.write(self.path, list(self._records.values()))

    def drop(self, is_dropped: Callable[[dict], bool]) -> None:
        """Forget records; the file follows with the next `add`."""
        self._records = {name: record for name, record in self._records.items() if not is_dropped(record)}

    def find(self, record: dict) -> dict | None:
        """The record of the same name as one that was just stamped, from this code and this machine."""
        return self._records.get(identity(record))

    def has(self, record: dict) -> bool:
        """Whether the same was measured already."""
        found = self.find(record)
        return found is not None and is_finished(found)


def collect(paths: list[Path], target: Path) -> tuple[int, list[str]]:
    """Merge fetched files into one whose commits are known; the number of records and complaints.

    What was measured again replaces what was measured with earlier sources.
    """
    store, complaints = Store(target), []
    for path in paths:
        found = [identified(record) for record in records.read(path)]
        unknown = [r for r in found if r["code"]["dirty"]]
        if any(r.get("dry") for r in found):
            raise SystemExit(f"{path} comes from a dry run: its times mean nothing")
        if unknown:
            complaints.append(f"{path}: {len(unknown)} records from sources of no commit, marked as dirty")
        new = {_without_source(record) for record in found}
        store.drop(lambda record, new=new: _without_source(record) in new)
        store.add(*found)
    return len(list(store)), complaints


def _without_source(record: dict) -> tuple:
    return identity({**record, "code": {}})


def identified(record: dict) -> dict:
    """The record with the commit whose sources it was measured with; dirty if no commit has them."""
    source = record["code"].get("source")
    commit = commits_by_source().get(source)
    return {**record, "code": {**record["code"], "commit": commit, "dirty": commit is None}}


@functools.cache
def commits_by_source(package: str = "mixpool", last: int = 200) -> dict[str, str]:
    """Hash of the package's sources -> the newest commit that has them."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True).stdout

    found: dict[str, str] = {}
    for commit in git("rev-list", f"-n{last}", "--abbrev-commit", "--abbrev=12", "HEAD").split():
        entries = (line.split("\t") for line in git("ls-tree", "-r", commit, "--", package).splitlines())
        blobs = [(path.removeprefix(f"{package}/"), about.split()[2]) for about, path in entries]
        found.setdefault(records.source_hash(blobs), commit)
    return found
