"""The synthetic pictures: always the same, covered everywhere, with the statistics of photographs."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from mixpool.selection import pictures as module
from mixpool.selection.pictures import PHOTOGRAPHS, ImageModel, dead_leaves

PLAIN = dataclasses.replace(
    PHOTOGRAPHS, shading=0.0, texture=0.0, contrast_spread=0.0, color_tail=0.0, sharpest=0.0, softest=0.0, contrast=1.0
)

# Some red pixels of dead_leaves(2, 48): what everything fitted to the pictures rests on.
PROBE = torch.tensor(
    [
        [[-0.16, -0.7112, -1.2862], [-1.0713, -1.308, -0.6028], [-0.8232, -0.7674, -1.0525], [0.509, 0.3324, -1.4089]],
        [[1.1461, 0.7941, 0.8105], [1.1026, 0.9064, 0.7585], [0.8488, 0.969, 0.7697], [0.9432, 0.976, 1.1808]],
    ]
)


def test_the_same_pictures_everywhere():
    """Not bit by bit, since FFTs differ in rounding from machine to machine."""
    pictures = dead_leaves(2, 48)
    assert pictures.shape == (2, 3, 48, 48) and pictures.dtype == torch.float32
    assert torch.equal(pictures, dead_leaves(2, 48))
    assert not torch.allclose(pictures, dead_leaves(2, 48, seed=1), atol=0.1)
    probe = pictures[:, :, 5::13, 7::17][:, 0]
    torch.testing.assert_close(probe, PROBE, atol=1e-3, rtol=0)


def test_torch_and_numpy_generators_are_left_alone():
    import numpy as np

    torch.manual_seed(3)
    np.random.seed(3)
    expected = torch.rand(1), np.random.rand()
    torch.manual_seed(3)
    np.random.seed(3)
    dead_leaves(1, 16)
    assert (torch.rand(1), np.random.rand()) == expected


def test_plain_leaves_are_flat_and_cover_everything():
    """Without blur, texture and shading a picture holds as many colours as leaves are seen, and sharp edges."""
    (picture,) = dead_leaves(1, 128, model=PLAIN)
    picture = (picture * 1e4).round()
    colors = torch.unique(picture.flatten(1), dim=1).shape[1]
    assert 20 < colors < 1000
    same_as_right = (picture[:, :, 1:] == picture[:, :, :-1]).all(dim=0).double().mean()
    assert 0.7 < same_as_right < 0.99
    # All leaves but exp(-LAYERS) of the area: the leaf that is shown where there is none is seen hardly anywhere.
    _, counts = torch.unique(picture.flatten(1), dim=1, return_counts=True)
    assert counts.max() < 0.5 * picture[0].numel()


@pytest.mark.parametrize("shape", ["discs", "rectangles"])
def test_leaves_have_their_size(shape: str):
    """One radius: the chance that pixels d apart show one leaf follows from the shape's overlap with itself."""
    radius = 12.0
    model = dataclasses.replace(
        PLAIN,
        smallest=radius,
        largest=radius + 0.01,
        rectangles=float(shape == "rectangles"),
        elongation=0.0,
        upright=1.0,
    )
    pictures = (dead_leaves(24, 160, model=model) * 1e4).round()
    distance = 10
    measured = (pictures[..., distance:] == pictures[..., :-distance]).all(dim=1).double().mean().item()
    if shape == "discs":
        half = distance / (2 * radius)
        overlap = (2 * math.acos(half) - 2 * half * math.sqrt(1 - half**2)) / math.pi
    else:
        overlap = 1 - distance / (radius * math.sqrt(math.pi))
    # The leaf on top of either pixel is on top of both if it covers both: overlap / (2 - overlap).
    assert measured == pytest.approx(overlap / (2 - overlap), abs=0.03)


def test_the_statistics_of_normalised_photographs():
    pictures = dead_leaves(16, 192)
    assert pictures.mean().abs() < 0.3
    assert 0.5 < pictures.std() < 2
    red, _, blue = pictures.transpose(0, 1).flatten(1)
    assert 0.6 < torch.corrcoef(torch.stack([red, blue]))[0, 1] < 0.95
    # Scale invariance: the amplitude spectrum of photographs falls about as 1 / frequency.
    gray = pictures.mean(dim=1) * torch.hann_window(192)[:, None] * torch.hann_window(192)
    power = torch.fft.fft2(gray).abs().square().mean(dim=0)[0, 1:]
    frequency = torch.arange(1, 192)
    low, high = power[3:6].mean(), power[24:48].mean()
    slope = math.log(low / high) / math.log(frequency[24:48].double().mean() / frequency[3:6].double().mean())
    assert 1.2 < slope < 3.2
    # Heavy tails: differences of neighbours have far more than a Gaussian's kurtosis of 3.
    step = (pictures[..., 1:] - pictures[..., :-1]).flatten()
    assert (step**4).mean() / (step**2).mean() ** 2 > 8


def test_softer_and_stronger():
    sharp, soft = (
        dead_leaves(2, 64, model=dataclasses.replace(PHOTOGRAPHS, sharpest=s, softest=s)).diff(dim=3).std()
        for s in (0.1, 2.0)
    )
    assert soft < 0.7 * sharp
    once, twice = (
        dead_leaves(2, 64, model=dataclasses.replace(PHOTOGRAPHS, contrast=contrast, brightness=0.0))
        for contrast in (1.0, 2.0)
    )
    torch.testing.assert_close(twice, 2 * once)


def test_brightness_is_spread_evenly():
    model = dataclasses.replace(PHOTOGRAPHS, contrast=1e-9, brightness=1.5)
    means = dead_leaves(5, 32, model=model).mean(dim=(1, 2, 3)).sort().values
    torch.testing.assert_close(means, torch.tensor([-1.2, -0.6, 0.0, 0.6, 1.2]))


def test_every_number_of_the_model_changes_the_pictures():
    before = dead_leaves(2, 64)
    for field in dataclasses.fields(ImageModel):
        changed = dataclasses.replace(PHOTOGRAPHS, **{field.name: getattr(PHOTOGRAPHS, field.name) * 0.7 + 0.05})
        assert not torch.equal(before, dead_leaves(2, 64, model=changed)), field.name


@pytest.mark.parametrize("arguments", [(0, 64), (1, 0), (-1, 8)])
def test_errors(arguments: tuple[int, int]):
    with pytest.raises(ValueError, match="expected at least one image"):
        dead_leaves(*arguments)


def test_small_and_odd_sizes():
    assert dead_leaves(1, 1).shape == (1, 3, 1, 1)
    assert torch.isfinite(dead_leaves(1, 33)).all()
    assert module.BORDER > 0
