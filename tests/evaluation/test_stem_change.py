"""The change of the stem: that of `shifts.change_curve`, on stems found, missing, dead and not finite."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import timm
import torch
from known_classifiers import MeanColor, line, noise, run
from torch import nn

from mixpool.evaluation.protocols import ModelInput
from mixpool.evaluation.shifts import change_curve
from mixpool.evaluation.stem_change import find_stem_of


def test_the_stems_change_is_that_of_shifts():
    model = nn.Sequential(nn.Conv2d(3, 6, 5, 2, 2), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(3, 2, 1), *_head(6))
    for channel in (0, 1):
        model[1].bias.data[channel] = 2.0 * channel
    model.eval()
    images = noise(6, 72)
    wanted = ModelInput(size=64)
    result = run(model, images, "stem", model_input=wanted, batch_size=4)
    # The first frame is the corner: cut so that it is the centre of a crop with a margin of 8 on the other side alone.
    pixels = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image, _ in images]).float() / 255
    pixels = (pixels - torch.tensor(wanted.mean)[:, None, None]) / torch.tensor(wanted.std)[:, None, None]
    padded = torch.nn.functional.pad(pixels, (8, 0, 8, 0))
    for direction, curve in result.summary()["stem_change"].items():
        expected = change_curve(model[:4], padded, 64, range(1, 9), direction).nanmean(dim=1)
        assert list(curve.values()) == pytest.approx(expected.tolist(), rel=1e-4)
    low, high = result.as_record()["ci95"]["stem_change"]["horizontal"]["1"]
    assert low < result.summary()["stem_change"]["horizontal"]["1"] < high
    assert result.speed.num_frames == 0


def _head(channels):
    return nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 2)


def test_the_stem_function_is_the_models():
    model = timm.create_model("densenet121", num_classes=2).eval()  # its norm layer holds the activation
    x = torch.randn(1, 3, 64, 64)
    stem, note = find_stem_of(model)
    with torch.no_grad():
        torch.testing.assert_close(stem(x), model.features.pool0(model.features.norm0(model.features.conv0(x))))
    assert note == "stem: features.conv0 -> features.norm0 -> features.pool0"


def test_a_model_without_a_stem_is_told():
    result = run(MeanColor(), noise(2), "circular", "stem")
    assert "stem change not applicable" in result.notes[0] and "stem_change" not in result.summary()
    with pytest.raises(ValueError, match="nothing to measure: stem change not applicable"):
        run(MeanColor(), noise(2), "stem")


def test_a_stem_whose_maps_are_not_finite():
    model = nn.Sequential(nn.Conv2d(3, 6, 5, 2, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1), *_head(6)).eval()
    model[0].weight.data[0] = math.nan
    with pytest.raises(ValueError, match="image 0 of the dataset: the model's output is not finite"):
        run(model, noise(2, 72), "stem", model_input=ModelInput(size=64))


def test_a_stem_without_a_living_channel():
    model = nn.Sequential(nn.Conv2d(3, 6, 5, 2, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1), *_head(6)).eval()
    nn.init.zeros_(model[0].weight)
    result = run(model, noise(2, 72), "circular", "stem", model_input=ModelInput(size=64))
    assert list(result.summary()) == ["circular_consistency"]
    assert result.notes[-1] == "stem change not applicable: every channel of the stem is constant on these images"
    json.dumps(result.as_record(), allow_nan=False)
    with pytest.raises(ValueError, match="nothing to measure: stem change not applicable: every channel"):
        run(model, noise(2, 72), "stem", model_input=ModelInput(size=64))


def test_a_stem_that_lives_on_one_image_alone():
    model = nn.Sequential(nn.Conv2d(3, 6, 5, 2, 2, bias=False), nn.ReLU(), nn.MaxPool2d(3, 2, 1), *_head(6)).eval()
    images = [(line(None, 72), 0)] * 5 + noise(1, 72)
    wanted = ModelInput(size=64, mean=(0.0,) * 3, std=(1.0,) * 3)
    record = run(model, images, "stem", model_input=wanted).as_record()
    json.dumps(record, allow_nan=False)
    low, high = record["ci95"]["stem_change"]["horizontal"]["1"]
    assert 0 < low <= record["summary"]["stem_change"]["horizontal"]["1"] <= high
