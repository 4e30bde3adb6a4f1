"""The import graph of mixpool/: its folders, the arrows between them, levels and circles.

    python -m benchmarks.kit.import_graph [--folder CHECKOUT]      another checkout, to compare before and after

An import counts wherever it stands: inside a function, and under TYPE_CHECKING, too. Nothing is imported, so that any
version can be looked at. What the graph may look like, tests/test_house.py says.

Legend: a *file* is named by its path inside the package ("ops/norm.py"), its *place* is the first part of that path: a
folder of the package, or a file beside the folders. "ops/fused" counts as one file seen from ops.
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Iterable, Mapping
from pathlib import Path

from benchmarks.kit.store import ROOT

PACKAGE = "mixpool"
UNITS = ("ops/fused",)

Sources = Mapping[str, str]  # file -> its text
Graph = dict[str, set[str]]  # name -> the names that it imports, all of them keys


def sources_of(checkout: Path = ROOT) -> dict[str, str]:
    package = checkout / PACKAGE
    return {path.relative_to(package).as_posix(): path.read_text() for path in sorted(package.rglob("*.py"))}


def place(file: str) -> str:
    return file.partition("/")[0]


def is_folder(place: str) -> bool:
    return not place.endswith(".py")


# --- from texts to arrows ---------------------------------------------------------------------------------------------


def imported_names(source: str) -> set[str]:
    """Dotted names of the package that a source imports, relative ones with their dots."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            names |= {f"{base.removesuffix('.')}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and "import" in ast.unparse(node.func):  # importlib.import_module("...")
            names |= {a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)}
    return {name for name in names if name.split(".")[0] in (PACKAGE, "")}


def file_of(name: str, files: Iterable[str]) -> str:
    """The file that a dotted name is in: "mixpool.ops.norm.f" is in "ops/norm.py"."""
    parts = name.split(".")[1:]
    while parts:
        for candidate in ("/".join(parts) + ".py", "/".join(parts) + "/__init__.py"):
            if candidate in files:
                return candidate
        parts.pop()
    return "__init__.py"


def absolute(name: str, file: str) -> str:
    """The full name of an import in a file: "..low.f" in "ops/fused/launch.py" is "mixpool.ops.low.f"."""
    bare = name.lstrip(".")
    level = len(name) - len(bare)
    above = [PACKAGE, *file.split("/")[:-1]]
    return ".".join([*above[: len(above) - level + 1], bare]) if level else name


def imports_of(sources: Sources) -> Graph:
    """Every file -> the files of the package that it imports."""
    return {
        file: {file_of(absolute(name, file), sources) for name in imported_names(source)} - {file}
        for file, source in sources.items()
    }


def between_places(imports: Graph) -> Graph:
    """The same of folders, and of the files beside them."""
    places: Graph = {}
    for file, others in imports.items():
        places.setdefault(place(file), set()).update({place(other) for other in others} - {place(file)})
    return places


# --- circles and levels -----------------------------------------------------------------------------------------------


def circles(imports: Graph) -> list[list[str]]:
    """Circles between the files of a place; those inside a unit are circles, and those through it as a whole."""

    def unit(file: str) -> str:
        return next((u for u in UNITS if file.startswith(u + "/")), file)

    whole: Graph = {}
    for file, others in imports.items():
        whole.setdefault(unit(file), set()).update({unit(other) for other in others} - {unit(file)})
    inside = {
        file: {other for other in others if unit(other) == unit(file)}
        for file, others in imports.items()
        if unit(file) != file
    }
    return [
        circle
        for graph in (whole, inside)
        for circle in circles_of({a: {b for b in others if place(a) == place(b)} for a, others in graph.items()})
    ]


def circles_of(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """One circle, its first name at the end again, for each set of names that reach each other."""
    found, seen = [], set()
    for name in sorted(graph):
        before = _reached(graph, name)
        if name in seen or name not in before:
            continue
        way = [name]
        while len(way) == 1 or way[-1] != name:
            way.append(before[way[-1]])
        found.append(way[::-1])
        seen |= {other for other in before if name in _reached(graph, other)}
    return found


def levels(graph: Mapping[str, set[str]]) -> dict[str, int]:
    """1 for a name that imports nothing, else one more than the highest that it imports; a circle has one level."""
    level: dict[str, int] = {}
    while len(level) < len(graph):
        left = {name: {name, *_reached(graph, name)} - level.keys() for name in graph if name not in level}
        lowest = min(left.values(), key=len)
        below = {other for name in lowest for other in graph[name]} - lowest
        level |= dict.fromkeys(lowest, max((level[other] for other in below), default=0) + 1)
    return level


def _reached(graph: Mapping[str, set[str]], start: str) -> dict[str, str]:
    """Every name that can be reached -> the one before it on a shortest way from `start`."""
    before: dict[str, str] = {}
    todo = [start]
    for name in todo:
        for other in sorted(graph.get(name, ())):
            if other not in before:
                before[other] = name
                todo.append(other)
    return before


# --- the picture ------------------------------------------------------------------------------------------------------


def report(sources: Sources) -> str:
    """What a newcomer meets: the folders with their levels, the files beside them, and the circles."""
    imports = imports_of(sources)
    places = between_places(imports)
    folders = {name: {other for other in others if is_folder(other)} for name, others in places.items()}
    folders = {name: others for name, others in folders.items() if is_folder(name)}
    level = levels(folders)
    order = sorted(places, key=lambda name: (not is_folder(name), level.get(name, 0), name))
    lines = {
        name: sum(len(text.splitlines()) for file, text in sources.items() if place(file) == name) for name in places
    }
    text = [
        f"{level.get(name, ''):>2}  {name:<13}{lines[name]:6d} lines, imports {', '.join(sorted(places[name])) or '-'}"
        for name in order
    ]
    found = circles_of(places) + circles(imports)
    text += [
        f"{len(folders)} folders and {len(places) - len(folders)} files beside them; "
        f"{sum(lines.values())} lines in {len(sources)} files",
        f"levels: {max(level.values(), default=0)} of folders, "
        f"{max(levels(places).values())} with the files beside them",
        f"arrows: {_arrows(folders)} between folders, {_arrows(places)} with the files beside them, "
        f"{_arrows(imports)} between all files",
        f"circles: {len(found)}",
    ]
    return "\n".join([*text, *(f"    {' -> '.join(circle)}" for circle in found)])


def _arrows(graph: Graph) -> int:
    return sum(map(len, graph.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT, metavar="CHECKOUT", help="default: this one")
    print(report(sources_of(parser.parse_args().folder)))


if __name__ == "__main__":
    main()
