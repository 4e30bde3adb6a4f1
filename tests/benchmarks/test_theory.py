"""The command of the theory's experiment, and what its page claims."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.kit import markdown
from benchmarks.theory import plots, run
from mixpool import records

SMALL = ["--size", "64", "--depth", "2"]


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos" / "class"
    folder.mkdir(parents=True)
    for i in range(3):
        noise = torch.randint(256, (30, 40, 3), dtype=torch.uint8).numpy()
        Image.fromarray(noise).resize((320, 240)).save(folder / f"{i}.png")
    return tmp_path / "photos"


def fails(capsys, *arguments):
    """The last line on stderr of a command that must fail with exit code 2 and print nothing."""
    with pytest.raises(SystemExit) as error:
        run.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert error.value.code == 2 and out == ""
    return err.strip().splitlines()[-1]


@pytest.mark.slow
def test_it_measures_and_draws(tmp_path, capsys, monkeypatch):
    two = {name: plots.FIGURES[name] for name in ("shifts", "frequency")}  # the others take long
    monkeypatch.setattr(plots, "FIGURES", two)
    folder = tmp_path / "new"
    assert run.main(["--images", "skimage", "--limit", "2", *SMALL, "2", "--output", str(folder)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    (record,) = records.read(folder / "theory.jsonl")
    assert record["num_photos"] == 2 and record["params"]["depth"] == 2 and "scikit-image" in record["photos"]
    pictures = re.findall(r"^picture: (.*)$", out, flags=re.MULTILINE)
    assert sorted(pictures) == sorted(str(path) for path in folder.glob("*.png")) and len(pictures) == 2
    (gap,) = re.findall(r"^mean gap +([\d.]+) \(([\d.]+) to ([\d.]+)\)$", out, flags=re.MULTILINE)
    assert 0.2 < float(gap[1]) <= float(gap[0]) <= float(gap[2]) < 1
    assert re.search(r"^analytic packets +8 of 32$", out, flags=re.MULTILINE)


def test_a_folder_with_what_cannot_be_read(photos, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run, "write_figures", lambda record, folder: [])
    (photos / "bad.jpg").write_bytes(b"not a photo")
    folder = tmp_path / "out"
    assert run.main(["--images", str(photos), "--output", str(folder), *SMALL, "--wavelet", "qshift_06"]) == 0
    err = capsys.readouterr().err
    assert "3 of 4 images" in err and "cannot read bad.jpg" in err
    (record,) = records.read(folder / "theory.jsonl")
    assert record["num_photos"] == 3 and record["params"]["wavelet"] == "qshift_06"
    assert record["photos"] == str(photos)


def test_without_options_it_makes_the_records_of_the_page(tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr(run, "measure", lambda options, *where: called.append((options.images, *where)) or ("", []))
    monkeypatch.chdir(tmp_path)
    assert run.main([]) == run.main(["--limit", "5"]) == 0
    assert called == [("sample", run.RECORDS, False), ("sample", run.Path("outputs"), True)]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--depth", "5"], "invalid choice: 5"),
        (["--depth", "1"], "invalid choice: 1"),
        (["--depth", "x"], "invalid int"),
        (["--wavelet", "haar"], "expected a q-shift family of"),
        (["--size", "60"], "--size 89 or more at depth 3"),
        (["--depth", "4", "--wavelet", "qshift_32"], "at depth 4 of qshift_32"),
        (["--size", "0"], "--size 49 or more"),
        (["--limit", "-1"], "at least 0"),
        (["--images", "no-such-folder"], "no-such-folder does not exist"),
        (["--images", "."], "found no file named"),
    ],
)
def test_it_refuses_in_one_line(options, message, tmp_path, capsys, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert message in fails(capsys, "--output", tmp_path / "out", *options)
    assert not list(tmp_path.rglob("*.jsonl"))


def test_it_refuses_blank_photos_and_a_file_for_a_folder(tmp_path, capsys, photos):
    (tmp_path / "blank").mkdir()
    Image.new("RGB", (80, 80), "gray").save(tmp_path / "blank" / "blank.png")
    with pytest.raises(SystemExit, match="2"):
        run.main(["--images", str(tmp_path / "blank"), "--output", str(tmp_path), *SMALL])
    assert "expected photos that show something" in capsys.readouterr().err.splitlines()[-1]
    (tmp_path / "file").write_text("")
    assert "is a file" in fails(capsys, "--images", photos, "--output", tmp_path / "file", *SMALL)


def test_the_claims_of_the_theorys_page():
    shallow, deep = markdown.read("theory")
    assert (deep["num_analytic"], deep["num_packets"], deep["num_crowded"]) == (72, 128, 8)
    assert (shallow["num_analytic"], shallow["num_packets"], shallow["num_crowded"]) == (8, 32, 0)
    found = deep["summary"]
    assert found["correlation_gamma_gap"] > 0.85 and found["correlation_gap_change"] > 0.85
    assert abs(found["correlation_gamma_gap_spread"]) < 0.3, "gamma orders nothing among the others"
    assert found["ratio_blur1_horizontal"] > 2.5 and shallow["summary"]["ratio_blur1_horizontal"] > 1.85
    assert min(found["correlation_theory_phases_gap"], found["correlation_theory_phases_gap_spread"]) > 0.95
    assert found["mean_gap_flat_envelope"] < 1.1 * found["mean_gamma"]
    assert found["correlation_turned_gap_half"] > 0.95
    for record in (shallow, deep):
        kept = np.array(record["is_analytic"])
        of_max, centre, mean = (
            np.array(record[f"change_{name}"])[:, :, kept].mean(axis=2) for name in ("max", "blur1", "blur3")
        )
        assert (mean < of_max).all() and (mean < centre).all(), "mixpool's pooling changes least"
        shifts, stride = record["params"]["shifts"], record["params"]["stride"]
        assert (centre[:2, shifts.index(stride)] > of_max[:2, shifts.index(stride)]).all(), "at a whole stride"
        assert record["summary"]["largest_share_of_bound"] < 1
        assert min(gap for gap, shown in zip(record["gap"], kept, strict=True) if shown) > 0.4
