"""Records as Markdown: a table, the line that says where its numbers come from, and the file they are read from."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.kit.store import RECORDS
from mixpool import records


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def machine_line(record: dict) -> str:
    code = record["code"]
    dirty = " with uncommitted changes" if code["dirty"] else ""
    place = _machine(record["machine"])
    return f"{place}; commit {code['commit']}{dirty}, `{record['command']}`, {record['time_utc'][:10]}."


def origins(found: list[dict], command: str) -> str:
    """The same of many records of one command: their machines, all their commits, and from when to when."""
    versions = {record["machine"]["torch"] for record in found}
    assert len(versions) == 1, f"expected a table of one version of torch, got {', '.join(sorted(versions))}"
    machines = dict.fromkeys(_machine(record["machine"]) for record in found)
    commits = dict.fromkeys(r["code"]["commit"] + " (dirty)" * r["code"]["dirty"] for r in found)
    days = sorted({record["time_utc"][:10] for record in found})
    period = f"{days[0]}{f' to {days[-1]}' if len(days) > 1 else ''}"
    return f"{' and '.join(machines)}; commits {', '.join(commits)}; `{command}`, {period}."


def _machine(machine: dict) -> str:
    """Records made before 2026-11-24 do not have the CPU's instructions."""
    cpu = " ".join([machine["cpu"], machine.get("cpu_capability", "")]).strip()
    return f"{cpu}, {machine['threads']} threads, torch {machine['torch']}, Python {machine['python']}"


def read(name: str, folder: Path = RECORDS) -> list[dict]:
    """The records of a file; ValueError if some come from a dry run, whose numbers mean nothing."""
    found = list(records.read(folder / f"{name}.jsonl"))
    if any(record.get("dry") for record in found):
        raise ValueError(f"expected measurements in {name}.jsonl, got records of a dry run")
    return found


def at(values: Any, path: Sequence[str]) -> Any:
    """What a record has at the end of a path of keys."""
    return functools.reduce(operator.getitem, path, values)
