"""The loader: the bytes of every view, in order, and places that say where an image stands."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from mixpool.evaluation.dataset import open_images
from mixpool.evaluation.loader import batches
from mixpool.evaluation.protocols import SquareView

VIEW = SquareView(16)


CLASSES = ("ant", "bee", "cat")


def picture(color):
    return Image.new("RGB", (20, 16), (color, 2 * color, 7))


@pytest.fixture
def folder(tmp_path):
    """data/val/CLASS/NUMBER.png, four pictures of each of three classes; the colour tells which one."""
    for label, name in enumerate(CLASSES):
        (tmp_path / "data/val" / name).mkdir(parents=True)
        for number in range(4):
            picture(10 * (4 * label + number)).save(tmp_path / "data/val" / name / f"{number}.png")
    return tmp_path / "data"


def read_all(images, workers=0, batch_size=5):
    """(first red byte, label) of each image in order, and the failures."""
    found, failed = [], []
    for batch in batches(images, [VIEW], batch_size, workers, pin_memory=False):
        found += zip(batch.views[VIEW][:, 0, 0, 0].tolist(), batch.labels.tolist()) if batch.places else []
        failed += batch.failed
    return found, failed


EXPECTED = [(10 * i, i // 4) for i in range(12)]


def test_a_limit_spreads_over_the_whole(folder):
    images = open_images(folder, limit=3)
    assert read_all(images)[0] == [EXPECTED[2], EXPECTED[6], EXPECTED[10]]
    assert images.num_found == 12
    places = [place for batch in batches(images, [VIEW], 2, 0, False) for place in batch.places]
    assert places == [(2, 0), (6, 1), (10, 2)]
    assert len(open_images(folder, limit=99)) == 12


def test_views_are_stored_channels_last(folder):
    (batch,) = batches(open_images(folder), [VIEW, SquareView(8)], 16, 0, False)
    assert [tuple(view.shape) for view in batch.views.values()] == [(12, 3, 16, 16), (12, 3, 8, 8)]
    assert all(view.is_contiguous(memory_format=torch.channels_last) for view in batch.views.values())
