"""The version: one place, which the package and its build read."""

from __future__ import annotations

import re

import pytest

import mixpool
from mixpool.version import VERSION


def test_the_package_has_it():
    assert mixpool.__version__ == VERSION


def test_it_is_a_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+|rc\d+)?", VERSION)


def test_the_build_reads_it(repository):
    """As hatchling does: by its regular expression, from the file that pyproject.toml names."""
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads((repository / "pyproject.toml").read_text())
    assert "version" in project["project"]["dynamic"]
    text = (repository / project["tool"]["hatch"]["version"]["path"]).read_text()
    found = re.findall(r"""(?im)^(?:__version__|VERSION)(?: ?: ?str)? *= *(['"])v?(.+?)\1""", text)
    assert [version for _, version in found] == [VERSION]
