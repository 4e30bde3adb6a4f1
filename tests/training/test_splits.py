"""Both splits of a data set: whether their classes are the same and the model's."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import pytest
from training_runs import CLASSES, CPU, options

from mixpool.training.run import set_up
from mixpool.training.splits import check_classes


def folders(*names: str):
    return SimpleNamespace(reader=SimpleNamespace(class_to_idx={name: i for i, name in enumerate(names)}))


def test_classes_have_to_fit():
    check_classes(folders("a", "b"), folders("a", "b"), 2, has_class_map=False)
    check_classes(folders("a", "b"), folders("a", "b"), 5, has_class_map=True)  # a part of the classes of the map
    check_classes(object(), object(), 7, has_class_map=False)  # a stream does not tell
    with pytest.raises(ValueError, match="2 classes and the model 5 outputs: set num_classes: 2"):
        check_classes(folders("a", "b"), folders("a", "b"), 5, has_class_map=False)
    with pytest.raises(ValueError, match="3 classes and the model 2 outputs"):
        check_classes(folders("a", "b", "c"), folders("a", "b", "c"), 2, has_class_map=True)
    with pytest.raises(ValueError, match="in one of them only: c"):
        check_classes(folders("a", "b", "c"), folders("a", "b"), 3, has_class_map=False)


@pytest.mark.usefixtures("tiny_models")
def test_other_folders_in_both_splits_are_an_error(photos, tmp_path):
    shutil.copytree(photos, tmp_path / "data")
    shutil.rmtree(tmp_path / "data/validation" / CLASSES[1])
    with pytest.raises(ValueError, match="in one of them only: dog"):
        set_up(options(tmp_path / "data", tmp_path), CPU, 0, 1)


@pytest.mark.usefixtures("tiny_models")
def test_images_that_the_class_map_would_lose_are_an_error(photos, tmp_path):
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES[:3]))
    asked = {"class_map": tmp_path / "classes.txt", "num_classes": 3}
    with pytest.raises(ValueError, match=r"6 image\(s\) of the split 'train'.*'ship' is not in the class map"):
        set_up(options(photos, tmp_path, **asked), CPU, 0, 1)
    assert set_up(options(photos, tmp_path, on_error="skip", **asked), CPU, 0, 1).dataset["num_train"] == 18
