"""The import graph of mixpool/: its rooms, the arrows between them, levels and circles.

    python -m benchmarks.kit.import_graph [--folder CHECKOUT]      another checkout, to compare before and after

A room is a folder of the package with all below it, or a file beside the folders. An import counts wherever it stands:
inside a function, and under TYPE_CHECKING, too. Nothing is imported, so that any version can be looked at.
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Iterable, Iterator
from pathlib import Path

from benchmarks.kit.store import ROOT

PACKAGE = "mixpool"
Graph = dict[str, set[str]]  # name -> the names that it imports, all of them keys


def files_of(checkout: Path) -> dict[str, Path]:
    """Dotted name -> file, of all modules; a package goes by the name of its folder."""
    found = {}
    for path in sorted((checkout / PACKAGE).rglob("*.py")):
        parts = path.relative_to(checkout).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(name: str, path: Path, known: Iterable[str]) -> Iterator[str]:
    """The modules out of the known ones that a file names, each the longest name that is a module."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        targets = []
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            targets = [f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base for alias in node.names]
        yield from (target for target in targets if target in known and target != name)


def file_graph(checkout: Path) -> Graph:
    files = files_of(checkout)
    return {name: set(imports_of(name, path, files)) for name, path in files.items()}


def room_of(name: str) -> str:
    """mixpool.ops.fused.launch -> ops; mixpool.records -> records.py; mixpool -> __init__"""
    return (*name.split("."), "__init__")[1]


def room_graph(files: Graph) -> Graph:
    rooms: Graph = {room_of(name): set() for name in files}
    for name, targets in files.items():
        rooms[room_of(name)] |= {room_of(target) for target in targets} - {room_of(name)}
    return rooms


def circles(graph: Graph) -> list[list[str]]:
    """The sets of names that import one another, directly or by way of others; each sorted."""
    reached = {name: _reached(graph, name) for name in graph}
    groups = {tuple(sorted(b for b in reached[a] if a in reached[b])) for a in graph if a in reached[a]}
    return [list(group) for group in sorted(groups)]


def _reached(graph: Graph, start: str) -> set[str]:
    found, waiting = set(), [*graph[start]]
    while waiting:
        if (name := waiting.pop()) not in found:
            found.add(name)
            waiting += graph[name]
    return found


def longest_chain(graph: Graph) -> list[str]:
    """Names that import one another in a row; a circle counts as one, its names joined by "=" ."""
    group = {name: name for name in graph} | {name: "=".join(names) for names in circles(graph) for name in names}
    merged: Graph = {name: set() for name in group.values()}
    for name, targets in graph.items():
        merged[group[name]] |= {group[target] for target in targets} - {group[name]}
    chains: dict[str, list[str]] = {}

    def chain(name: str) -> list[str]:
        if name not in chains:
            chains[name] = [name, *max((chain(target) for target in sorted(merged[name])), key=len, default=[])]
        return chains[name]

    return max((chain(name) for name in sorted(merged)), key=len)


def report(checkout: Path) -> str:
    paths, files = files_of(checkout), file_graph(checkout)
    rooms = room_graph(files)
    lines = dict.fromkeys(rooms, 0)
    for name, path in paths.items():
        lines[room_of(name)] += len(path.read_text().splitlines())
    chain, between = longest_chain(rooms), circles(rooms)
    inside = [group for group in circles(files) if len({*map(room_of, group)}) == 1]
    text = [f"{sum(lines.values()):6d} lines in {len(files)} files, {len(rooms)} rooms"]
    text += [f"{lines[room]:6d} {room:16s} -> {', '.join(sorted(rooms[room])) or '-'}" for room in sorted(rooms)]
    arrows = [sum(map(len, graph.values())) for graph in (rooms, files)]
    text.append(f"arrows between rooms: {arrows[0]}, between files: {arrows[1]}")
    text.append(f"levels: {len(chain)} ({' -> '.join(chain)})")
    text += [f"circles {where}: {len(found)}" for where, found in (("between rooms", between), ("inside", inside))]
    return "\n".join(text + ["    " + " = ".join(group) for group in (*between, *inside)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT, metavar="CHECKOUT", help="default: this one")
    print(report(parser.parse_args().folder))


if __name__ == "__main__":
    main()
