"""Epochs of training: losses that fall, losses that are not finite, images that cannot be read, streams."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from timm.data import IterableImageDataset
from training_runs import options

from mixpool.training import splits
from mixpool.training.train import train

pytestmark = pytest.mark.usefixtures("tiny_models")


def test_distillation_without_labels_follows_the_teacher(photos, tmp_path, stock_file):
    """The loss is then the divergence from the teacher: it falls, and a model that is its teacher starts at none."""
    common = {"initial_checkpoint": stock_file, "distill": "stock", "task_loss_weight": 0.0, "no_aug": True}
    common |= {"model_kwargs": ("converted=false",)}
    record = train(options(photos, tmp_path, epochs=12, convert=("select=all",), **common))
    losses = [row["train_loss"] for row in record["history"]]
    assert 0 < losses[-1] < losses[0] / 2
    common |= {"experiment": "stock", "epochs": 1}
    assert train(options(photos, tmp_path, **common))["history"][0]["train_loss"] == pytest.approx(0, abs=1e-6)


class FakeStream(IterableImageDataset):
    """As timm's, but from memory."""

    def __init__(self, count):
        self.count, self.transform, self.epochs = count, None, []

    def __len__(self):
        return self.count

    def __iter__(self):
        for number in range(self.count):
            yield self.transform(Image.new("RGB", (40, 40), (60 * (number % 4), 0, 0))), number % 4

    def set_epoch(self, epoch):
        self.epochs.append(epoch)

    def set_loader_cfg(self, num_workers=None):
        pass


def test_a_stream(photos, tmp_path, monkeypatch):
    streams = {True: FakeStream(21), False: FakeStream(10)}
    monkeypatch.setattr(splits, "_stream", lambda options, split, is_training: streams[is_training])
    asked = {"dataset": "wds/some", "batch_size": 5}
    train(options(photos, tmp_path, stop_after=2, **asked))
    record = train(options(photos, tmp_path, **asked))
    assert streams[True].epochs == [0, 1, 2] and len(record["history"]) == 3
    with pytest.raises(ValueError, match="leave out recovery_interval"):
        train(options(photos, tmp_path, recovery_interval=1, **asked))


@pytest.fixture
def damaged(photos, tmp_path):
    """The small data set, one training and one validation image of which cannot be read."""
    folder = tmp_path / "damaged"
    shutil.copytree(photos, folder)
    for split in ("train", "validation"):
        (folder / split / "cat" / "1.png").write_bytes(b"\x89PNG not")
    return folder


def test_images_that_cannot_be_read_are_named(damaged, tmp_path):
    with pytest.raises(ValueError, match=r"cannot read .*cat/1.png.*--on-error skip"):
        train(options(damaged, tmp_path))
    record = train(options(damaged, tmp_path, on_error="skip", workers=1))
    assert [[Path(name).name for name in names] for names in record["skipped_images"].values()] == [["1.png"]] * 2
    # Eight of nine validation images are left: any accuracy is a multiple of an eighth.
    assert record["final"]["val_top1"] * 8 / 100 == pytest.approx(round(record["final"]["val_top1"] * 8 / 100))


def test_a_loss_that_is_not_finite_stops_the_run(photos, tmp_path):
    train(options(photos, tmp_path, stop_after=1))
    state = torch.load(tmp_path / "run" / "last.pth.tar", weights_only=True)
    state["state_dict"]["head.weight"][0, 0] = torch.nan
    torch.save(state, tmp_path / "poisoned.pth.tar")
    with pytest.raises(ValueError, match="the loss is not finite in epoch 1"):
        train(options(photos, tmp_path, resume=tmp_path / "poisoned.pth.tar", experiment="poisoned"))
    assert not (tmp_path / "poisoned" / "last.pth.tar").exists()
