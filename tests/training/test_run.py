"""How a run is put together: model, teacher, conversion, learning rate; and what is said before the first step."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from filelock import FileLock
from PIL import Image
from timm.data import IterableImageDataset
from training_runs import CLASSES, arguments

import mixpool
from mixpool.conversion.stock import converted_stems
from mixpool.training import checks, splits
from mixpool.training import run as run_module
from mixpool.training.configuration import parse
from mixpool.training.model import build_model, prepare, stock_teacher
from mixpool.training.run import experiment_name, learning_rate, set_up
from mixpool.training.train import _is_better, train

CPU = torch.device("cpu")
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
pytestmark = pytest.mark.usefixtures("tiny_models")


def options(photos, tmp_path, **settings):
    return parse(arguments(photos, tmp_path, **settings))


@pytest.fixture
def stock_file(tmp_path, tiny_models):
    """Weights of the stock network."""
    path = tmp_path / "stock.pth"
    torch.save(timm.create_model("tiny_stem", converted=False).state_dict(), path)
    return path


def test_the_teacher_is_the_stock_network_that_the_model_started_from(photos, tmp_path, stock_file):
    common = {"initial_checkpoint": stock_file, "model_kwargs": ("converted=false",), "convert": ("select=all",)}
    run = set_up(options(photos, tmp_path, distill="stock", **common), CPU, 0, 1)
    stock = timm.create_model("tiny_stem", converted=False, checkpoint_path=str(stock_file)).eval()
    teacher, x = run.task.teacher.model, torch.rand(2, 3, 32, 32)
    assert converted_stems(run.model) and not converted_stems(teacher)
    assert torch.equal(teacher(x), stock(x)) and not torch.equal(run.model.eval()(x), stock(x))
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_distillation_without_labels_follows_the_teacher(photos, tmp_path, stock_file):
    """The loss is then the divergence from the teacher: it falls, and a model that is its teacher starts at none."""
    common = {"initial_checkpoint": stock_file, "distill": "stock", "task_loss_weight": 0.0, "no_aug": True}
    common |= {"model_kwargs": ("converted=false",)}
    record = train(options(photos, tmp_path, epochs=12, convert=("select=all",), **common))
    losses = [row["train_loss"] for row in record["history"]]
    assert 0 < losses[-1] < losses[0] / 2
    common |= {"experiment": "stock", "epochs": 1}
    assert train(options(photos, tmp_path, **common))["history"][0]["train_loss"] == pytest.approx(0, abs=1e-6)


@pytest.fixture
def published(tmp_path):
    """The file of a stock ResNet-18 for 4 classes."""
    path = tmp_path / "published.pth"
    torch.save(timm.create_model("resnet18", num_classes=4).state_dict(), path)
    return path


def test_a_file_of_published_weights_brings_its_classifier(photos, tmp_path, published):
    common = {"model": "mixpool_resnet18", "pretrained_path": published, "img_size": 32}
    common |= {"model_kwargs": ("select=all",)}
    model = set_up(options(photos, tmp_path, num_classes=4, **common), CPU, 0, 1).model
    file = torch.load(published, weights_only=True)
    assert torch.equal(model.fc.weight, file["fc.weight"]) and torch.equal(model.conv1.bn.weight, file["bn1.weight"])
    model = build_model(options(photos, tmp_path, num_classes=7, **common))
    assert model.fc.weight.shape == (7, 512) and torch.equal(model.layer1[0].bn1.bias, file["layer1.0.bn1.bias"])
    with pytest.raises(ValueError, match="a teacher of 4 classes, which cannot teach 7"):
        stock_teacher(model, options(photos, tmp_path, num_classes=7, distill="stock", **common))
    with pytest.raises(ValueError, match="leave out aa_layer, bn_eps"):
        asked = common | {"model_kwargs": ("aa_layer=blur",), "bn_eps": 0.1, "distill": "stock", "num_classes": 4}
        stock_teacher(model, options(photos, tmp_path, **asked))
    torch.save({"nothing": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="found none of its classifier .fc."):
        build_model(options(photos, tmp_path, **common | {"pretrained_path": tmp_path / "other.pth"}))


def test_a_stock_model_can_be_converted_with_training_images(photos, tmp_path, capsys):
    common = {"model_kwargs": ("converted=false",), "convert": ("select=all", "blur=1"), "convert_images": 20}
    run = set_up(options(photos, tmp_path, **common), CPU, 0, 1)
    (stem,) = converted_stems(run.model).values()
    assert stem.num_modulus == 8 and stem.blur == 1 and bool((stem.calibration[:, 0] != 1).any())
    assert "8 of 8" in run.facts[0]


@pytest.mark.parametrize("slowdown, is_told", [(20.0, True), (0.5, False)])
def test_a_cpu_without_half_precision_is_told(photos, tmp_path, monkeypatch, slowdown, is_told):
    asked = []
    monkeypatch.setattr(checks, "half_precision_slowdown", lambda dtype: asked.append(dtype) or slowdown)
    facts = set_up(options(photos, tmp_path, amp=True, amp_dtype="bfloat16"), CPU, 0, 1).facts
    assert asked == [torch.bfloat16]
    message = "warning: this CPU computes bfloat16 20 times as slowly as float32; --no-amp would be faster"
    assert (message in facts) == is_told and any("as slowly" in fact for fact in facts) == is_told
    set_up(options(photos, tmp_path, amp=False), CPU, 0, 1)
    assert len(asked) == 1, "measured where it is asked for"


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"model": "resnet9000"}, "neither timm nor torchvision has a model named 'resnet9000'"),
        ({"data_dir": "nowhere"}, "but nowhere does not exist"),
        ({"val_split": "test"}, "expected a folder 'test'"),
        ({"num_classes": 7}, "4 classes and the model 7 outputs: set num_classes: 4"),
        ({"batch_size": 25}, "expected at least 25 training images for one step of 1 x 25, found 24"),
        ({"distill": "stock"}, "expected trained weights for `distill: stock`"),
        ({"convert": ("select=all",)}, "is a converted model already"),
        ({"model_kwargs": ("converted=false",), "convert": ("colour=red",)}, "`convert` takes the arguments"),
        ({"model_kwargs": ("converted=false",), "convert_images": 30, "convert": ("blur=3",)}, "expected 30 training"),
        ({"device_modules": "no_such_module"}, "cannot import 'no_such_module'"),
        ({"opt": "newton"}, "cannot build the optimizer 'newton'"),
        ({"sched": "sudden"}, "invalid choice: 'sudden'"),
        ({"mixup": 0.2, "batch_size": 7}, "expected an even batch_size"),
        ({"grad_checkpointing": True}, "cannot recompute its activations"),
        ({"initial_checkpoint": "nowhere.pth"}, "cannot build 'tiny_stem'"),
        ({"device_modules": "tiny_models", "aa": "nonsense"}, "cannot build the transform"),
        ({"mean": (0.5, 0.5)}, "expected 1 or 3 values of mean, got 2"),
        ({"torchcompile": "nonsense"}, "expected torchcompile to be one of"),
        ({"in_chans": 4}, "expected a model of gray or colour images (1 or 3 channels), got one of 4"),
        ({"val_split": "train"}, "are the same images"),
        ({"dataset": "hfds/nothing", "data_dir": "nowhere"}, "hfds/nothing"),
    ],
)
def test_what_is_found_out_before_the_first_step(photos, tmp_path, settings, message):
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        set_up(options(photos, tmp_path, **settings), CPU, 0, 1)
    assert message in str(caught.value)
    assert not (tmp_path / "run").exists()


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


def test_ties_between_batch_norms_need_a_gpu():
    with pytest.raises(ValueError, match="leave out sync_bn"):
        prepare(torch.nn.BatchNorm2d(3), parse(["--sync-bn"]), CPU, distributed=True)


def test_other_folders_in_both_splits_are_an_error(photos, tmp_path):
    shutil.copytree(photos, tmp_path / "data")
    shutil.rmtree(tmp_path / "data/validation" / CLASSES[1])
    with pytest.raises(ValueError, match="in one of them only: dog"):
        set_up(options(tmp_path / "data", tmp_path), CPU, 0, 1)


def test_a_model_of_torchvision(photos, tmp_path):
    path = tmp_path / "squeezenet.pth"
    torch.save(torchvision.models.squeezenet1_1(num_classes=4).state_dict(), path)
    common = {"model": "torchvision/squeezenet1_1", "num_classes": 4, "initial_checkpoint": path, "img_size": 32}
    run = set_up(options(photos, tmp_path, convert=("select=all",), **common), CPU, 0, 1)
    assert isinstance(run.model, torchvision.models.SqueezeNet) and "64 of 64" in run.facts[0]
    with pytest.raises(ValueError, match="torchvision, which does not take drop"):
        set_up(options(photos, tmp_path, drop=0.1, **common), CPU, 0, 1)


def test_the_learning_rate_follows_the_images_per_update():
    def rate(*text: str, world_size: int = 1) -> float:
        return learning_rate(parse(text), world_size)

    assert rate("--lr", "0.3", "--batch-size", "1") == 0.3
    assert rate("--batch-size", "128", "--grad-accum-steps", "2", world_size=4) == pytest.approx(0.1 * 4)
    assert rate("--batch-size", "1024", "--opt", "adamw") == pytest.approx(0.1 * 2)
    assert rate("--batch-size", "1024", "--lr-base-scale", "sqrt") == pytest.approx(0.1 * 2)


def test_the_folder_of_a_command_is_always_the_same(tmp_path):
    config = tmp_path / "some_config.yaml"
    config.write_text("model: resnet18\n")
    assert experiment_name(parse(["-c", str(config)])) == "some_config"
    assert experiment_name(parse(["-c", str(config), "--experiment", "mine"])) == "mine"
    assert experiment_name(parse(["--model", "torchvision/resnet18"])) == "torchvision_resnet18"


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


def test_a_finished_run_says_so_and_trains_no_more(photos, tmp_path, capsys):
    first = train(options(photos, tmp_path))
    capsys.readouterr()
    again = train(options(photos, tmp_path))
    assert again == first and "images/s" not in capsys.readouterr().out


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


def test_gray_images(photos, tmp_path):
    run = set_up(options(photos, tmp_path, in_chans=1), CPU, 0, 1)
    images, labels = next(iter(run.train_loader))
    assert images.shape == (8, 1, 32, 32) and run.model(images).shape == (8, 4)


def test_images_that_the_class_map_would_lose_are_an_error(photos, tmp_path):
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES[:3]))
    asked = {"class_map": tmp_path / "classes.txt", "num_classes": 3}
    with pytest.raises(ValueError, match=r"6 image\(s\) of the split 'train'.*'ship' is not in the class map"):
        set_up(options(photos, tmp_path, **asked), CPU, 0, 1)
    assert set_up(options(photos, tmp_path, on_error="skip", **asked), CPU, 0, 1).dataset["num_train"] == 18


def test_a_loss_that_is_not_finite_stops_the_run(photos, tmp_path):
    train(options(photos, tmp_path, stop_after=1))
    state = torch.load(tmp_path / "run" / "last.pth.tar", weights_only=True)
    state["state_dict"]["head.weight"][0, 0] = torch.nan
    torch.save(state, tmp_path / "poisoned.pth.tar")
    with pytest.raises(ValueError, match="the loss is not finite in epoch 1"):
        train(options(photos, tmp_path, resume=tmp_path / "poisoned.pth.tar", experiment="poisoned"))
    assert not (tmp_path / "poisoned" / "last.pth.tar").exists()


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


@pytest.mark.parametrize("metric, best", [("top1", None), ("top1", 50.0), ("loss", None), ("loss", 1.0)])
def test_nothing_that_is_not_finite_is_the_best(metric, best):
    assert not _is_better(math.nan, best, metric) and not _is_better(math.inf, best, metric)
    assert _is_better(60.0, best, metric) == (metric == "top1" or best is None)


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


@pytest.mark.parametrize("device", ["gpu", "mps", pytest.param("cuda", marks=needs_no_gpu)])
def test_a_device_that_is_not_there(photos, tmp_path, device):
    with pytest.raises(ValueError, match=f"cannot use the device '{device}'"):
        train(options(photos, tmp_path, device=device))


def test_a_dry_run_writes_nothing(photos, tmp_path, capsys):
    assert train(options(photos, tmp_path, dry_run=True)) == {}
    assert list(tmp_path.iterdir()) == [] and "it would train 3 epochs" in capsys.readouterr().out


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
