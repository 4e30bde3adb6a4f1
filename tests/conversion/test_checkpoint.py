"""What a file of weights holds, and writing one all or nothing; tests/timm_models/test_loading.py loads them."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from mixpool.conversion.checkpoint import read_checkpoint, write_safetensors

PLAN = {"pool": "maxima, then low-pass"}


def test_a_plain_file_tells_of_no_plan(tmp_path):
    save_file({"weight": torch.ones(2)}, tmp_path / "plain.safetensors", metadata={"model": "resnet18"})
    torch.save({"weight": torch.ones(2)}, tmp_path / "plain.pth")
    for name in ("plain.safetensors", "plain.pth"):
        found = read_checkpoint(tmp_path / name)
        assert found.plan is None and found.arch is None and torch.equal(found.state["weight"], torch.ones(2))


def test_a_plan_in_the_metadata_and_in_an_entry(tmp_path):
    told = {"version": "0", "plan": PLAN, "arch": "resnet18", "args": {"num_classes": 2}}
    write_safetensors(nn.Linear(2, 2), tmp_path / "told.safetensors", {"mixpool": json.dumps(told)})
    found = read_checkpoint(tmp_path / "told.safetensors")
    assert (found.plan, found.arch, found.settings) == (PLAN, "resnet18", {"num_classes": 2})
    state = {"state_dict": nn.Linear(2, 2).state_dict(), "arch": "resnet34", "mixpool": {"plan": PLAN}}
    torch.save(state, tmp_path / "told.pth")
    found = read_checkpoint(tmp_path / "told.pth")
    assert (found.plan, found.arch, found.settings) == (PLAN, "resnet34", None)


@pytest.mark.parametrize("plan", [["pool"], {"pool": 3}, None])
def test_a_damaged_plan(plan, tmp_path):
    write_safetensors(nn.Linear(2, 2), tmp_path / "bad.safetensors", {"mixpool": json.dumps({"plan": plan})})
    with pytest.raises(ValueError, match="bad.safetensors .*its plan is damaged"):
        read_checkpoint(tmp_path / "bad.safetensors")


def test_metadata_that_are_no_json(tmp_path):
    write_safetensors(nn.Linear(2, 2), tmp_path / "bad.safetensors", {"mixpool": "{"})
    with pytest.raises(ValueError, match="cannot read the checkpoint .*bad.safetensors"):
        read_checkpoint(tmp_path / "bad.safetensors")
    write_safetensors(nn.Linear(2, 2), tmp_path / "list.safetensors", {"mixpool": "[1]"})
    assert read_checkpoint(tmp_path / "list.safetensors").plan is None


def test_tied_weights_are_written_twice(tmp_path):
    tied = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    tied[1].weight = tied[0].weight
    write_safetensors(tied, tmp_path / "tied.safetensors", {})
    state = read_checkpoint(tmp_path / "tied.safetensors").state
    assert torch.equal(state["0.weight"], tied[0].weight) and torch.equal(state["1.weight"], tied[0].weight)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "mixed.safetensors"
    path.write_bytes(b"old")

    def full(tensors, filename, metadata):
        filename.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="no space"):
        write_safetensors(torch.nn.Linear(2, 2), path, {})
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
