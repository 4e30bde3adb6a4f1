"""Records as Markdown: a table, the line that says where its numbers come from, and the file they are read from."""

from __future__ import annotations

from pathlib import Path

from benchmarks.store import RECORDS
from mixpool import records


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def machine_line(record: dict) -> str:
    machine, code = record["machine"], record["code"]
    dirty = " with uncommitted changes" if code["dirty"] else ""
    return (
        f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}, Python {machine['python']}; "
        f"commit {code['commit']}{dirty}, `{record['command']}`, {record['time_utc'][:10]}."
    )


def read(name: str, folder: Path = RECORDS) -> list[dict]:
    """The records of a file; ValueError if some come from a dry run, whose numbers mean nothing."""
    found = list(records.read(folder / f"{name}.jsonl"))
    if any(record.get("dry") for record in found):
        raise ValueError(f"expected measurements in {name}.jsonl, got records of a dry run")
    return found
