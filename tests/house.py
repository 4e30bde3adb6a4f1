"""The plan of the house: who may import whom, and which test file belongs to which module.

    python tests/house.py [FOLDER OF THE PACKAGE]      prints the folders, the arrows between them, and the circles

Legend: a *file* is named by its path inside the package ("ops/norm.py"), a *place* is the first part of that path: one
of the folders of ORDER, or one of the four files that lie beside them. "ops/fused" counts as one file seen from ops.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "mixpool"

FOLDERS = (
    "filters",
    "ops",
    "stem",
    "selection",
    "conversion",
    "timm_models",
    "evaluation",
    "training",
    "cli",
)
# From left to right; a file imports its own folder and what stands left of it.
ORDER = (
    ("records.py", "figures.py"),
    *((folder,) for folder in FOLDERS[:5]),
    ("__init__.py",),
    *((folder,) for folder in FOLDERS[5:]),
    ("__main__.py",),
)
UNITS = ("ops/fused",)
EXCEPTIONS = {("records.py", "__init__.py"): "mixpool.__version__, which every record carries"}
MAX_LINES = 400

Sources = Mapping[str, str]  # file -> its text


def sources_of(package: Path = PACKAGE) -> dict[str, str]:
    return {path.relative_to(package).as_posix(): path.read_text() for path in sorted(package.rglob("*.py"))}


def place(file: str) -> str:
    return file.partition("/")[0]


# --- imports ----------------------------------------------------------------------------------------------------------


def imported_names(source: str, package: str = "mixpool") -> set[str]:
    """Dotted names that a source imports, wherever it does: at the top, in a function, for type checking alone."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            names |= {f"{base}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and "import" in ast.unparse(node.func):  # importlib.import_module("...")
            names |= {a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)}
    return {name for name in names if name.split(".")[0] in (package, "")}


def file_of(name: str, files: Iterable[str]) -> str:
    """The file that a dotted name is in: "mixpool.ops.norm.f" is in "ops/norm.py"."""
    parts = name.split(".")[1:]
    while parts:
        for candidate in ("/".join(parts) + ".py", "/".join(parts) + "/__init__.py"):
            if candidate in files:
                return candidate
        parts.pop()
    return "__init__.py"


def imports_of(sources: Sources) -> dict[str, set[str]]:
    """Every file -> the files of the package that it imports."""
    return {
        file: {file_of(name, sources) for name in imported_names(source) if not name.startswith(".")} - {file}
        for file, source in sources.items()
    }


# --- the rules, each a list of sentences about what breaks it ---------------------------------------------------------


def wrong_imports(sources: Sources) -> list[str]:
    """Imports that do not go left."""
    level = {name: i for i, names in enumerate(ORDER) for name in names}
    sentences = [f"{file}: {place(file)} has no place in ORDER" for file in sources if place(file) not in level]
    for file, source in sources.items():
        if any(name.startswith(".") for name in imported_names(source)):
            sentences.append(f"{file} has a relative import; name the folder")
    for file, others in imports_of(sources).items():
        for other in sorted(others):
            is_left = level.get(place(other), len(ORDER)) < level.get(place(file), -1)
            is_own = place(other) == place(file)
            if not is_left and not is_own and (file, other) not in EXCEPTIONS:
                sentences.append(f"{file} imports {other}, which is not left of it")
    return sentences


def circles(sources: Sources) -> list[str]:
    """Circles between the files of a folder; those inside a unit are circles, and those through it as a whole."""

    def unit(file: str) -> str:
        return next((u for u in UNITS if file.startswith(u + "/")), file)

    imports = imports_of(sources)
    whole: dict[str, set[str]] = {}
    for file, others in imports.items():
        whole.setdefault(unit(file), set()).update({unit(other) for other in others} - {unit(file)})
    inside = {
        file: {other for other in others if unit(other) == unit(file)}
        for file, others in imports.items()
        if unit(file) != file
    }
    return [
        " -> ".join(circle)
        for graph in (whole, inside)
        for circle in _circles_of({a: {b for b in others if place(a) == place(b)} for a, others in graph.items()})
    ]


def _reached(graph: Mapping[str, set[str]], start: str) -> dict[str, str]:
    """Every node that can be reached -> the one before it on a shortest way from `start`."""
    before: dict[str, str] = {}
    todo = [start]
    for node in todo:
        for other in sorted(graph.get(node, ())):
            if other not in before:
                before[other] = node
                todo.append(other)
    return before


def _circles_of(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """One circle for each set of nodes that reach each other."""

    found, seen = [], set()
    for node in sorted(graph):
        before = _reached(graph, node)
        if node in seen or node not in before:
            continue
        way = [node]
        while len(way) == 1 or way[-1] != node:
            way.append(before[way[-1]])
        found.append(way[::-1])
        seen |= {other for other in before if node in _reached(graph, other)}
    return found


def namesake(file: str) -> str | None:
    """The test file that belongs to a file of the package, in tests/; None for an __init__.py, which needs none."""
    file = next((unit + ".py" for unit in UNITS if file.startswith(unit + "/")), file)
    *folders, leaf = file.split("/")
    name = leaf.removesuffix(".py").strip("_")
    return None if leaf == "__init__.py" else "/".join([*folders, f"test_{name}.py"])


def missing_tests(files: Iterable[str], tests: Iterable[str]) -> list[str]:
    """Test files that are not there."""
    wanted = {namesake(file): file for file in files}
    return [f"{file} has no tests/{test}" for test, file in wanted.items() if test is not None and test not in tests]


def long_modules(sources: Sources) -> list[str]:
    lines = {file: len(source.splitlines()) for file, source in sources.items()}
    return [f"{file} has {n} lines, at most {MAX_LINES}" for file, n in lines.items() if n > MAX_LINES]


# --- the picture ------------------------------------------------------------------------------------------------------


def picture(sources: Sources) -> str:
    """What a newcomer meets: rooms, the arrows between them, levels, circles."""
    imports = imports_of(sources)
    for file, other in EXCEPTIONS:
        imports.get(file, set()).discard(other)
    rooms: dict[str, set[str]] = {}
    for file, others in imports.items():
        rooms.setdefault(place(file), set()).update({place(other) for other in others} - {place(file)})
    level: dict[str, int] = {}
    while len(level) < len(rooms):  # a room stands right of all that it imports; rooms in a circle share a level
        left = {room: {room, *_reached(rooms, room)} - level.keys() for room in rooms if room not in level}
        lowest = min(left.values(), key=len)
        below = {other for room in lowest for other in rooms[room]} - lowest
        level |= dict.fromkeys(lowest, max((level[other] for other in below), default=-1) + 1)
    lines = [
        f"{level[room] + 1:3d}  {room:<14} imports {', '.join(sorted(rooms[room])) or 'nothing'}" for room in rooms
    ]
    arrows = sum(len(others) for others in imports.values())
    found = circles(sources) + [" -> ".join(circle) for circle in _circles_of(rooms)]
    return "\n".join(
        [
            *sorted(lines),
            f"{len(rooms)} rooms on {max(level.values()) + 1} levels, {sum(map(len, rooms.values()))} arrows between "
            f"them, {arrows} between files, {len(found)} circles",
            *(f"  circle: {circle}" for circle in found),
        ]
    )


if __name__ == "__main__":
    print(picture(sources_of(Path(sys.argv[1]) if len(sys.argv) > 1 else PACKAGE)))
