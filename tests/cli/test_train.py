"""The command `mixpool train`: its options reach the training, its errors the user."""

from __future__ import annotations

import pytest

from mixpool.cli import main


def test_the_file_and_the_command_line_reach_the_training(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("mixpool.training.train.train", asked.append)
    (tmp_path / "c.yaml").write_text("epochs: 7\nlr: 0.5\n")
    assert main(["train", "-c", str(tmp_path / "c.yaml"), "--lr", "0.25"]) == 0
    assert (asked[0].epochs, asked[0].lr, asked[0].batch_size) == (7, 0.25, 128)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--learning-rate", "1"], "unrecognized arguments: --learning-rate 1 (see mixpool --help)"),
        (["--batch-size", "0"], "expected batch_size to be 1 or more, got 0"),
        (["-c", "nowhere.yaml"], "nowhere.yaml does not exist"),
    ],
)
def test_errors_are_one_line(arguments, message, fails):
    assert message in fails("train", *arguments)
