"""`mixpool train` as its users run it: one process and several, killed and continued, with everything switched on."""

from __future__ import annotations

import csv
import json
import math
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
from timm.data import ImageDataset, create_transform
from training_runs import TESTS, arguments, options, start

from mixpool.training.train import _is_better, train

pytestmark = pytest.mark.usefixtures("tiny_models")
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def run(photos: Path, output: Path, **settings) -> dict:
    return train(options(photos, output, **settings))


def weights(output: Path, name: str = "last.pth.tar", entry: str = "state_dict") -> dict[str, torch.Tensor]:
    return torch.load(output / "run" / name, weights_only=True)[entry]


def assert_equal(first: dict, second: dict, tolerance: float = 0.0) -> None:
    assert first.keys() == second.keys() and first
    for key, value in first.items():
        assert (second[key].double() - value.double()).abs().max() <= tolerance, key


EVERYTHING = {
    "model": "tiny_norm",
    "model_ema": True,
    "model_ema_decay": 0.9,
    "mixup": 0.5,
    "cutmix": 0.5,
    "reprob": 0.5,
    "drop": 0.3,
    "sched_on_updates": True,
    "amp": True,
    "amp_dtype": "bfloat16",
    "clip_grad": 1.0,
    "grad_accum_steps": 2,
    "batch_size": 4,
    "channels_last": True,
    "recovery_interval": 1,
}


def test_a_run_learns_and_writes_what_it_says(photos, tmp_path, capsys):
    record = run(photos, tmp_path, epochs=8, color_jitter=0, smoothing=0)
    folder = tmp_path / "run"
    assert sorted(path.name for path in folder.iterdir()) == [
        ".lock",
        "curves.png",
        "last.pth.tar",
        "model_best.pth.tar",
        "record.jsonl",
        "summary.csv",
    ]
    rows = list(csv.DictReader((folder / "summary.csv").open()))
    assert [int(row["epoch"]) for row in rows] == list(range(8))
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])
    assert record["best"]["value"] == max(float(row["val_top1"]) for row in rows) > 25
    assert json.loads((folder / "record.jsonl").read_text())["final"] == record["final"]
    text = capsys.readouterr().out
    assert "stem conv: 4 of 8 channels pool by a modulus" in text and "24 training and 9 validation images" in text


def test_the_best_checkpoint_gives_the_recorded_accuracy(photos, tmp_path):
    record = run(photos, tmp_path, epochs=4)
    model = timm.create_model("tiny_stem", checkpoint_path=str(tmp_path / "run" / "model_best.pth.tar")).eval()

    dataset = ImageDataset(
        str(photos / "validation"),
        transform=create_transform((3, 32, 32), mean=(0.5,) * 3, std=(0.25,) * 3, crop_pct=1.0),
    )
    with torch.no_grad():
        right = [model(image[None]).argmax().item() == label for image, label in dataset]
    assert 100 * sum(right) / len(right) == pytest.approx(record["best"]["value"])


@pytest.mark.parametrize("settings", [{}, EVERYTHING], ids=["plain", "everything on"])
def test_a_run_that_was_stopped_ends_at_the_same_weights(photos, tmp_path, settings):
    run(photos, tmp_path / "whole", **settings)
    for _ in range(3):
        run(photos, tmp_path / "cut", **settings, stop_after=1)
    assert_equal(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    if settings:
        assert_equal(
            weights(tmp_path / "whole", entry="state_dict_ema"), weights(tmp_path / "cut", entry="state_dict_ema")
        )


@pytest.mark.slow
def test_a_run_killed_at_any_moment_ends_at_the_same_weights(photos, tmp_path):
    """`kill -9` after three random times, from the first line of the command to the last epoch."""
    settings = EVERYTHING | {"epochs": 12, "workers": 1, "val_interval": 5}
    start(photos, tmp_path / "warm-up", epochs=1).finish()  # the server that forks imports torch at the first call
    started = time.perf_counter()
    start(photos, tmp_path / "whole", **settings).finish()
    duration = time.perf_counter() - started
    has_checkpoint = []
    for _ in range(3):
        running = start(photos, tmp_path / "cut", **settings)
        time.sleep(random.uniform(0.2, 0.6) * duration)
        running.kill()
        has_checkpoint.append((tmp_path / "cut" / "run" / "last.pth.tar").exists())
    text = start(photos, tmp_path / "cut", **settings).finish()
    assert any(has_checkpoint) and "continuing" in text
    assert_equal(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    assert (tmp_path / "whole/run/summary.csv").read_text() == (tmp_path / "cut/run/summary.csv").read_text()


@pytest.mark.slow
def test_two_processes_killed_within_an_epoch_end_at_the_same_weights(photos, tmp_path):
    """Also the running statistics, of which every process has its own until the end of an epoch, and the losses."""
    settings = {"model": "tiny_norm", "model_ema": True, "model_ema_decay": 0.9, "epochs": 8, "batch_size": 2}
    settings |= {"recovery_interval": 1, "val_interval": 4, "log_interval": 100, "processes": 2}
    start(photos, tmp_path / "whole", **settings).finish()
    running = start(photos, tmp_path / "cut", **settings)
    last = tmp_path / "cut/run/last.pth.tar"
    while not last.exists() and running.is_alive():
        time.sleep(0.01)
    time.sleep(random.uniform(0, 0.3))
    running.kill()
    text = start(photos, tmp_path / "cut", **settings).finish()
    assert "continuing" in text
    for entry in ("state_dict", "state_dict_ema"):
        assert_equal(weights(tmp_path / "whole", entry=entry), weights(tmp_path / "cut", entry=entry))
    assert (tmp_path / "whole/run/summary.csv").read_text() == (tmp_path / "cut/run/summary.csv").read_text()
    record = json.loads((tmp_path / "cut/run/record.jsonl").read_text())
    assert (record["num_train"], record["num_val"]) == (24, 9)


def by_torchrun(photos: Path, output: Path, **settings) -> None:
    """The run in two processes, as the documentation starts it."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "mixpool", "train"]
    environment = {**os.environ, "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, *arguments(photos, output, **settings)]
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=120)


@pytest.mark.parametrize("accumulated", [1, 2], ids=["", "accumulated"])
@pytest.mark.slow
def test_two_processes_equal_one_with_the_same_global_batch(photos, tmp_path, accumulated):
    """In float32 and without batch norm; the sums are taken in another order, hence 1e-6."""
    # 9 validation images one by one: the processes have different numbers of batches.
    common = {"grad_accum_steps": accumulated, "weight_decay": 1e-3, "validation_batch_size": 1}
    run(photos, tmp_path / "one", batch_size=8, **common)
    if accumulated == 1:
        by_torchrun(photos, tmp_path / "two", batch_size=4, **common)
        assert (tmp_path / "two/run/curves.png").stat().st_size > 5000
    else:
        start(photos, tmp_path / "two", processes=2, batch_size=4, **common).finish()
    assert_equal(weights(tmp_path / "one"), weights(tmp_path / "two"), tolerance=1e-6)
    rows = [list(csv.DictReader((tmp_path / name / "run" / "summary.csv").open())) for name in ("one", "two")]
    for one, two in zip(*rows, strict=True):
        for key in one:
            assert float(one[key]) == pytest.approx(float(two[key]), abs=1e-4), key


def test_a_finished_run_says_so_and_trains_no_more(photos, tmp_path, capsys):
    first = train(options(photos, tmp_path))
    capsys.readouterr()
    again = train(options(photos, tmp_path))
    assert again == first and "images/s" not in capsys.readouterr().out


@pytest.mark.parametrize("metric, best", [("top1", None), ("top1", 50.0), ("loss", None), ("loss", 1.0)])
def test_nothing_that_is_not_finite_is_the_best(metric, best):
    assert not _is_better(math.nan, best, metric) and not _is_better(math.inf, best, metric)
    assert _is_better(60.0, best, metric) == (metric == "top1" or best is None)


@pytest.mark.parametrize("device", ["gpu", "mps", pytest.param("cuda", marks=needs_no_gpu)])
def test_a_device_that_is_not_there(photos, tmp_path, device):
    with pytest.raises(ValueError, match=f"cannot use the device '{device}'"):
        train(options(photos, tmp_path, device=device))


def test_a_dry_run_writes_nothing(photos, tmp_path, capsys):
    assert train(options(photos, tmp_path, dry_run=True)) == {}
    assert list(tmp_path.iterdir()) == [] and "it would train 3 epochs" in capsys.readouterr().out
