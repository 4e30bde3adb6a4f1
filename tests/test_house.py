"""The plan of the house as tests: who may import whom, and which test file belongs to which module.

Each rule has proofs that its test can fail, on trees made here. The graph is that of benchmarks/kit/import_graph.py,
whose legend holds: a file is named by its path inside the package, its place is the first part of that path.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

from benchmarks.kit import import_graph
from benchmarks.kit.import_graph import (
    PACKAGE,
    ROOT,
    UNITS,
    Sources,
    imported_names,
    imports_of,
    place,
    report,
    sources_of,
)

FOLDERS = (
    "filters",
    "ops",
    "stem",
    "selection",
    "conversion",
    "evaluation",
    "stabilization",
    "timm_models",
    "training",
    "cli",
)
# From left to right; a file imports its own folder and what stands left of it.
ORDER = (
    ("version.py",),
    ("records.py", "figures.py"),
    *((folder,) for folder in FOLDERS[:7]),
    ("__init__.py",),
    *((folder,) for folder in FOLDERS[7:]),
    ("__main__.py",),
)
MAX_LINES = 400

SOURCES = sources_of()
TYPES_ONLY = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    "


# --- the rules, each a list of sentences about what breaks it ---------------------------------------------------------


def wrong_imports(sources: Sources) -> list[str]:
    """Imports that do not go left."""
    level = {name: i for i, names in enumerate(ORDER) for name in names}
    sentences = [f"{file}: {place(file)} has no place in ORDER" for file in sources if place(file) not in level]
    relative = {file for file, text in sources.items() if any(name.startswith(".") for name in imported_names(text))}
    sentences += [f"{file} has a relative import; name the folder" for file in sorted(relative)]
    for file, others in imports_of(sources).items():
        for other in sorted(others if file not in relative else ()):
            is_left = level.get(place(other), len(ORDER)) < level.get(place(file), -1)
            is_own = place(other) == place(file)
            if not is_left and not is_own:
                sentences.append(f"{file} imports {other}, which is not left of it")
    return sentences


def circles(sources: Sources) -> list[str]:
    """Circles between the files of a folder."""
    return [" -> ".join(circle) for circle in import_graph.circles(imports_of(sources))]


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


def as_lines(sentences: list[str]) -> str:
    return "\n".join(["", *sentences])


def test_the_folders_are_the_ones_in_the_line():
    assert {file.split("/")[0] for file in SOURCES if "/" in file} == set(FOLDERS)
    assert len(SOURCES) > 60
    for folder in FOLDERS:
        assert (ROOT / PACKAGE / folder / "__init__.py").is_file()


# --- imports ----------------------------------------------------------------------------------------------------------


def test_a_file_imports_its_own_folder_and_what_stands_left_of_it():
    assert not wrong_imports(SOURCES), as_lines(wrong_imports(SOURCES))


BASE = {
    "__init__.py": "from mixpool.stem.module import Stem\nfrom mixpool.version import VERSION\n",
    "filters/__init__.py": "",
    "filters/gabor.py": "import torch\n",
    "ops/__init__.py": "",
    "ops/norm.py": "from mixpool.filters.gabor import bank\n",
    "ops/fused/__init__.py": "",
    "ops/fused/launch.py": "from mixpool.ops import norm\n",
    "stem/__init__.py": "",
    "stem/module.py": "from mixpool.ops.norm import f\n",
    "timm_models/model.py": "from mixpool import Stem\n",
    "version.py": "VERSION = '1'\n",
    "records.py": "from mixpool.version import VERSION\n",
    "figures.py": "import matplotlib\n",
    "__main__.py": "from mixpool.stem.module import Stem\n",
}


def test_a_tree_that_obeys_is_let_through():
    assert wrong_imports(BASE) == circles(BASE) == []


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("filters/gabor.py", "from mixpool.stem.module import Stem\n"),
        ("filters/gabor.py", "import mixpool.stem.module\n"),
        ("filters/gabor.py", "from mixpool import stem\n"),
        ("filters/gabor.py", "def f():\n    from mixpool.ops.norm import f\n"),
        ("filters/gabor.py", TYPES_ONLY + "from mixpool.stem.module import Stem\n"),
        ("filters/gabor.py", "import importlib\nimportlib.import_module('mixpool.ops.norm')\n"),
        ("filters/gabor.py", "from ..ops import norm\n"),
        ("filters/__init__.py", "from mixpool.ops.norm import f\n"),
        ("stem/module.py", "import mixpool\n"),
        ("stem/module.py", "from mixpool import convert\n"),
        ("ops/fused/launch.py", "from mixpool.stem.module import Stem\n"),
        ("__init__.py", "from mixpool.timm_models.model import Model\n"),
        ("stem/module.py", "from mixpool.timm_models.model import Model\n"),
        ("records.py", "from mixpool.filters.gabor import bank\n"),
        ("records.py", "def stamp():\n    import mixpool\n"),
        ("version.py", "import mixpool.records\n"),
        ("figures.py", "import mixpool\n"),
        ("figures.py", "from mixpool.records import stamp\n"),
        ("news.py", ""),
        ("news/leaf.py", ""),
    ],
)
def test_the_test_of_the_line_can_fail(file: str, source: str):
    assert len(wrong_imports({**BASE, file: source})) == 1


def test_no_circles_between_the_files_of_a_folder():
    assert not circles(SOURCES), as_lines(circles(SOURCES))


def test_the_test_of_circles_can_fail():
    two = {"filters/a.py": "import mixpool.filters.b\n", "filters/b.py": "from mixpool.filters.a import f\n"}
    assert circles({**BASE, **two}) == ["filters/a.py -> filters/b.py -> filters/a.py"]
    hidden = two | {"filters/b.py": TYPES_ONLY + "from mixpool.filters.a import f\n"}
    assert len(circles({**BASE, **hidden})) == 1
    assert circles(two | {"filters/b.py": ""}) == []
    three = {f"ops/{a}.py": f"from mixpool.ops.{b} import f\n" for a, b in ("ab", "bc", "ca")}
    assert circles({**BASE, **three}) == ["ops/a.py -> ops/b.py -> ops/c.py -> ops/a.py"]
    assert circles({**three, **two}) == circles(two) + circles(three), "each of several"
    through_init = {"filters/__init__.py": "from mixpool.filters.gabor import bank\n"}
    assert len(circles({**through_init, "filters/gabor.py": "from mixpool.filters import bank\n"})) == 1


def test_the_fused_folder_counts_as_one_file_and_has_no_circle_inside():
    through = {**BASE, "ops/norm.py": "from mixpool.ops.fused.windows import f\n", "ops/fused/windows.py": ""}
    assert circles(through) == ["ops/fused -> ops/norm.py -> ops/fused"], "launch imports norm, norm imports windows"
    inside = {f"ops/fused/{a}.py": f"from mixpool.ops.fused.{b} import f\n" for a, b in ("ab", "ba")}
    assert circles({**BASE, **inside}) == ["ops/fused/a.py -> ops/fused/b.py -> ops/fused/a.py"]


def test_the_picture_counts_levels_and_circles():
    assert "levels: 10 of folders" in report(SOURCES) and report(SOURCES).endswith("circles: 0")
    lines = report(BASE).splitlines()
    assert lines[-1] == "circles: 0" and "levels: 3 of folders, 5 with the files beside them" in lines
    assert "arrows: 2 between folders, 7 with the files beside them, 8 between all files" in lines
    upward = {**BASE, "filters/gabor.py": "from mixpool.ops.norm import f\n"}
    assert report(upward).splitlines()[-2:] == ["circles: 1", "    filters -> ops -> filters"]


# --- files ------------------------------------------------------------------------------------------------------------


def test_every_module_has_its_test_file():
    folder = Path(__file__).parent
    tests = {path.relative_to(folder).as_posix() for path in folder.rglob("test_*.py")}
    assert not missing_tests(SOURCES, tests), as_lines(missing_tests(SOURCES, tests))


def test_the_test_of_test_files_can_fail():
    tests = {"filters/test_gabor.py", "ops/test_norm.py", "ops/test_fused.py", "stem/test_module.py"}
    tests |= {"timm_models/test_model.py", "test_version.py", "test_records.py", "test_figures.py"}
    tests |= {"test_main.py"}
    assert missing_tests(BASE, tests) == []
    for test in tests:
        assert len(missing_tests(BASE, tests - {test})) == 1, test
    assert missing_tests({"filters/gabor.py": ""}, {"ops/test_gabor.py"}) == [
        "filters/gabor.py has no tests/filters/test_gabor.py"
    ]
    assert missing_tests({"timm_models/__main__.py": ""}, {"timm_models/test_main.py"}) == []


def test_no_module_is_long():
    assert not long_modules(SOURCES), as_lines(long_modules(SOURCES))


def test_the_test_of_lengths_can_fail():
    assert long_modules({"a.py": "x = 1\n" * MAX_LINES}) == []
    assert long_modules({"a.py": "x = 1\n" * (MAX_LINES + 1)}) == ["a.py has 401 lines, at most 400"]
