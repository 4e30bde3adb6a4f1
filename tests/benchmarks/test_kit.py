"""What the questions share: commands, pages made from records, figures, the import graph."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import __main__ as bench
from benchmarks.kit import command, figures, import_graph, markdown, tables
from benchmarks.kit.earlier import in_present_words
from benchmarks.selecting import partner
from benchmarks.selecting import run as selecting
from mixpool import records

# --- commands ---------------------------------------------------------------------------------------------------------

COMMANDS = [
    "",
    *(f".{question}" for question in tables.QUESTIONS),
    *(f".selecting.{part}" for part in selecting.PARTS),
    *(".pretrained.squeezenet", ".pretrained.evaluation", ".cifar10.straight", ".stabilize.cost"),
    *(".kit.tables", ".kit.figures", ".kit.import_graph"),
]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_main_and_says_how_it_is_called(name):
    """That of a folder is `main` of its `__main__.py`, which the docstring of its `run.py` explains."""
    module = importlib.import_module(f"benchmarks{name}")
    explained = module
    if hasattr(module, "__path__"):
        explained = bench if name == "" else importlib.import_module(f"benchmarks{name}.run")
        module = importlib.import_module(f"benchmarks{name}.__main__")
    assert callable(module.main)
    assert f"python -m benchmarks{name}" in explained.__doc__


def test_what_make_bench_runs_is_there():
    assert {f".{name}" for name in (*bench.MEASUREMENTS, *bench.LAST)} <= set(COMMANDS)


def test_make_bench_runs_the_named_ones_then_tables_and_figures(monkeypatch):
    ran = []
    monkeypatch.setattr(bench.subprocess, "run", lambda command, **options: ran.append(command[2]))
    monkeypatch.setattr(sys, "argv", ["benchmarks", "cost", "peers"])
    bench.main()
    assert ran == ["benchmarks.cost", "benchmarks.peers", "benchmarks.kit.tables", "benchmarks.kit.figures"]
    monkeypatch.setattr(sys, "argv", ["benchmarks", "costs"])
    with pytest.raises(SystemExit, match="2"):
        bench.main()


def test_a_folders_command_is_what_records_name(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/benchmarks/cost/__main__.py", "--only", "count"])
    command.of_folder("benchmarks.cost")
    assert records.stamp("x")["command"] == "python -m benchmarks.cost --only count"


def test_help_is_the_docstring_and_measures_nothing(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["partner.py", "--help"])
    with pytest.raises(SystemExit, match="0"):
        command.run(lambda: pytest.fail("it measured"), partner.__doc__)
    assert "writes records/partner.jsonl" in capsys.readouterr().out


def test_an_unknown_option_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["partner.py", "--hlep"])
    with pytest.raises(SystemExit, match="2"):
        command.run(lambda: pytest.fail("it measured"), partner.__doc__)


# --- tables and figures -----------------------------------------------------------------------------------------------


PRESENT = {"num_bank": 24, "pooling": "cmod", "rest": "max"}
WITHOUT_TABLES = (tables.BENCHMARKS / "README.md", tables.BENCHMARKS / "theory" / "README.md")


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: str(page.relative_to(tables.ROOT)))
def test_tables_are_up_to_date(page):
    text = page.read_text()
    assert tables.filled(text) == text, "run python -m benchmarks.kit.tables"
    assert tables.BLOCK.search(text) or page in WITHOUT_TABLES


def test_a_stale_table_is_noticed(tmp_path, monkeypatch):
    page = tmp_path / "README.md"
    text = next(page for page in tables.PAGES if tables.BLOCK.search(page.read_text())).read_text()
    page.write_text(tables.BLOCK.sub(lambda match: match[0].replace("| stock |", "| stack |"), text))
    assert page.read_text() != text
    monkeypatch.setattr(tables, "PAGES", (page,))
    assert tables.stale() == [page]
    tables.write()
    assert page.read_text() == text and tables.stale() == []


def test_arguments_of_version_0_1_are_read_in_the_words_of_today():
    assert in_present_words({"num_bank": 24, "blur": 1, "max_blur": 1}) == PRESENT
    assert in_present_words(PRESENT) == PRESENT
    default = {"blur": 3, "max_blur": 3, "imag": "tied", "select": [True, False]}
    assert in_present_words(default) == {"pooling": "modulus", "rest": "blurpool", "select": [True, False]}
    assert in_present_words({"imag": "free"}) == {"imag": "free"}, "nothing of today"


def test_every_table_is_on_one_page():
    shown = [name for page in tables.PAGES for name in tables.BLOCK.findall(page.read_text())]
    assert sorted(shown) == sorted(tables.makers())
    assert {page.parent.name for page in tables.PAGES} >= set(tables.QUESTIONS) - {"theory"}


def test_the_front_page_is_short_and_its_links_exist():
    front = tables.BENCHMARKS / "README.md"
    text = front.read_text()
    assert len(text.splitlines()) <= 80
    for question in tables.QUESTIONS:
        assert f"`python -m benchmarks.{question}`" in text
    for page in tables.PAGES[1:]:
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page}: {target}"


@pytest.mark.slow
def test_figures_are_up_to_date(tmp_path):
    drawn = figures.draw(tmp_path)
    assert {path.name for path in drawn} == {path.name for path in figures.DOCS.glob("*.png")} - {"demo.png"}
    for path in drawn:
        committed = figures.DOCS / path.name
        assert committed.stat().st_size < 200_000
        with Image.open(path) as new, Image.open(committed) as old:
            # Another matplotlib or FreeType may move a line by a pixel, but not change the picture.
            assert new.size == old.size
            difference = np.abs(np.asarray(new.convert("RGB"), float) - np.asarray(old.convert("RGB"), float))
            assert difference.mean() < 2, f"{path.name}: run python -m benchmarks.kit.figures"


def test_records_of_several_machines_name_all_of_them():
    record = records.stamp("speed")
    other = record | {"machine": record["machine"] | {"cpu": "Abacus", "cpu_capability": "BEADS"}}
    line = markdown.origins([record, other, record], "python -m benchmarks.speed")
    assert line.count(" and ") == 1 and " and Abacus BEADS, " in line and "`python -m benchmarks.speed`" in line
    assert torch.backends.cpu.get_cpu_capability() in markdown.machine_line(record)
    older = {key: value for key, value in other["machine"].items() if key != "cpu_capability"}
    assert markdown.machine_line(record | {"machine": older}).startswith("Abacus, ")
    with pytest.raises(AssertionError, match="one version of torch"):
        markdown.origins([record, record | {"machine": record["machine"] | {"torch": "0.1"}}], "")


# --- the import graph -------------------------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path) -> Path:
    """a -> b -> c, b -> c within a function, c -> b for types; two files of `a` import one another; records beside."""
    files = {
        "__init__.py": "from mixpool.a import top",
        "records.py": "import os, mixpool",
        "a/__init__.py": "",
        "a/top.py": "from mixpool.b import low, name\nfrom . import side",
        "a/side.py": "def f():\n    from mixpool.a.top import g",
        "b/__init__.py": "name = 1",
        "b/low.py": "def f():\n    import mixpool.c.deep.down",
        "c/deep/down.py": "if TYPE_CHECKING:\n    from ...b import low",
    }
    for name, text in files.items():
        path = tmp_path / "mixpool" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return tmp_path


def test_the_graph_counts_every_import(checkout):
    sources = import_graph.sources_of(checkout)
    imports = import_graph.imports_of(sources)
    assert imports["a/top.py"] == {"b/low.py", "b/__init__.py", "a/side.py"}
    assert imports["c/deep/down.py"] == {"b/low.py"}, "a relative import"
    assert imports["records.py"] == {"__init__.py"} and imports["__init__.py"] == {"a/top.py"}
    places = import_graph.between_places(imports)
    assert places == {"__init__.py": {"a"}, "records.py": {"__init__.py"}, "a": {"b"}, "b": {"c"}, "c": {"b"}}
    assert import_graph.circles_of(places) == [["b", "c", "b"]]
    assert import_graph.circles(imports) == [["a/side.py", "a/top.py", "a/side.py"]]
    assert import_graph.levels(places) == {"b": 1, "c": 1, "a": 2, "__init__.py": 3, "records.py": 4}
    lines = import_graph.report(sources).splitlines()
    assert lines[:2] == [" 1  b                 3 lines, imports c", " 1  c                 2 lines, imports b"]
    assert lines[5:] == [
        "3 folders and 2 files beside them; 12 lines in 8 files",
        "levels: 2 of folders, 4 with the files beside them",
        "arrows: 3 between folders, 5 with the files beside them, 8 between all files",
        "circles: 2",
        "    b -> c -> b",
        "    a/side.py -> a/top.py -> a/side.py",
    ]


def test_a_straight_line_has_no_circle(checkout):
    (checkout / "mixpool/c/deep/down.py").write_text("")
    (checkout / "mixpool/a/side.py").write_text("")
    text = import_graph.report(import_graph.sources_of(checkout))
    assert text.endswith("circles: 0") and "levels: 3 of folders, 5 with" in text


def test_the_command_prints_the_graph_of_another_checkout(checkout, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["import_graph", "--folder", str(checkout)])
    import_graph.main()
    assert "12 lines in 8 files" in capsys.readouterr().out
