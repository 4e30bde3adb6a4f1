"""One result is one JSON object on one line: what was measured, on which machine, from which code."""

from __future__ import annotations

import datetime
import functools
import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from mixpool.version import VERSION

SCHEMA = 1


def stamp(kind: str, **fields: Any) -> dict[str, Any]:
    """A record of some kind with the fields given, and the machine, the code, the time and the command."""
    return {
        "schema": SCHEMA,
        "kind": kind,
        **fields,
        "machine": machine(),
        "code": dict(code()),
        "time_utc": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def machine() -> dict[str, Any]:
    """The hardware and the versions that a speed depends on."""
    cuda = torch.cuda.is_available()
    return {
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),  # AVX2, AVX512 ...: some names do not tell
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "driver": _driver() if cuda else None,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda if cuda else None,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
    }


@functools.cache
def code() -> dict[str, Any]:
    """The version, git's commit, and a hash of the sources, as they are when this is first called.

    What runs is what was there at the start: whoever measures for long calls this first, so that nothing which is
    committed or edited meanwhile gets into the record. At import it would be in the way of those who measure nothing.
    """

    folder = Path(__file__).parent
    return {"version": VERSION, **_commit(folder), "source": _source_hash_of(folder)}


def write(path: str | os.PathLike[str], records: list[dict[str, Any]]) -> None:
    """Replace the file by these records, whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(json.dumps(record) + "\n" for record in records))
    partial.replace(path)


def append(path: str | os.PathLike[str], record: dict[str, Any]) -> None:
    """Add a line to the records; those of earlier calls stay, and so do those of another one that runs now."""
    line = json.dumps(record) + "\n"
    with open(path, "a+b") as file:
        if file.seek(0, os.SEEK_END) > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # a call that was killed while it wrote
                line = "\n" + line
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())


def read(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """The records of a file, in order; a broken line raises ValueError with its number."""
    for number, line in enumerate(Path(path).read_text().splitlines(), start=1):
        try:
            yield json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"expected one JSON object per line, line {number} of {path} is broken: {error}") from None


def source_hash(blobs: Iterable[tuple[str, str]]) -> str:
    """One name for a set of sources, from (path inside the package, git's hash of its content) of its *.py files."""
    lines = sorted(f"{blob} {path}\n" for path, blob in blobs if path.endswith(".py"))
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]


def _source_hash_of(folder: Path) -> str:
    """That of the files as they lie here, by which code is known where there is no git."""

    def blob(content: bytes) -> str:
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    return source_hash((p.relative_to(folder).as_posix(), blob(p.read_bytes())) for p in folder.rglob("*.py"))


@functools.cache
def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.partition("\n")[0].strip() or None if done.returncode == 0 else None


@functools.cache
def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _commit(folder: Path) -> dict[str, Any]:
    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    status = git("status", "--porcelain", "--", ".")  # a file that is not in git runs too
    return {"commit": git("rev-parse", "--short=12", "HEAD"), "dirty": None if status is None else bool(status)}
