"""The model at work: as it was afterwards, in half precision, and outputs that cannot be used."""

from __future__ import annotations

import math

import pytest
import torch
from known_classifiers import MeanColor, Parity, line, noise, run, small_model
from torch import nn

from mixpool.evaluation.dataset import Images
from mixpool.evaluation.protocols import ModelInput


def test_modes_and_weights_stay():
    model = small_model().train()
    model.layer2.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    run(model, noise(3), "accuracy", model_input=ModelInput(size=64), channels_last=True)
    assert [module.training for module in model.modules()] == modes and False in modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert next(model.parameters()).is_contiguous() and torch.is_grad_enabled()
    model(torch.rand(2, 3, 64, 64)).sum().backward()


def test_modes_stay_when_something_fails():
    model = small_model().train()
    with pytest.raises(ValueError, match="label 7"):
        run(model, [(line(1, 64), 7)], "accuracy", model_input=ModelInput(size=64))
    assert model.training and torch.is_grad_enabled()


def test_a_compiled_model():
    result = run(torch.compile(MeanColor(), backend="eager"), noise(2), "circular")
    assert result.summary() == {"circular_consistency": 100}


def test_half_precision():
    model = small_model().eval()
    full = run(model, noise(2), "kl", model_input=ModelInput(size=64))
    amp = run(model, noise(2), "kl", model_input=ModelInput(size=64), amp=torch.bfloat16)
    assert amp.settings["amp"] == "bfloat16" and not torch.equal(full.values["kl"], amp.values["kl"])
    half = run(model.bfloat16(), noise(2), "kl", model_input=ModelInput(size=64))
    assert half.values["kl"].isfinite().all()


def test_models_that_are_no_classifiers():
    with pytest.raises(ValueError, match=r"whose output is \(N, classes\), got \(1, 3, 32, 32\)"):
        run(nn.Identity(), noise(1), "flips")
    with pytest.raises(ValueError, match="does not run on images"):
        run(nn.Conv2d(4, 1, 1), noise(1), "flips")


class Fragile(Parity):
    """Not finite for a picture that is all black."""

    def forward(self, x):
        return super().forward(x) / (x.amax(dim=(1, 2, 3), keepdim=True)[:, :, 0, 0] > 0)


def test_outputs_that_are_not_finite():
    images = [(line(20, 40), 0), (line(None, 40), 0), (line(21, 40), 1)]
    with pytest.raises(ValueError, match="cannot use image 1 of the dataset: the model's output is not finite"):
        run(Fragile(), images, "flips")
    for batch_size in (1, 3):
        result = run(Fragile(), images, "accuracy", "flips", on_error="skip", batch_size=batch_size)
        assert result.indices.tolist() == [0, 2] and result.failed == (("image 1", "the model's output is not finite"),)
        assert [len(values) for values in result.values.values()] == [2, 2] == [len(result.checksums)] * 2
        assert result.summary()["top1"] == 100
    with pytest.raises(ValueError, match="no image of the dataset can be used; image 1: the model's output"):
        run(Fragile(), Images(images, limit=1), "flips", on_error="skip")


def test_what_one_protocol_cannot_use_counts_for_none():
    images = noise(3, 40) + [(line(0, 40), 0)]  # black but for its first column, which the crops leave
    result = run(Fragile(), images, "accuracy", "flips", on_error="skip")
    assert result.indices.tolist() == [0, 1, 2]
    assert {name: len(values) for name, values in result.values.items()} == {
        "top1": 3,
        "flip_probability": 3,
    }


def test_classes_may_be_excluded():
    class Masked(MeanColor):
        def forward(self, x):
            return super().forward(x) + torch.tensor([0, -math.inf, 0])

    images = [(image, 0) for image, _ in noise(3)]
    result = run(Masked(), images, "accuracy", "kl", "flips")
    assert result.num_images == 3 and result.values["kl"].isfinite().all() and result.values["kl"].max() > 0

    class AllMasked(Masked):
        def forward(self, x):
            return super().forward(x) - math.inf

    with pytest.raises(ValueError, match="not finite"):
        run(AllMasked(), images, "flips")


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "mps"])
def test_devices_that_are_not_there(device):
    model = small_model().train()
    with pytest.raises(ValueError, match=f"cannot use the device '{device}'"):
        run(model, noise(1), "flips", device=device, model_input=ModelInput(size=64))
    assert model.training
