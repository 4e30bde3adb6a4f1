"""The plan of the house as tests (see house.py); each rule with proofs that its test can fail, on trees made here."""

from __future__ import annotations

from pathlib import Path

import pytest
from house import (
    EXCEPTIONS,
    FOLDERS,
    MAX_LINES,
    PACKAGE,
    circles,
    imports_of,
    long_modules,
    missing_tests,
    picture,
    sources_of,
    wrong_imports,
)

SOURCES = sources_of()
TYPES_ONLY = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    "


def as_lines(sentences: list[str]) -> str:
    return "\n".join(["", *sentences])


def test_the_folders_are_the_ones_in_the_line():
    assert {file.split("/")[0] for file in SOURCES if "/" in file} == set(FOLDERS)
    assert len(SOURCES) > 60
    for folder in FOLDERS:
        assert (PACKAGE / folder / "__init__.py").is_file()


# --- imports ----------------------------------------------------------------------------------------------------------


def test_a_file_imports_its_own_folder_and_what_stands_left_of_it():
    assert not wrong_imports(SOURCES), as_lines(wrong_imports(SOURCES))


def test_every_exception_is_in_use():
    imports = imports_of(SOURCES)
    assert [pair for pair in EXCEPTIONS if pair[1] not in imports[pair[0]]] == []


BASE = {
    "__init__.py": "from mixpool.stem.module import Stem\n",
    "filters/__init__.py": "",
    "filters/gabor.py": "import torch\n",
    "ops/__init__.py": "",
    "ops/norm.py": "from mixpool.filters.gabor import bank\n",
    "ops/fused/__init__.py": "",
    "ops/fused/launch.py": "from mixpool.ops import norm\n",
    "stem/__init__.py": "",
    "stem/module.py": "from mixpool.ops.norm import f\n",
    "timm_models/model.py": "from mixpool import Stem\n",
    "records.py": "def stamp():\n    import mixpool\n",
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
    assert "circles" in picture(SOURCES)
    assert picture(BASE).splitlines()[-1].startswith("8 rooms on 5 levels, 5 arrows between them, 6 between files, 0 ")
    upward = {**BASE, "filters/gabor.py": "from mixpool.ops.norm import f\n"}
    assert picture(upward).splitlines()[-1] == "  circle: filters -> ops -> filters"


# --- files ------------------------------------------------------------------------------------------------------------


def test_every_module_has_its_test_file():
    folder = Path(__file__).parent
    tests = {path.relative_to(folder).as_posix() for path in folder.rglob("test_*.py")}
    assert not missing_tests(SOURCES, tests), as_lines(missing_tests(SOURCES, tests))


def test_the_test_of_test_files_can_fail():
    tests = {"filters/test_gabor.py", "ops/test_norm.py", "ops/test_fused.py", "stem/test_module.py"}
    tests |= {"timm_models/test_model.py", "test_records.py", "test_figures.py", "test_main.py"}
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
