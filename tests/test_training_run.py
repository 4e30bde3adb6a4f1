"""How a run is put together: model, teacher, conversion, learning rate; and what is said before the first step."""

from __future__ import annotations

import pytest
import timm
import torch
import torchvision
from training_runs import CLASSES, arguments

import mixpool
from mixpool.checkpoint import converted_stems
from mixpool.train import train
from mixpool.training.configuration import parse
from mixpool.training.model import build_model, stock_teacher
from mixpool.training.run import experiment_name, learning_rate, set_up

CPU = torch.device("cpu")
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


def test_a_stock_model_can_be_converted_with_training_images(photos, tmp_path, capsys):
    common = {"model_kwargs": ("converted=false",), "convert": ("select=all", "blur=1"), "convert_images": 20}
    run = set_up(options(photos, tmp_path, **common), CPU, 0, 1)
    (stem,) = converted_stems(run.model).values()
    assert stem.num_modulus == 8 and stem.blur == 1 and bool((stem.calibration[:, 0] != 1).any())
    assert "8 of 8" in run.facts[0]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"model": "resnet9000"}, "neither timm nor torchvision has a model named 'resnet9000'"),
        ({"data_dir": "nowhere"}, "data_dir nowhere does not exist"),
        ({"val_split": "test"}, "cannot open the split 'test'"),
        ({"num_classes": 7}, "4 classes and the model 7 outputs: set num_classes: 4"),
        ({"batch_size": 25}, "expected at least 25 training images for one step of 1 x 25, found 24"),
        ({"distill": "stock"}, "expected trained weights for `distill: stock`"),
        ({"convert": ("select=all",)}, "is a converted model already"),
        ({"model_kwargs": ("converted=false",), "convert": ("colour=red",)}, "`convert` takes the arguments"),
        ({"model_kwargs": ("converted=false",), "convert_images": 30, "convert": ("blur=3",)}, "expected 30 training"),
        ({"device_modules": "no_such_module"}, "cannot import 'no_such_module'"),
        ({"opt": "newton"}, "cannot build the optimizer 'newton'"),
        ({"sched": "sudden"}, "cannot build the schedule 'sudden'"),
        ({"mixup": 0.2, "batch_size": 7}, "expected an even batch_size"),
        ({"grad_checkpointing": True}, "cannot recompute its activations"),
        ({"initial_checkpoint": "nowhere.pth"}, "cannot build 'tiny_stem'"),
        ({"dataset": "hfds/nothing", "data_dir": "nowhere"}, "hfds/nothing"),
    ],
)
def test_what_is_found_out_before_the_first_step(photos, tmp_path, settings, message):
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        set_up(options(photos, tmp_path, **settings), CPU, 0, 1)
    assert message in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_other_folders_in_both_splits_are_an_error(photos, tmp_path):
    import shutil

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
    with pytest.raises(ValueError, match="other options .lr 0.05 -> 0.1.*--restart"):
        train(options(photos, tmp_path, lr=0.1))
    train(options(photos, tmp_path, stop_after=1, workers=1, log_interval=7))  # these do not matter
    record = train(options(photos, tmp_path, lr=0.1, restart=True))
    assert len(record["history"]) == 3 and record["history"][0]["lr"] == pytest.approx(0.1)
    with pytest.raises(FileNotFoundError, match="nowhere.pth.tar does not exist"):
        train(options(photos, tmp_path, resume="nowhere.pth.tar"))


def test_a_finished_run_says_so_and_trains_no_more(photos, tmp_path, capsys):
    first = train(options(photos, tmp_path))
    capsys.readouterr()
    again = train(options(photos, tmp_path))
    assert again["final"] == first["final"] and "images/s" not in capsys.readouterr().out


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(photos, tmp_path):
    train(options(photos, tmp_path, stop_after=1))
    before = (tmp_path / "run" / "last.pth.tar").read_bytes()
    state = torch.load(tmp_path / "run" / "last.pth.tar", weights_only=True)
    state["state_dict"]["head.weight"][0, 0] = torch.nan
    torch.save(state, tmp_path / "poisoned.pth.tar")
    with pytest.raises(ValueError, match="the loss is not finite in epoch 1"):
        train(options(photos, tmp_path, resume=tmp_path / "poisoned.pth.tar"))
    assert (tmp_path / "run" / "last.pth.tar").read_bytes() == before


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
