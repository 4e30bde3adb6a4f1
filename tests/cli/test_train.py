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
        (["--model", "mixpool_resnet18", "--model-kwargs", "max_blur=3"], 'of max_blur=3 write rest="blurpool"'),
        (
            ["--model", "mixpool_resnet18", "--model-kwargs", "select=all", "blur=3"],
            'of blur=3 write pooling="modulus"',
        ),
        (["--model", "mixpool_resnet18", "--model-kwargs", "imag=tied"], "of imag=tied write nothing: the imaginary"),
        (["--model", "resnet18", "--convert", "blur=1"], 'of blur=1 write pooling="cmod"'),
        (["--model", "resnet18", "--convert", "imag=free"], "free imaginary filters were less accurate"),
    ],
)
def test_errors_are_one_line(arguments, message, fails):
    assert message in fails("train", *arguments)


def test_a_file_with_keywords_of_earlier_versions(tmp_path, fails):
    (tmp_path / "c.yaml").write_text("model: mixpool_resnet18\nmodel_kwargs: {num_bank: 24, blur: 1}\n")
    assert 'instead of blur=1 write pooling="cmod"' in fails("train", "-c", tmp_path / "c.yaml")
