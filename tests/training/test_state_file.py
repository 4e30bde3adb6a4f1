"""The file of a run's whole state: written all or nothing, generators included."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from mixpool.training import state_file


def test_generator_states_survive_the_file(tmp_path):
    random.seed(7), np.random.seed(7), torch.manual_seed(7)
    random.gauss(0, 1), np.random.randn()  # both keep half of a pair
    device = torch.device("cpu")
    state_file.save(tmp_path / "x", {"run": state_file.generator_states(device)})

    def draw():
        return random.gauss(0, 1), random.random(), np.random.randn(), np.random.rand(), torch.randn(3).tolist()

    expected = draw()
    state_file.set_generator_states(state_file.load(tmp_path / "x")["run"], device)
    assert draw() == expected


def test_a_checkpoint_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "last"
    state_file.save(path, {"run": 1})

    def fail(state, file):
        file.write(b"half of it")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        state_file.save(path, {"run": 2})
    assert state_file.load(path) == {"run": 1} and [p.name for p in tmp_path.iterdir()] == ["last"]

    def fail_as_torch_does(state, file):
        raise RuntimeError("[enforce fail at inline_container.cc] unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", fail_as_torch_does)
    with pytest.raises(OSError, match="cannot write .*last: .*unexpected pos"):
        state_file.save(path, {"run": 2})


def test_files_that_are_no_checkpoint(tmp_path):
    (tmp_path / "damaged").write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(ValueError, match="cannot read the checkpoint"):
        state_file.load(tmp_path / "damaged")
    torch.save({"state_dict": {}}, tmp_path / "other")
    with pytest.raises(ValueError, match="has no entry 'run'"):
        state_file.load(tmp_path / "other")
