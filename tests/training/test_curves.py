"""The table and the picture that a run leaves."""

from __future__ import annotations

from PIL import Image

from mixpool.training.curves import draw_curves, write_summary

HISTORY = [
    {"epoch": 0, "lr": 0.1, "train_loss": 2.0},
    {"epoch": 1, "lr": 0.05, "train_loss": 1.5, "val_loss": 1.75, "val_top1": 40.0, "ema_loss": 1.8, "ema_top1": 38.0},
]


def test_what_was_not_measured_in_an_epoch_is_empty(tmp_path):
    write_summary(tmp_path, HISTORY)
    lines = (tmp_path / "summary.csv").read_text().splitlines()
    assert lines[0] == "epoch,lr,train_loss,val_loss,val_top1,ema_loss,ema_top1"
    assert lines[1:] == ["0,0.1,2.0,,,,", "1,0.05,1.5,1.75,40.0,1.8,38.0"]
    assert [path.name for path in tmp_path.iterdir()] == ["summary.csv"]


def test_the_curves_are_drawn(tmp_path):
    draw_curves(tmp_path, HISTORY, "a run")
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.size[0] > 1000 and len(picture.convert("RGB").getcolors(2**20)) > 10
