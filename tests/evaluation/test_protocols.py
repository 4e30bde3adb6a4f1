"""Protocols: which pixels a model sees, and what is made of its outputs."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from mixpool.evaluation.model_input import ModelInput
from mixpool.evaluation.protocols import (
    KL,
    PROTOCOLS,
    Accuracy,
    Circular,
    Consistency,
    Flips,
    Place,
    halved,
    halved_in_float,
    margin,
)
from mixpool.evaluation.views import SquareView

SIZE, LARGE = 32, 64


def numbered(side):
    """A picture whose red is the row and whose green is the column, (1, 3, side, side)."""
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return torch.stack([rows, columns, torch.zeros_like(rows)])[None].to(torch.uint8)


def corners(frames):
    """(row, column) of the first pixel of each frame of the first image of `numbered`."""
    return [(int(frame[0, 0, 0, 0]), int(frame[0, 1, 0, 0])) for frame in frames]


# --- geometry ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "side", "frames"),
    [
        ("accuracy-wcnn", 224, 1),
        ("consistency", 256, 2),
        ("consistency-shared", 256, 2),
        ("circular", 256, 2),
        ("flips", 232, 25),
        ("kl", 464, 49),
    ],
)
def test_the_papers_sizes(name, side, frames):
    protocol = PROTOCOLS[name](ModelInput())
    assert (protocol.view.side, protocol.num_frames) == (side, frames)
    images = torch.zeros(2, 3, side, side, dtype=torch.uint8)
    shapes = {frame.shape for frame in protocol.frames(images, [Place(0, 0), Place(1, 1)], 0)}
    assert shapes == {(2, 3, 224, 224)}
    assert len(list(protocol.frames(images[:1], [Place(0, 0)], 0))) == frames


def test_the_frames_of_the_flips():
    found = corners(Flips(SIZE).frames(numbered(SIZE + 8), [Place(0, 0)], 0))
    steps = range(1, 9)
    assert found == [(0, 0), *((0, k) for k in steps), *((k, 0) for k in steps), *((k, k) for k in steps)]


def test_the_frames_of_the_kl_are_halved_crops():
    image = numbered(2 * SIZE + 16)
    frames = list(KL(SIZE).frames(image, [Place(0, 0)], 0))
    # The 3rd crop to the side starts at column 3, the 16th along the diagonal at (16, 16).
    for number, (y, x) in {0: (0, 0), 3: (0, 3), 16 + 5: (5, 0), 48: (16, 16)}.items():
        crop = Image.fromarray(image[0, :, y : y + 64, x : x + 64].permute(1, 2, 0).numpy())
        expected = transforms.PILToTensor()(crop.resize((SIZE, SIZE), Image.Resampling.BILINEAR))
        assert torch.equal(frames[number][0], expected), (y, x)


@pytest.mark.parametrize("function", [halved, halved_in_float])
def test_halving_is_pils_to_the_bit(function):
    images = torch.randint(256, (4, 3, 62, 46), dtype=torch.uint8)
    images[1] = torch.randint(2, (3, 62, 46), dtype=torch.uint8) * 255
    expected = [Image.fromarray(i.permute(1, 2, 0).numpy()).resize((23, 31), Image.Resampling.BILINEAR) for i in images]
    assert torch.equal(function(images), torch.stack([transforms.PILToTensor()(image) for image in expected]))


# --- random shifts ----------------------------------------------------------------------------------------------------


def test_consistency_takes_the_crops_at_its_offsets():
    protocol = Consistency(LARGE)
    place = Place(index=5, rank=2)
    found = corners(protocol.frames(numbered(LARGE + 32), [place], seed=1))
    assert found == [tuple(offset) for offset in protocol.offsets(place, 1).tolist()] and len(set(found)) > 1


def test_offsets_are_uniform_from_0_to_31_and_each_images_own():
    protocol = Consistency(LARGE)
    offsets = np.stack([protocol.offsets(Place(i, i), 0) for i in range(2000)])
    assert offsets.min() == 0 and offsets.max() == 31
    counts = np.bincount(offsets.ravel(), minlength=32)
    assert np.abs(counts - 250).max() < 5 * np.sqrt(250)
    assert len(np.unique(offsets.reshape(2000, 4), axis=0)) > 1990
    correlations = np.corrcoef(offsets.reshape(2000, 4).T) - np.eye(4)
    assert np.abs(correlations).max() < 5 / np.sqrt(2000)


@pytest.mark.parametrize(
    ("size", "pixels"), [(224, 32), (227, 32), (64, 32), (63, 9), (32, 4), (28, 4), (8, 1), (5, 1)]
)
def test_the_margin_shrinks_for_small_inputs_alone(size, pixels):
    assert margin(size) == pixels
    for name in ("consistency", "circular"):
        assert PROTOCOLS[name](ModelInput(size=size)).view.side == size + pixels


def test_offsets_of_a_small_image():
    protocol = Consistency(SIZE)
    places = [Place(i, i) for i in range(300)]
    offsets = np.stack([protocol.offsets(place, 0) for place in places])
    assert sorted(set(offsets.ravel().tolist())) == [0, 1, 2, 3, 4]
    frames = list(protocol.frames(numbered(SIZE + 4).expand(300, -1, -1, -1), places, 0))
    assert all(frame.shape == (300, 3, SIZE, SIZE) for frame in frames)
    rolled = set()
    for frame in Circular(SIZE).frames(numbered(SIZE + 4).expand(300, -1, -1, -1), places, 0):
        rolled |= {(2 - int(y)) % SIZE for y in frame[:, 0, 0, 0]}
    assert {shift - SIZE * (shift > SIZE // 2) for shift in rolled} == set(range(-4, 4))


def test_offsets_depend_on_seed_and_image_alone():
    protocol = Consistency(LARGE)
    first = protocol.offsets(Place(7, 0), 3)
    assert (first == protocol.offsets(Place(7, 5), 3)).all()
    assert (first != protocol.offsets(Place(7, 0), 4)).any() and (first != protocol.offsets(Place(8, 0), 3)).any()


def test_shared_offsets_are_those_of_eight_successive_images():
    protocol = PROTOCOLS["consistency-shared"](ModelInput())
    offsets = [protocol.offsets(Place(100 + 3 * rank, rank), 0).tolist() for rank in range(24)]
    assert [offsets.count(own) for own in offsets] == [8] * 24
    assert offsets[:8] == [offsets[0]] * 8 and offsets[8] != offsets[0]


def test_circular_shifts_roll_the_centre_crop():
    protocol = Circular(LARGE)
    image = numbered(LARGE + 32)
    centre = image[0, :, 16 : 16 + LARGE, 16 : 16 + LARGE]
    places = [Place(i, i) for i in range(50)]
    frames = list(protocol.frames(image.expand(50, -1, -1, -1), places, 0))
    shifts = set()
    for frame in frames:
        for rolled in frame:
            y, x = (16 - int(rolled[0, 0, 0])) % LARGE, (16 - int(rolled[1, 0, 0])) % LARGE
            assert torch.equal(rolled, centre.roll((y, x), (1, 2)))
            shifts.add((y, x))
    assert len(shifts) > 80


# --- what is measured -------------------------------------------------------------------------------------------------


def logits_of(classes, num_classes=7):
    return torch.nn.functional.one_hot(torch.tensor(classes), num_classes).float()


def test_top_5_only_with_six_classes_or_more():
    labels = torch.tensor([0, 1])
    measured = Accuracy(SquareView(8), "_wcnn").measure(iter([logits_of([0, 2])]), labels)
    assert {name: values.tolist() for name, values in measured.items()} == {
        "top1_wcnn": [True, False],
        "top5_wcnn": [True, True],
    }
    assert list(Accuracy(SquareView(8)).measure(iter([logits_of([0, 2], 5)]), labels)) == ["top1"]


@pytest.mark.parametrize("group, name", [(1, "shift_consistency"), (8, "shift_consistency_shared")])
def test_consistency_is_of_both_crops(group, name):
    measured = Consistency(SIZE, group).measure(iter([logits_of([1, 1]), logits_of([1, 2])]), torch.zeros(2))
    assert {key: values.tolist() for key, values in measured.items()} == {name: [True, False]}


def test_flips_by_direction_and_distance():
    # To the side every step flips, down none does, along the diagonal the first alone.
    classes = [0, *([1, 0] * 4), *([0] * 8), *([2] * 8)]
    flips = Flips(SIZE).measure((logits_of([c]) for c in classes), torch.zeros(1))["flip_probability"][0]
    assert flips[0].tolist() == [1, 0] * 4
    assert flips[1].tolist() == [0] * 8
    assert flips[2].tolist() == pytest.approx([1 / (9 - k) for k in range(1, 9)])


def test_kl_is_taken_from_the_first_frame():
    outputs = [torch.tensor([[float(k), 0.0]], dtype=torch.float64) for k in range(49)]
    kl = KL(SIZE).measure(iter(outputs), torch.zeros(1))["kl"]
    assert kl.shape == (1, 3, 16)
    expected = [0.5 * (0.5 / (torch.tensor([k, 0.0]).double().softmax(0))).log().sum() for k in range(1, 49)]
    assert kl.flatten().tolist() == pytest.approx([float(value) for value in expected])
