"""Figures: files come out in the format asked for, axes lie where they were placed."""

import pytest
import torch
from PIL import Image

from mixpool.figures import MAX_COLOR, MODULUS_COLOR, OTHER_COLORS, blank_figure, image_axes, inch_axes, save_figure


def png_size(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        return image.size


def figure():
    figure = blank_figure(10.0, 4.8)
    inch_axes(figure, 1.0, 0.5, 2.0, 3.0).plot([0, 1])
    return figure


def test_formats(tmp_path):
    assert png_size(save_figure(figure(), tmp_path / "small.png", dpi=80)) == (800, 384)
    assert save_figure(figure(), tmp_path / "bare").name == "bare.png"
    assert (save_figure(figure(), tmp_path / "v.svg")).read_text().startswith("<?xml")
    with pytest.raises(ValueError, match=r"\*\.png"):
        save_figure(figure(), tmp_path / "x.xyz")


def test_axes_are_placed_in_inches():
    blank = figure()
    assert blank.get_facecolor() == (1, 1, 1, 1)
    plot, image = *blank.axes, image_axes(blank, 4.0, 1.0, 2.5)
    for axes, inches in ((plot, (1.0, 0.5, 2.0, 3.0)), (image, (4.0, 1.0, 2.5, 2.5))):
        left, bottom, width, height = axes.get_position().bounds
        assert (10 * left, 4.8 * bottom, 10 * width, 4.8 * height) == pytest.approx(inches)
    assert len(image.get_xticks()) == len(image.get_yticks()) == 0


def test_colours_are_apart():
    colors = [MODULUS_COLOR, MAX_COLOR, *OTHER_COLORS]
    rgb = torch.tensor([[int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)] for color in colors])
    distance = torch.cdist(rgb, rgb) + torch.eye(len(colors))
    assert distance.min() > 0.25
