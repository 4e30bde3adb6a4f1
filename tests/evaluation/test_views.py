"""Views: the bytes of a photo are those of torchvision's and timm's own transforms."""

from __future__ import annotations

import pytest
import timm
import torch
from PIL import Image
from torchvision import transforms

from mixpool.evaluation.model_input import ModelInput
from mixpool.evaluation.protocols import (
    PROTOCOLS,
)
from mixpool.evaluation.views import OwnView, SquareView


def photo(width, height):
    return Image.fromarray(torch.randint(256, (height, width, 3), dtype=torch.uint8).numpy())


def as_batch(view, image):
    return torch.from_numpy(view(image).copy()).permute(2, 0, 1)[None]


@pytest.mark.parametrize(("width", "height"), [(60, 45), (45, 60), (50, 50), (20, 33)])
def test_the_square_view_is_torchvisions(width, height):
    image = photo(width, height)
    expected = transforms.Compose([transforms.Resize(40), transforms.CenterCrop(40), transforms.PILToTensor()])(image)
    assert torch.equal(as_batch(SquareView(40), image)[0], expected)


def test_the_own_view_is_timms():
    wanted = ModelInput(size=32, crop_ratio=0.8, interpolation="bicubic")
    image = photo(70, 50)
    transform = timm.data.create_transform(
        (3, 32, 32), interpolation="bicubic", crop_pct=0.8, mean=(0,) * 3, std=(1,) * 3
    )
    assert torch.equal(as_batch(OwnView(wanted), image)[0].float() / 255, transform(image))
    assert OwnView(wanted)(image).shape == (32, 32, 3)


def test_the_own_view_of_a_torchvision_model_is_256_224():
    image = photo(300, 280)
    expected = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224), transforms.PILToTensor()])(image)
    assert torch.equal(as_batch(PROTOCOLS["accuracy"](ModelInput()).view, image)[0], expected)


def test_a_crop_larger_than_the_picture_gets_a_border():
    wanted = ModelInput(size=32, crop_ratio=1.15, interpolation="bicubic")
    image = Image.new("RGB", (60, 60), "white")
    transform = timm.data.create_transform(
        (3, 32, 32), interpolation="bicubic", crop_pct=1.15, mean=(0,) * 3, std=(1,) * 3
    )
    found = as_batch(OwnView(wanted), image)[0].float() / 255
    assert torch.equal(found, transform(image)) and found.min() == 0 and found.max() == 1


@pytest.mark.parametrize("view", [SquareView(40), OwnView(ModelInput(size=32, crop_ratio=0.8))])
def test_pictures_that_would_fill_the_memory(view, monkeypatch):
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 40 * 40 * 30)
    assert view(photo(30, 1)).shape == (view(photo(40, 40))).shape
    with pytest.raises(ValueError, match=r"1 x 31 pixels: resized to a shorter side of 40 .*more than Pillow's limit"):
        view(photo(1, 31))
    with pytest.raises(ValueError, match="a picture of 0 x 5 pixels"):
        view(Image.new("RGB", (0, 5)))
