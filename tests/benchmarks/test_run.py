"""The measurements of `make bench` that have no tests of their own: they run, on little, and explain themselves."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch
from torch import nn

from benchmarks import __main__ as run
from benchmarks.kit import command
from benchmarks.selecting import partner
from mixpool import records
from mixpool.filters import gabor


@pytest.mark.parametrize("name", run.NAMES)
def test_every_measurement_has_a_main_and_a_docstring(name):
    module = importlib.import_module(f"benchmarks.{name}")
    assert callable(module.main)
    assert f"python -m benchmarks.{name}" in module.__doc__


def test_help_is_the_docstring_and_measures_nothing(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["partner.py", "--help"])
    with pytest.raises(SystemExit, match="0"):
        command.run(lambda: pytest.fail("it measured"), partner.__doc__)
    assert "writes records/partner.jsonl" in capsys.readouterr().out


def test_an_unknown_option_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["partner.py", "--hlep"])
    with pytest.raises(SystemExit, match="2"):
        command.run(lambda: pytest.fail("it measured"), partner.__doc__)


def test_partner_measures_every_partner_with_both_blurs(monkeypatch, tmp_path):
    conv = nn.Conv2d(3, 96, 7, 2)
    conv.weight.data = gabor.gabor_bank(96, 3, 7)
    network = nn.Module()
    network.features = nn.Sequential(conv)
    monkeypatch.setattr(partner, "photos", lambda: (torch.randn(2, 3, 48, 48), None))
    monkeypatch.setattr(partner, "shifted", lambda images: images)
    monkeypatch.setattr(partner, "squeezenet", lambda: network)
    monkeypatch.setattr(partner, "RECORDS", tmp_path)
    partner.main()
    found = list(records.read(tmp_path / "partner.jsonl"))
    assert len(found) == 10
    high = {(r["partner"], r["blur"]): r["correlation_with_rmax"]["above_1.2"] for r in found}
    for name in {r["partner"] for r in found}:
        assert high[name, 3] > high[name, 1] > 0.3  # the images are noise
