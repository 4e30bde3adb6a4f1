"""Squares, crops and splits by hand; what a user is told about images that nobody normalised."""

from __future__ import annotations

import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn

from mixpool.evaluation.photos import IMAGENET_MEAN, IMAGENET_STD
from mixpool.stabilization import pictures
from mixpool.stabilization.pictures import MARGIN, Squares, crop, crops, split, squares_for


def net(channels: int = 3) -> nn.Module:
    """Its running statistics are those of white noise of variance 1."""
    conv, norm = nn.Conv2d(channels, 4, 3, 1, 0, bias=False), nn.BatchNorm2d(4)
    with torch.no_grad():
        norm.running_var.copy_(conv.weight.square().sum(dim=(1, 2, 3)))
    return nn.Sequential(conv, norm, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).eval()


# --- squares ----------------------------------------------------------------------------------------------------------


def test_larger_tensors_are_cut_in_the_middle():
    images = torch.randn(20, 3, 50, 61)
    found = squares_for(net(), images, size=32)
    assert found.size == 32 and found.notes == ()
    assert torch.equal(found.images, images[..., 5 : 5 + 40, 10 : 10 + 40])


def test_tensors_of_the_own_size_are_continued_by_reflection():
    images = torch.randn(20, 3, 24, 24)
    found = squares_for(net(), images)
    assert found.size == 24 and found.images.shape == (20, 3, 32, 32)
    half = MARGIN // 2
    assert torch.equal(found.images[..., half:-half, half:-half], images)
    assert torch.equal(found.images[..., half - 1, half:-half], images[..., 1, :])
    assert len(found.notes) == 1 and "reflection" in found.notes[0]


@pytest.mark.parametrize("spare", range(MARGIN + 1))
def test_there_is_always_a_margin_for_the_crops(spare):
    """Whatever the tensors' size, every crop that is asked for has the size of the input."""
    images = torch.randn(16, 3, 24 + spare, 30)  # 2 too few
    found = squares_for(net(), images, size=24)
    assert found.images.shape == (16, 3, 24 + MARGIN, 24 + MARGIN)
    assert {crop(found.images, y, y, 24).shape for y in range(MARGIN + 1)} == {(16, 3, 24, 24)}
    assert any("reflection" in note for note in found.notes)


def test_tiny_images_have_no_reflection():
    found = squares_for(net(), torch.randn(16, 3, 4, 4))
    assert torch.equal(found.images[..., :, 0], found.images[..., :, MARGIN // 2])


def test_iterables_and_loaders_give_what_tensors_give():
    images = torch.randn(18, 3, 40, 40)
    expected = squares_for(net(), images, size=32).images
    labels = torch.arange(18)
    dataset = torch.utils.data.TensorDataset(images, labels)
    for other in (list(images), images.split(7), torch.utils.data.DataLoader(dataset, batch_size=5), iter(images)):
        assert torch.equal(squares_for(net(), other, size=32).images, expected)


def test_no_more_images_are_taken_than_needed(monkeypatch):
    monkeypatch.setattr(pictures, "MOST", 20)
    taken = []

    def endless():
        while True:
            taken.append(torch.randn(8, 3, 16, 16))
            yield taken[-1]

    found = squares_for(net(), endless())
    assert len(taken) == 3 and len(found.images) == 20


def test_a_folder_of_photos(tmp_path):
    for i in range(3):
        Image.new("RGB", (60, 50), (40 * i, 100, 200)).save(tmp_path / f"{i}.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    found = squares_for(net(), tmp_path, size=32)
    assert found.images.shape == (3, 3, 40, 40) and squares_for(net(), str(tmp_path), size=32).size == 32
    values = torch.tensor([80, 100, 200]) / 255
    expected = (values - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
    assert torch.allclose(found.images[2], expected[:, None, None].expand(3, 40, 40), atol=1e-5)
    assert any("left out broken.png" in note for note in found.notes)
    assert any("only 3 image(s)" in note for note in found.notes)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        squares_for(net(), tmp_path / "nowhere")


def test_the_size_that_a_model_says():
    model = timm.create_model("resnet18", num_classes=2).eval()
    assert squares_for(model, torch.randn(16, 3, 232, 232)).size == 224
    assert squares_for(model, torch.randn(16, 3, 60, 60)).size == 60, "smaller images are the user's own choice"


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(0, 3, 32, 32), "at least one image"),
        ([], "at least one image"),
        ([torch.zeros(3, 32, 32), torch.zeros(3, 32, 33)], "images of one size"),
        (torch.full((2, 3, 32, 32), float("nan")), "finite images"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), "normalised images as float tensors"),
        (torch.zeros(32, 32), "normalised images as float tensors"),
        (torch.zeros(2, 3, 20, 40), "at least 32 pixels"),
        (3, "an iterable of such"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_images(images, message):
    with pytest.raises(ValueError, match=message):
        squares_for(net(), images, size=32)


# --- normalised or not ------------------------------------------------------------------------------------------------


def notes_on(images: Tensor, model: nn.Module | None = None) -> str:
    return " ".join(squares_for(net() if model is None else model, images, size=24).notes)


def test_images_as_the_model_wants_them_give_no_note():
    assert notes_on(torch.randn(16, 3, 32, 32)) == ""


def test_images_that_nobody_normalised_are_named():
    assert "look like bytes" in notes_on(torch.rand(16, 3, 32, 32) * 255)
    assert "lie in 0 to 1" in notes_on(torch.rand(16, 3, 32, 32))
    assert "as much as those of the training" in notes_on(torch.randn(16, 3, 32, 32) * 3)
    assert "as much as those of the training" in notes_on(torch.randn(16, 3, 32, 32) / 3)
    assert "only 15 image(s)" in notes_on(torch.randn(15, 3, 32, 32))


def test_a_network_without_statistics_says_nothing_of_the_strength():
    assert notes_on(torch.randn(16, 3, 32, 32) * 3, nn.Conv2d(3, 2, 3)) == ""


def test_images_that_do_not_fit_the_model_are_not_judged():
    """`stabilize` says what is wrong."""
    assert notes_on(torch.randn(16, 1, 32, 32)) == ""


def test_looking_leaves_the_model_alone():
    model = net().train()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    notes_on(torch.randn(16, 3, 32, 32), model)
    assert all(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


# --- synthetic pictures -----------------------------------------------------------------------------------------------


def test_synthetic_pictures_are_as_strong_as_the_statistics_say(monkeypatch):
    monkeypatch.setattr(pictures, "NUM_SYNTHETIC", 12)
    model = net()
    for factor in (1.0, 49.0):
        with torch.no_grad():
            model[1].running_var.mul_(factor)
        found = squares_for(model, None, size=32, seed=3)
        assert found.images.shape == (12, 3, 40, 40) and "no images given" in found.notes[0]
        reached = model[0](crop(found.images, 0, 0, 32)).var(dim=(0, 2, 3))
        assert 0.98 < (reached / model[1].running_var).median() < 1.02
    assert torch.equal(found.images, squares_for(model, None, size=32, seed=3).images)
    assert not torch.equal(found.images, squares_for(model, None, size=32, seed=4).images)


def test_synthetic_pictures_without_statistics_stay(monkeypatch):
    monkeypatch.setattr(pictures, "NUM_SYNTHETIC", 4)
    found = squares_for(nn.Conv2d(3, 2, 3), None, size=32).images
    assert torch.equal(found, pictures.dead_leaves(4, 40, 0))


# --- splits and crops -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "held"), [(8, 2), (16, 2), (20, 3), (100, 15), (250, 38), (1000, 128)])
def test_no_image_is_in_two_parts(count, held):
    parts = split(Squares(torch.arange(count), 32, ("a note",)), seed=1)
    assert [len(part.images) for part in parts] == [count - 2 * held, held, held]
    assert sorted(torch.cat([part.images for part in parts]).tolist()) == list(range(count))
    assert all(part.size == 32 and part.notes == ("a note",) for part in parts)
    again = split(Squares(torch.arange(count), 32), seed=1)
    other = split(Squares(torch.arange(count), 32), seed=2)
    assert torch.equal(again.fit.images, parts.fit.images) and not torch.equal(other.fit.images, parts.fit.images)


def test_fewer_than_eight_serve_for_all():
    parts = split(Squares(torch.arange(7), 32))
    assert all(torch.equal(part.images, torch.arange(7)) for part in parts)


def test_crops_are_places_of_the_images():
    y, x = torch.meshgrid(torch.arange(20.0), torch.arange(20.0), indexing="ij")
    images = torch.stack([y, x, y * 0])[None].repeat(10, 1, 1, 1)
    images[:, 2] = torch.arange(10.0)[:, None, None]
    found = list(crops(Squares(images, 12), rounds=3, seed=5, batch=4))
    assert [len(batch) for batch in found] == 3 * [4, 4, 2]
    assert torch.equal(torch.cat(found)[:, 2, 0, 0], torch.arange(10.0).repeat(3))
    places = set()
    for batch in found:
        top, left = int(batch[0, 0, 0, 0]), int(batch[0, 1, 0, 0])
        assert 0 <= top <= 8 and 0 <= left <= 8
        assert torch.equal(batch[:, :2], images[: len(batch), :2, top : top + 12, left : left + 12])
        places.add((top, left))
    assert len(places) > 4
    again = crops(Squares(images, 12), rounds=3, seed=5, batch=4)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    assert not torch.equal(next(crops(Squares(images, 12), 1, seed=6)), found[0])


def test_crops_without_spare_are_the_images():
    images = torch.randn(3, 3, 12, 12)
    assert torch.equal(next(crops(Squares(images, 12), 1, seed=0)), images)
