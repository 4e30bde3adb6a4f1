"""Every Python snippet of the README runs, in order, in one namespace."""

import re
from pathlib import Path

import pytest
import torch

README = Path(__file__).parents[1] / "README.md"


def test_snippets_run(capsys):
    snippets = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(snippets) == 2
    torch.manual_seed(0)
    for snippet in snippets:
        exec(compile(snippet, str(README), "exec"), {})
    assert capsys.readouterr().out.split("\n")[:2] == ["25", "torch.Size([2, 1000])"]


def test_it_is_short_and_its_links_exist():
    text = README.read_text()
    assert len(text.splitlines()) <= 150
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (README.parent / target).exists(), target


DOCTESTED = (
    "benchmarks.theory.experiment",
    "mixpool.conversion.convert",
    "mixpool.conversion.initialize",
    "mixpool.evaluation.evaluate",
    "mixpool.evaluation.shifts",
    "mixpool.filters.packets",
    "mixpool.filters.theory",
    "mixpool.filters.wavelets",
    "mixpool.ops.functional",
    "mixpool.selection.compare",
    "mixpool.selection.pictures",
    "mixpool.selection.predict",
    "mixpool.selection.stats",
    "mixpool.stabilization.files",
    "mixpool.stabilization.stabilize",
    "mixpool.stem.module",
)


@pytest.mark.parametrize("module", DOCTESTED)
def test_docstring_examples_run(module):
    import doctest
    import importlib

    from torch import nn

    loaded = importlib.import_module(module)
    result = doctest.testmod(loaded, extraglobs={"torch": torch, "nn": nn})
    assert result.attempted > 0 and result.failed == 0
