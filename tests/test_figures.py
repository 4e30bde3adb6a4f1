"""How figures are saved, and how they are laid out in inches."""

from __future__ import annotations

import pytest
from PIL import Image

from mixpool.figures import blank_figure, image_axes, inch_axes, plain_axes, save_figure


def test_the_suffix_is_the_format(tmp_path):
    figure = blank_figure(4, 2)
    with Image.open(save_figure(figure, tmp_path / "small.png", dpi=50)) as picture:
        assert (picture.format, picture.size) == ("PNG", (200, 100))
    assert save_figure(figure, tmp_path / "bare").name == "bare.png"
    assert save_figure(figure, tmp_path / "v.svg").read_text().startswith("<?xml")
    with pytest.raises(ValueError, match=r"named \*\.png, \*\.pdf or \*\.svg"):
        save_figure(figure, tmp_path / "x.xyz")


def test_axes_are_placed_in_inches():
    figure = blank_figure(10, 5)
    assert inch_axes(figure, 1, 0.5, 4, 2).get_position().bounds == pytest.approx((0.1, 0.1, 0.4, 0.4))
    assert image_axes(figure, 5, 1, 2).get_position().bounds == pytest.approx((0.5, 0.2, 0.2, 0.4))


def test_a_plain_panel_has_no_frame_above_and_to_the_right():
    axes = inch_axes(blank_figure(3, 3), 1, 1, 1, 1)
    plain_axes(axes)
    assert {side for side, spine in axes.spines.items() if spine.get_visible()} == {"left", "bottom"}
