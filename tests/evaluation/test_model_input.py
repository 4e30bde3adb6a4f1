"""What input a model wants: by timm's configuration, by its training, and by nothing."""

from __future__ import annotations

import pytest
import timm
import torch

from mixpool.evaluation.model_input import ModelInput, find_model_input


def test_the_model_says_what_it_wants():
    model = timm.create_model("resnet18.a1_in1k")
    wanted = find_model_input(model)
    config = timm.data.resolve_model_data_config(model)
    assert (wanted.size, wanted.crop_ratio, wanted.interpolation) == (224, config["crop_pct"], config["interpolation"])
    assert find_model_input(torch.nn.Identity()) == ModelInput()
    model.pretrained_cfg["input_size"] = (1, 28, 28)
    with pytest.raises(ValueError, match="square RGB images, got one of 1 x 28 x 28"):
        find_model_input(model)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"crop_ratio": 87.5}, "expected a crop ratio above 0 and up to 2, got 87.5"),
        ({"crop_ratio": 0.0}, "expected a crop ratio above 0 and up to 2, got 0.0"),
        ({"size": 0}, "at least 1 pixel, got a size of 0"),
        ({"mean": (0.5,)}, "three means"),
        ({"std": (1.0, 0.0, 1.0)}, "positive stds"),
    ],
)
def test_a_wrong_input(settings, message):
    with pytest.raises(ValueError, match=message) as error:
        ModelInput(**settings)
    assert "ModelInput(" not in str(error.value)


def test_a_run_says_how_its_images_were():
    model = timm.create_model("resnet18.a1_in1k")
    run = {"img_size": 32, "mean": [0.1, 0.2, 0.3], "std": [0.4], "crop_pct": 1.0, "interpolation": "bilinear"}
    expected = ModelInput(32, 1.0, "bilinear", mean=(0.1, 0.2, 0.3), std=(0.4,) * 3)
    assert find_model_input(model, run) == find_model_input(torch.nn.Identity(), run) == expected
    # What a run leaves open is the model's, and for one without a configuration timm's, as in the training.
    unset = {"img_size": None, "input_size": [3, 48, 48], "mean": None, "std": None, "crop_pct": None}
    config = timm.data.resolve_data_config(unset, model=model)
    assert find_model_input(model, unset).crop_ratio == config["crop_pct"] == 0.95
    assert find_model_input(model, {**unset, "interpolation": ""}).size == 48
    assert find_model_input(torch.nn.Identity(), unset).interpolation == "bicubic"
    with pytest.raises(ValueError, match="do not fit together"):
        find_model_input(model, {"mean": [0.1, 0.2]})
    with pytest.raises(ValueError, match="square RGB images"):
        find_model_input(model, {"input_size": [1, 32, 32]})


def test_the_size_of_timms_tables():
    model = timm.create_model("resnet34.a1_in1k")
    own, tables = find_model_input(model), find_model_input(model, use_test_size=True)
    assert (own.size, own.crop_ratio) == (224, 0.95) and (tables.size, tables.crop_ratio) == (288, 1.0)
