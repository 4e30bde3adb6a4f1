"""How a run is saved and continued, and what it refuses to continue."""

from __future__ import annotations

import shutil

import pytest
import timm
import torch
from filelock import FileLock
from safetensors.torch import save_file
from training_runs import options

import mixpool
from mixpool.stabilization.treat import treated_layers
from mixpool.timm_models.loading import load_model
from mixpool.training import run as run_module
from mixpool.training.train import train

pytestmark = pytest.mark.usefixtures("tiny_models")


def test_a_run_goes_on_only_as_the_same_run(photos, tmp_path):
    train(options(photos, tmp_path, stop_after=1))
    with pytest.raises(ValueError, match="other options or data .lr 0.05 -> 0.1.*--restart"):
        train(options(photos, tmp_path, lr=0.1))
    train(options(photos, tmp_path, stop_after=1, workers=1, log_interval=7))  # these do not matter
    other = tmp_path / "other"
    shutil.copytree(photos, other)
    next((other / "train").rglob("*.png")).unlink()
    with pytest.raises(ValueError, match="num_train 24 -> 23"):
        train(options(other, tmp_path))


def test_a_restart_forgets_the_earlier_run(photos, tmp_path):
    train(options(photos, tmp_path))
    record = train(options(photos, tmp_path, lr=0.1, restart=True, stop_after=1))
    assert record == {}
    found = {path.name for path in (tmp_path / "run").iterdir()} - {".lock"}
    assert found == {"last.pth.tar", "model_best.pth.tar", "summary.csv", "curves.png"}, "the record was of the other"
    record = train(options(photos, tmp_path, lr=0.1))
    assert len(record["history"]) == 3 and record["history"][0]["lr"] == pytest.approx(0.1)


def test_a_file_to_resume_from_only_starts_an_empty_folder(photos, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.pth.tar does not exist"):
        train(options(photos, tmp_path, resume="nowhere.pth.tar"))
    train(options(photos, tmp_path, stop_after=1))
    shutil.copy(tmp_path / "run/last.pth.tar", tmp_path / "seed.pth.tar")
    asked = {"experiment": "second", "resume": tmp_path / "seed.pth.tar", "stop_after": 1}
    for epochs in (2, 3):
        train(options(photos, tmp_path, **asked))
        state = torch.load(tmp_path / "second/last.pth.tar", weights_only=True)
        assert state["run"]["position"]["epoch"] == epochs
    with pytest.raises(ValueError, match="restart, which forgets, or resume"):
        options(photos, tmp_path, restart=True, resume="x")


def test_two_runs_do_not_share_a_folder(photos, tmp_path):
    (tmp_path / "run").mkdir()
    with FileLock(tmp_path / "run/.lock"), pytest.raises(ValueError, match="another run is writing"):
        train(options(photos, tmp_path))
    train(options(photos, tmp_path, stop_after=1))


def test_weights_that_are_not_finite_are_not_saved(photos, tmp_path, monkeypatch):
    """The last gradient of an epoch is bad: the loss of that epoch was fine, and so are those in the log."""
    train(options(photos, tmp_path, stop_after=1))
    before = (tmp_path / "run" / "last.pth.tar").read_bytes()
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self: self.param_groups[0]["params"][0].data.fill_(torch.inf))
    with pytest.raises(ValueError, match="not finite"):
        train(options(photos, tmp_path, batch_size=24, experiment="one update per epoch"))
    assert not (tmp_path / "one update per epoch" / "last.pth.tar").exists()
    with pytest.raises(ValueError, match="not finite"):
        train(options(photos, tmp_path))
    assert (tmp_path / "run" / "last.pth.tar").read_bytes() == before


def test_infinities_of_a_mask_are_no_divergence(photos, tmp_path, monkeypatch):
    build = run_module.build_model

    def with_a_mask(asked):
        model = build(asked)
        model.register_buffer("mask", torch.full((2, 2), -torch.inf))
        return model

    monkeypatch.setattr(run_module, "build_model", with_a_mask)
    assert train(options(photos, tmp_path))["history"]


def test_checkpoints_of_another_version_are_refused(photos, tmp_path):
    train(options(photos, tmp_path, stop_after=1))
    path = tmp_path / "run" / "last.pth.tar"
    state = torch.load(path, weights_only=True)
    del state["run"]["format"]
    torch.save(state, path)
    with pytest.raises(ValueError, match="another version of mixpool"):
        train(options(photos, tmp_path))


def test_timm_reads_the_checkpoints(photos, tmp_path):
    train(options(photos, tmp_path, model_ema=True, model_ema_decay=0.5))
    path = str(tmp_path / "run" / "last.pth.tar")
    model = timm.create_model("tiny_stem")
    timm.models.load_checkpoint(model, path, use_ema=False)
    state = torch.load(path, weights_only=True)
    assert all(map(torch.equal, model.state_dict().values(), state["state_dict"].values()))
    timm.models.load_checkpoint(model, path, use_ema=True)
    assert all(map(torch.equal, model.state_dict().values(), state["state_dict_ema"].values()))
    assert mixpool.stock_state_dict(model).keys() == timm.create_model("tiny_stem", converted=False).state_dict().keys()


def same(first, second):
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        return torch.equal(first.eval()(x), second.eval()(x))


def test_a_stabilized_network_is_trained_cut_continued_and_built_again(photos, tmp_path, steady_file):
    common = {"model": "tiny_stock", "initial_checkpoint": steady_file, "model_ema": True, "model_ema_decay": 0.5}
    train(options(photos, tmp_path, stop_after=1, **common))
    path = tmp_path / "run/last.pth.tar"
    plan = {"pool": "maxima, then low-pass"}
    assert torch.load(path, weights_only=True)["mixpool"] == {"version": mixpool.__version__, "plan": plan}
    train(options(photos, tmp_path, **common))
    assert len(train(options(photos, tmp_path, experiment="uncut", **common))["history"]) == 3
    cut, uncut = (torch.load(tmp_path / name / "last.pth.tar", weights_only=True) for name in ("run", "uncut"))
    for entry in ("state_dict", "state_dict_ema"):
        assert all(map(torch.equal, cut[entry].values(), uncut[entry].values()))

    for name in ("last.pth.tar", "model_best.pth.tar"):
        file = tmp_path / "run" / name
        state = torch.load(file, weights_only=True)
        loaded = load_model("tiny_stock", file)
        assert treated_layers(loaded) == plan
        assert all(map(torch.equal, loaded.state_dict().values(), state["state_dict_ema"].values()))
        assert same(mixpool.load_stabilized(timm.create_model("tiny_stock"), file), loaded)
        weights_alone = timm.create_model("tiny_stock", checkpoint_path=file)
        assert not same(weights_alone, loaded) and same(mixpool.load_stabilized(weights_alone, file), loaded)

    again = {"model": "tiny_stock", "initial_checkpoint": path, "epochs": 1, "experiment": "again"}
    train(options(photos, tmp_path, **again))
    assert torch.load(tmp_path / "again/last.pth.tar", weights_only=True)["mixpool"]["plan"] == plan


def test_a_run_goes_on_only_with_its_low_passes(photos, tmp_path, steady_file):
    common = {"model": "tiny_stock", "initial_checkpoint": steady_file}
    train(options(photos, tmp_path, stop_after=1, **common))
    steady_file.unlink()
    save_file(timm.create_model("tiny_stock").state_dict(), steady_file)
    before = (tmp_path / "run/last.pth.tar").read_bytes()
    with pytest.raises(ValueError, match="low-passes in other layers than the initial checkpoint has now"):
        train(options(photos, tmp_path, **common))
    assert (tmp_path / "run/last.pth.tar").read_bytes() == before


def test_a_stock_run_says_nothing_of_low_passes(photos, tmp_path):
    train(options(photos, tmp_path, stop_after=1, model="tiny_stock"))
    assert "mixpool" not in torch.load(tmp_path / "run/last.pth.tar", weights_only=True)
