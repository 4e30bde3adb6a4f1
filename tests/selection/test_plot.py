"""The figure of a filter bank: what it shows can be read off its artists."""

import math

import pytest
import torch
from matplotlib.patches import Ellipse, Rectangle
from PIL import Image

from mixpool.figures import MODULUS_COLOR, save_figure
from mixpool.filters.gabor import gabor_bank
from mixpool.selection.plot import filter_tiles, plot_filter_bank
from mixpool.selection.rules import choose
from mixpool.stem.module import MixPoolStem


def bank_and_plan(channels=20, in_channels=3, select="auto"):
    """(weight, plan) of a stem of Gabor filters."""
    conv = torch.nn.Conv2d(in_channels, channels, 7, 2, 3)
    conv.weight.data.copy_(gabor_bank(channels, in_channels))
    plan, _ = choose(MixPoolStem(conv), select)
    return conv.weight, plan


def png_size(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        return image.size


def frames(axes):
    """(is blue, column, row) of the tiles' frames."""
    blue = tuple(int(MODULUS_COLOR[i : i + 2], 16) / 255 for i in (1, 3, 5))
    tiles = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    return [patch.get_edgecolor()[:3] == pytest.approx(blue) for patch in tiles]


def test_the_modulus_channels_are_framed():
    weight, plan = bank_and_plan()
    bank, _ = plot_filter_bank(weight, plan).axes
    assert frames(bank) == list(plan.is_complex) and any(frames(bank)) and not all(frames(bank))
    assert len(bank.images) == 20


def test_the_plane_holds_every_filter_at_its_frequency():
    weight, plan = bank_and_plan()
    plane = plot_filter_bank(weight, plan).axes[1]
    points = {collection.get_label(): collection.get_offsets() for collection in plane.collections}
    expected = plan.stats.center_frequency[torch.tensor(plan.is_complex)].flip(1)  # (fx, fy)
    got = torch.tensor(points[f"modulus: {plan.num_complex} channels"].data)
    torch.testing.assert_close(got, expected)
    (circle,) = [patch for patch in plane.patches if isinstance(patch, Ellipse)]
    assert circle.width == circle.height == math.pi / 2  # twice a quarter wave, pi / 2, per step of 2 pixels


@pytest.mark.parametrize("options", [{"select": "all"}, {"select": "none"}, {"channels": 3, "in_channels": 1}])
def test_extreme_plans_draw(options, tmp_path):
    path = save_figure(plot_filter_bank(*bank_and_plan(**options)), tmp_path / "bank.png", dpi=60)
    assert png_size(path) == (600, 300)


def test_a_weight_of_another_plan_is_an_error():
    with pytest.raises(ValueError, match="20 filters"):
        plot_filter_bank(gabor_bank(21), bank_and_plan()[1])


def test_filter_tiles_put_zero_at_mid_gray():
    tiles = filter_tiles(torch.stack([torch.zeros(3, 3, 3), torch.eye(3).expand(3, 3, 3)]))
    assert (tiles[0] == 0.5).all() and tiles[1].max() == 1 and tiles[1].min() == 0.5
