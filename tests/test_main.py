"""`python -m mixpool` is the command `mixpool`."""

from __future__ import annotations

import runpy
import sys

import pytest

from mixpool import cli


@pytest.mark.parametrize("arguments", [["--help"], ["no such command"]])
def test_it_is_the_command(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mixpool", *arguments])
    results = []
    for run in (lambda: sys.exit(cli.main()), lambda: runpy.run_module("mixpool", run_name="__main__")):
        with pytest.raises(SystemExit) as left:
            run()
        results.append((left.value.code or 0, *capsys.readouterr()))
    assert results[0] == results[1]
    assert (results[0][0] == 0) == (arguments == ["--help"])
