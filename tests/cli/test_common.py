"""What the commands share: integers, folders, the user's photos, and what is said on stderr."""

from __future__ import annotations

import argparse

import pytest

from mixpool.cli.common import folder_photos, integer, progress, say_failures, writable_folder


def test_integers_have_a_least_value():
    assert integer(0)("0") == 0 and integer(8)("12") == 12
    for text in ("7", "-9", "9.5", "x", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="expected an integer of at least 8, got"):
            integer(8)(text)


def test_a_folder_for_results_is_made(tmp_path):
    assert writable_folder(str(tmp_path / "a" / "b")).is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="expected --output to be a folder"):
        writable_folder(str(tmp_path / "file"))


def test_of_many_failures_the_first_are_named(capsys):
    say_failures([])
    assert capsys.readouterr().err == ""
    say_failures((f"{i}.png", "why") for i in range(25))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "mixpool: warning: left out 0.png: why" and len(lines) == 11
    assert lines[-1] == "mixpool: warning: 25 image(s) left out"


def test_photos_of_a_folder(noise_photos, capsys):
    assert folder_photos(str(noise_photos), 2, 500, crop_ratio=1.15).images.shape == (2, 3, 500, 500)
    err = capsys.readouterr().err
    assert "mixpool: 2 of 3 images in" in err and "2 image(s) too small, enlarged" in err
    assert len(folder_photos(str(noise_photos), 0, 32).names) == 3


def test_progress_is_silent_where_there_is_no_terminal(capsys):
    assert list(progress("working")([1, 2, 3], 3)) == [1, 2, 3]
    assert capsys.readouterr() == ("", "")
