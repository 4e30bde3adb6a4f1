"""Photos: those that come along, and a folder with everything that folders have."""

import socket

import numpy as np
import pytest
import torch
from PIL import Image

from mixpool.evaluation.photos import demo_photos, load_images, normalize


def save(path, size=(40, 30), mode="RGB", color=128):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path)
    return path


def test_demo_photos_need_no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("tried to open a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    names, images = demo_photos(48)
    assert len(names) == len(set(names)) == len(images) >= 10
    assert images.shape[1:] == (3, 48, 48) and images.dtype == torch.float32
    assert images.min() >= 0 and images.max() <= 1
    assert images.std(dim=(1, 2, 3)).min() > 0.02  # every one shows something
    gray = images[names.index("camera")]
    assert torch.equal(gray[0], gray[1]) and not torch.equal(*images[names.index("chelsea")][:2])


def test_folder_is_recursive_sorted_and_rgb(tmp_path):
    save(tmp_path / "b" / "2.png", color=(255, 0, 0))
    save(tmp_path / "a" / "1.JPG", mode="L", color=200)
    save(tmp_path / "c.png", mode="RGBA", color=(0, 255, 0, 255))
    save(tmp_path / ".hidden" / "x.png")
    (tmp_path / "notes.txt").write_text("no photo")
    photos = load_images(tmp_path, 16)
    assert photos.names == ("a/1.JPG", "b/2.png", "c.png") and photos.failed == () and photos.num_found == 3
    assert photos.images.shape == (3, 3, 16, 16)
    assert photos.images[1].mean(dim=(1, 2)).tolist() == [1, 0, 0]
    assert photos.images[0].std() < 0.01  # gray


def test_resize_and_center_crop(tmp_path):
    pixels = np.zeros((40, 80, 3), dtype=np.uint8)
    pixels[:, 20:60] = 255  # the centre square is white, what lies beside it black
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    assert load_images(tmp_path, 20).images.amin(dim=(0, 1, 2))[2:-2].min() == 1
    half = load_images(tmp_path, 20, crop_ratio=0.5).images
    assert half.shape[-1] == 20 and half.min() == 1


def test_limit_is_spread_evenly(tmp_path):
    for i in range(10):
        save(tmp_path / f"{i}.png")
    assert load_images(tmp_path, 8, limit=2).names == ("2.png", "7.png")
    assert load_images(tmp_path, 8, limit=99).num_found == len(load_images(tmp_path, 8).names) == 10


def test_damaged_files_are_named_and_counted(tmp_path):
    whole = save(tmp_path / "good.jpg")
    (tmp_path / "cut.jpg").write_bytes(whole.read_bytes()[:300])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.jpeg").write_text("this is text")
    (tmp_path / "broken_link.png").symlink_to(tmp_path / "nowhere.png")
    save(tmp_path / "deep.png", mode="I;16", color=40000)
    photos = load_images(tmp_path, 8)
    assert photos.names == ("good.jpg",) and photos.num_found == 6
    assert [name for name, _ in photos.failed] == ["broken_link.png", "cut.jpg", "deep.png", "empty.png", "text.jpeg"]
    assert all(reason for _, reason in photos.failed)
    assert "8 bits" in dict(photos.failed)["deep.png"]


def test_clear_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_images(tmp_path / "nowhere", 8)
    with pytest.raises(FileNotFoundError, match="found no file named"):
        load_images(tmp_path, 8)
    (tmp_path / "bad.png").write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match="is a file"):
        load_images(tmp_path / "bad.png", 8)
    with pytest.raises(ValueError, match="none of the 1 files"):
        load_images(tmp_path, 8)
    with pytest.raises(ValueError, match="limit=0"):
        load_images(tmp_path, 8, limit=0)


def test_normalize():
    images = torch.tensor([0.485, 0.456, 0.406])[None, :, None, None].expand(2, 3, 4, 4)
    assert normalize(images).abs().max() == 0
    torch.testing.assert_close(normalize(images[0] + 0.225)[2], torch.ones(4, 4))
    with pytest.raises(ValueError, match=r"\(2, 1, 4, 4\)"):
        normalize(images[:, :1])


def test_enlarged_photos_are_named(tmp_path):
    """Their fine detail is the interpolation's."""
    save(tmp_path / "a.png", size=(64, 64))
    save(tmp_path / "b.png", size=(40, 12))
    assert load_images(tmp_path, 16).enlarged == ("b.png",)
    assert load_images(tmp_path, 12).enlarged == ()
    assert load_images(tmp_path, 12, crop_ratio=0.5).enlarged == ("b.png",)
