"""The network of a run: its weights, its conversion, its teacher."""

from __future__ import annotations

import pytest
import timm
import torch
import torchvision
from training_runs import CPU, options, parse

from mixpool.conversion.stock import converted_stems
from mixpool.stabilization.files import save_stabilized
from mixpool.stabilization.stabilize import stabilize
from mixpool.stabilization.treat import treated_layers
from mixpool.timm_models.loading import load_model
from mixpool.training.model import build_model, prepare, stock_teacher
from mixpool.training.run import set_up

pytestmark = pytest.mark.usefixtures("tiny_models")


def test_the_teacher_is_the_stock_network_that_the_model_started_from(photos, tmp_path, stock_file):
    common = {"initial_checkpoint": stock_file, "model_kwargs": ("converted=false",), "convert": ("select=all",)}
    run = set_up(options(photos, tmp_path, distill="stock", **common), CPU, 0, 1)
    stock = timm.create_model("tiny_stem", converted=False, checkpoint_path=str(stock_file)).eval()
    teacher, x = run.task.teacher.model, torch.rand(2, 3, 32, 32)
    assert converted_stems(run.model) and not converted_stems(teacher)
    assert torch.equal(teacher(x), stock(x)) and not torch.equal(run.model.eval()(x), stock(x))
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


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
    common = {"model_kwargs": ("converted=false",), "convert": ("select=all", "pooling=cmod"), "convert_images": 20}
    run = set_up(options(photos, tmp_path, **common), CPU, 0, 1)
    (stem,) = converted_stems(run.model).values()
    assert stem.poolings == ("cmod",) * 8 and bool((stem.calibration[:, 0] != 1).any())
    assert "8 of 8" in run.facts[0]


def test_ties_between_batch_norms_need_a_gpu():
    with pytest.raises(ValueError, match="leave out sync_bn"):
        prepare(torch.nn.BatchNorm2d(3), parse(["--sync-bn"]), CPU, distributed=True)


def test_a_model_of_torchvision(photos, tmp_path):
    path = tmp_path / "squeezenet.pth"
    torch.save(torchvision.models.squeezenet1_1(num_classes=4).state_dict(), path)
    common = {"model": "torchvision/squeezenet1_1", "num_classes": 4, "initial_checkpoint": path, "img_size": 32}
    run = set_up(options(photos, tmp_path, convert=("select=all",), **common), CPU, 0, 1)
    assert isinstance(run.model, torchvision.models.SqueezeNet) and "64 of 64" in run.facts[0]
    with pytest.raises(ValueError, match="torchvision, which does not take drop"):
        set_up(options(photos, tmp_path, drop=0.1, **common), CPU, 0, 1)


def test_a_stabilized_network_to_start_from(photos, tmp_path, steady_file):
    common = {"model": "tiny_stock", "initial_checkpoint": steady_file}
    run = set_up(options(photos, tmp_path, **common), CPU, 0, 1)
    x, steady = torch.rand(2, 3, 32, 32), load_model("tiny_stock", steady_file)
    assert torch.equal(run.model.eval()(x), steady(x))
    assert treated_layers(run.model) == {"pool": "maxima, then low-pass"}
    assert "stabilized: 1 layers with a low-pass" in run.facts[0]
    with pytest.raises(ValueError, match="stabilized network: leave out `convert`"):
        set_up(options(photos, tmp_path, convert=("select=all",), **common), CPU, 0, 1)
    with pytest.raises(ValueError, match="`distill: stock` needs the stock network"):
        set_up(options(photos, tmp_path, distill="stock", **common), CPU, 0, 1)
    with pytest.raises(ValueError, match="give it as initial_checkpoint, not as pretrained_path"):
        build_model(options(photos, tmp_path, model="tiny_stock", pretrained_path=steady_file))
    with pytest.raises(ValueError, match="steady.safetensors does not fit the TinyNet: .*head"):
        build_model(options(photos, tmp_path, num_classes=7, **common))


def test_a_stabilized_network_of_torchvision(photos, tmp_path):
    model = torchvision.models.squeezenet1_1(num_classes=4).eval()
    stabilize(model, torch.randn(8, 3, 40, 40), repair=None)
    save_stabilized(model, tmp_path / "steady.safetensors")
    common = {"model": "torchvision/squeezenet1_1", "num_classes": 4, "img_size": 32}
    built = build_model(options(photos, tmp_path, initial_checkpoint=tmp_path / "steady.safetensors", **common))
    assert treated_layers(built) == treated_layers(model) and built.training
