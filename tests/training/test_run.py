"""How a run is put together: model, teacher, conversion, learning rate; and what is said before the first step."""

from __future__ import annotations

import pytest
import torch
from training_runs import CPU, options, parse

from mixpool.training import checks
from mixpool.training.run import experiment_name, learning_rate, set_up

pytestmark = pytest.mark.usefixtures("tiny_models")


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
        (
            {"model_kwargs": ("converted=false",), "convert_images": 30, "convert": ("rest=blurpool",)},
            "expected 30 training",
        ),
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
    ],
)
def test_what_is_found_out_before_the_first_step(photos, tmp_path, settings, message):
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        set_up(options(photos, tmp_path, **settings), CPU, 0, 1)
    assert message in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_dataset_that_cannot_be_reached(photos, tmp_path, monkeypatch):
    def unreachable(*args, **options):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr("timm.data.create_dataset", unreachable)
    with pytest.raises(ValueError, match="cannot open hfds/nothing .ConnectionError: no route to host"):
        set_up(options(photos, tmp_path, dataset="hfds/nothing", data_dir="nowhere"), CPU, 0, 1)


def test_a_dataset_may_be_downloaded_where_it_is_asked_for(photos, tmp_path, monkeypatch):
    asked = []

    def create(*args, download, **options):
        asked.append(download)
        raise RuntimeError("no network here")

    monkeypatch.setattr("timm.data.create_dataset", create)
    for wanted in (False, True):
        with pytest.raises(ValueError, match="no network here"):
            set_up(options(photos, tmp_path, dataset="torch/cifar10", dataset_download=wanted), CPU, 0, 1)
    assert asked == [False, True]


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


def test_gray_images(photos, tmp_path):
    run = set_up(options(photos, tmp_path, in_chans=1), CPU, 0, 1)
    images, labels = next(iter(run.train_loader))
    assert images.shape == (8, 1, 32, 32) and run.model(images).shape == (8, 4)
