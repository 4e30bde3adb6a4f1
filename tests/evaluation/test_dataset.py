"""Images through timm's readers: nothing is left out without a name and a reason."""

import io
import os
import tarfile

import pytest
import torch
from PIL import Image

from mixpool.evaluation.dataset import Images, Stream, check_classes, open_images, read_class_map
from mixpool.evaluation.loader import batches
from mixpool.evaluation.protocols import SquareView

VIEW = SquareView(16)


CLASSES = ("ant", "bee", "cat")


def picture(color):
    return Image.new("RGB", (20, 16), (color, 2 * color, 7))


def as_bytes(image, kind="PNG"):
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


@pytest.fixture
def folder(tmp_path):
    """data/val/CLASS/NUMBER.png, four pictures of each of three classes; the colour tells which one."""
    for label, name in enumerate(CLASSES):
        (tmp_path / "data/val" / name).mkdir(parents=True)
        for number in range(4):
            picture(10 * (4 * label + number)).save(tmp_path / "data/val" / name / f"{number}.png")
    return tmp_path / "data"


@pytest.fixture
def archive(folder):
    path = folder.parent / "data.tar"
    with tarfile.open(path, "w") as tar:
        tar.add(folder / "val", ".")
    return path


def read_all(images, workers=0, batch_size=5):
    """(first red byte, label) of each image in order, and the failures."""
    found, failed = [], []
    for batch in batches(images, [VIEW], batch_size, workers, pin_memory=False):
        found += zip(batch.views[VIEW][:, 0, 0, 0].tolist(), batch.labels.tolist()) if batch.places else []
        failed += batch.failed
    return found, failed


EXPECTED = [(10 * i, i // 4) for i in range(12)]


# --- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_a_folder(folder, workers):
    images = open_images(folder)
    assert (len(images), images.num_classes, images.name(5)) == (12, 3, os.path.join("bee", "1.png"))
    assert read_all(images, workers) == (EXPECTED, [])


def test_an_archive_is_read_by_several_processes_after_this_one(archive):
    images = open_images(archive)
    assert images.num_classes == 3
    assert read_all(images) == (EXPECTED, [])
    assert read_all(images, workers=2, batch_size=1) == (EXPECTED, [])


def test_archives_inside_an_archive(folder, tmp_path):
    path = tmp_path / "nested.tar"
    with tarfile.open(path, "w") as outer:
        for name in CLASSES:
            with tarfile.open(tmp_path / f"{name}.tar", "w") as inner:
                for number in range(4):
                    inner.add(folder / "val" / name / f"{number}.png", f"{number}.png")
            outer.add(tmp_path / f"{name}.tar", f"{name}.tar")
    images = open_images(path)
    assert sorted(read_all(images)[0]) == EXPECTED
    assert [reason for _, reason in open_images(path, class_map={"ant": 0, "bee": 1}).left_out] == [
        "its folder 'cat' is not in the class map"
    ]


def test_any_dataset_of_pictures():
    pairs = [(picture(10), 3), (picture(20), torch.tensor(4)), (torch.zeros(3, 4, 4), 1), (picture(30), [1, 2])]
    found, failed = read_all(Images(pairs))
    assert found == [(10, 3), (20, 4)]
    assert [name for name, _ in failed] == ["image 2", "image 3"]
    assert "expected a PIL image, got Tensor" in failed[0][1] and "one class number" in failed[1][1]


def test_torchvisions_own_folder(folder):
    images = open_images(folder / "val", dataset="torch/image_folder")
    assert images.num_classes == 3 and read_all(images) == (EXPECTED, [])


# --- what cannot be read ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
def test_every_bad_image_is_named_and_none_replaced(folder, workers):
    val = folder / "val"
    (val / "ant/0.png").write_bytes(b"no picture")
    whole = as_bytes(Image.effect_noise((64, 64), 90).convert("RGB"), "JPEG")
    (val / "ant/1.png").unlink()
    (val / "ant/1.jpg").write_bytes(whole[: len(whole) // 2])
    (val / "bee/0.png").write_bytes(b"")
    (val / "bee/1.png").unlink()
    (val / "bee/1.png").symlink_to(val / "nowhere.png")
    Image.new("I;16", (20, 20)).save(val / "cat/3.png")
    found, failed = read_all(open_images(folder), workers)
    assert found == [EXPECTED[i] for i in (2, 3, 6, 7, 8, 9, 10)]
    reasons = {name.replace(os.sep, "/"): reason for name, reason in failed}
    assert list(reasons) == ["ant/0.png", "ant/1.jpg", "bee/0.png", "bee/1.png", "cat/3.png"]
    assert "cannot identify" in reasons["ant/0.png"] and "truncated" in reasons["ant/1.jpg"]
    assert "FileNotFoundError" in reasons["bee/1.png"] and "8 bits" in reasons["cat/3.png"]


def test_a_bad_image_in_an_archive(archive):
    with tarfile.open(archive, "a") as tar:
        entry = tarfile.TarInfo("./ant/9.png")
        entry.size = 4
        tar.addfile(entry, io.BytesIO(b"oops"))
    found, failed = read_all(open_images(archive))
    assert len(found) == 12 and [name for name, _ in failed] == ["./ant/9.png"]


def test_formats_that_timm_does_not_know_are_named(folder):
    picture(1).save(folder / "val/bee/new.webp")
    (folder / "val/bee/notes.txt").write_text("no picture")
    (folder / "val/bee/.hidden.webp").write_text("no picture")
    assert open_images(folder).left_out == (("bee/new.webp", "timm's readers take no .webp files"),)


# --- classes ----------------------------------------------------------------------------------------------------------


def test_a_class_map_numbers_the_folders(folder, tmp_path):
    path = tmp_path / "names.txt"
    path.write_text("cat\ndog\nbee\n\nant\n")
    images = open_images(folder, class_map=path)
    assert images.num_classes == 4 and images.left_out == ()
    assert read_all(images)[0] == [(color, {0: 3, 1: 2, 2: 0}[label]) for color, label in EXPECTED]
    check_classes(images, 4)


@pytest.mark.parametrize("source", ["folder", "archive"])
def test_folders_that_the_class_map_lacks_are_named(source, request):
    images = open_images(request.getfixturevalue(source), class_map={"ant": 0, "cat": 5})
    assert len(images) == 8
    assert [os.path.basename(name) for name, _ in images.left_out] == ["0.png", "1.png", "2.png", "3.png"]
    assert images.left_out[0][1] == "its folder 'bee' is not in the class map"


def test_a_class_map_of_synsets_may_have_words(tmp_path):
    path = tmp_path / "synsets.txt"
    path.write_text("n01440764 tench, Tinca\nn01443537 goldfish\n")
    assert read_class_map(path) == {"n01440764": 0, "n01443537": 1}
    path.write_text("sea lion\nsea horse\n")
    assert read_class_map(path) == {"sea lion": 0, "sea horse": 1}


def test_a_wrong_class_map(tmp_path):
    path = tmp_path / "names.txt"
    path.write_text("ant\nbee\nant\n")
    with pytest.raises(ValueError, match="got ant twice"):
        read_class_map(path)
    path.write_text("\n")
    with pytest.raises(ValueError, match="one class name per line"):
        read_class_map(path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_class_map(tmp_path / "nowhere.txt")
    with pytest.raises(ValueError, match=r"\.txt"):
        read_class_map(__file__)


def test_folders_that_are_not_the_models_classes(folder, tmp_path):
    check_classes(open_images(folder), 3)
    with pytest.raises(ValueError, match=r"from 0 to 2 and the model has 1000 outputs.*--class-map.*1000 names"):
        check_classes(open_images(folder), 1000)
    path = tmp_path / "names.txt"
    path.write_text("\n".join(CLASSES))
    with pytest.raises(ValueError, match="1000 outputs"):  # a list of the folders that are there helps nothing
        check_classes(open_images(folder, class_map=path), 1000)
    check_classes(open_images(folder, class_map={"ant": 7, "bee": 8, "cat": 900}), 1000)
    with pytest.raises(ValueError, match="from 0 to 900"):
        check_classes(open_images(folder, class_map={"ant": 7, "bee": 8, "cat": 900}), 900)


def test_the_imagenet_sample_needs_its_class_map(shared_data):
    root = shared_data / "imagenet_sample"
    images = open_images(root, class_map=root / "synsets.txt", limit=4)
    assert (images.num_found, images.num_classes, images.left_out) == (500, 1000, ())
    check_classes(images, 1000)
    labels = [images.read(index)[1] for index in images.indices]
    synsets = (root / "synsets.txt").read_text().splitlines()
    assert [synsets[label].split()[0] for label in labels] == [images.name(i).split(os.sep)[0] for i in images.indices]
    with pytest.raises(ValueError, match="from 0 to 499 and the model has 1000 outputs"):
        check_classes(open_images(root), 1000)


# --- opening ----------------------------------------------------------------------------------------------------------


def test_wrong_roots(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        open_images(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="Found 0 images"):
        open_images(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"folder or a \.tar"):
        open_images(folder / "val/ant/0.png")
    with pytest.raises(ValueError, match="found none"):
        Images([])
    with pytest.raises(ValueError, match="at least 1 image, got 0"):
        Images([1, 2], limit=0)


def test_a_split_that_does_not_exist_is_not_all_splits_together(folder):
    with pytest.raises(ValueError, match="expected a folder 'train' in .*found val"):
        open_images(folder, split="train")
    assert len(open_images(folder, split="val")) == len(open_images(folder, split="validation")) == 12
    assert len(open_images(folder / "val", split="whatever")) == 12


def test_splits_beside_other_folders(folder):
    """All splits together are no split either where one more folder lies beside them."""
    (folder / "train/ant").mkdir(parents=True)
    (folder / "devkit").mkdir()
    picture(3).save(folder / "train/ant/0.png")
    picture(4).save(folder / "devkit/figure.png")
    with pytest.raises(ValueError, match="expected a folder 'tset' in .*found devkit, train, val"):
        open_images(folder, split="tset")
    assert len(open_images(folder, split="train")) == 1 and len(open_images(folder, split="validation")) == 12


def test_a_class_may_be_called_as_a_split(tmp_path):
    for name in ("bus", "train", "tram"):
        (tmp_path / name).mkdir()
        picture(3).save(tmp_path / name / "0.png")
    images = open_images(tmp_path)
    assert (len(images), images.num_classes) == (3, 3)


@pytest.mark.parametrize("name", ["nonsense", "wds", "torch", "nothing/imagenet"])
def test_names_of_no_dataset(folder, name):
    with pytest.raises(ValueError, match=f"one of torch/NAME, hfds/NAME, wds/NAME.*got '{name}'"):
        open_images(folder, dataset=name)


@pytest.mark.parametrize("name", ["", "folder", "Image_Folder"])
def test_names_of_a_folder(folder, name):
    assert len(open_images(folder, dataset=name)) == 12


def test_readers_whose_package_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name, package in (("hfds/x", "datasets"), ("hfids/x", "datasets"), ("wds/x", "webdataset")):
        with pytest.raises(ValueError, match=f"needs the package {package}"):
            open_images(tmp_path, dataset=name)


# --- readers of optional packages -------------------------------------------------------------------------------------


def test_a_stream():
    pairs = [(picture(10), 3), (picture(20), 4), (None, 1), (picture(30), 5)]
    found, failed = read_all(Stream(pairs), workers=2, batch_size=3)
    assert found == [(10, 3), (20, 4), (30, 5)]
    assert [name for name, _ in failed] == ["image 2 of the stream"]
    assert read_all(Stream(pairs, limit=2)) == ([(10, 3), (20, 4)], [])


@pytest.mark.filterwarnings("ignore")  # of the package
def test_webdataset(tmp_path):
    pytest.importorskip("webdataset", reason="needs the package webdataset")
    for shard in range(2):
        with tarfile.open(tmp_path / f"shard-{shard}.tar", "w") as tar:
            for number in range(3):
                content = b"oops" if (shard, number) == (1, 1) else as_bytes(picture(10 * (3 * shard + number)))
                for suffix, data in (("png", content), ("cls", str(number).encode())):
                    entry = tarfile.TarInfo(f"{shard}{number}.{suffix}")
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
    for workers in (0, 2):
        images = open_images(tmp_path, dataset="wds/mine", split="shard-{0..1}.tar|6")
        found, failed = read_all(images, workers)
        assert found == [(0, 0), (10, 1), (20, 2), (30, 0), (50, 2)]
        assert [name for name, _ in failed] == ["image 4 of the stream"] and "UnidentifiedImageError" in failed[0][1]


@pytest.mark.filterwarnings("ignore")  # of the package
@pytest.mark.parametrize("kind", ["hfds", "hfids"])
def test_hugging_face_datasets(folder, kind, tmp_path, monkeypatch):
    pytest.importorskip("datasets", reason="needs the package datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    images = open_images(tmp_path / "cache", dataset=f"{kind}/{folder}", split="validation")
    assert images.num_classes == (3 if kind == "hfds" else None)  # a stream of files does not say
    assert sorted(read_all(images, workers=1)[0]) == EXPECTED
