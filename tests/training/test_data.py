"""Batches that depend on seed, epoch and position alone, and what is checked before the first step."""

from __future__ import annotations

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

from mixpool.evaluation.dataset import Images
from mixpool.training import state_file
from mixpool.training.checks import count_outputs, estimate_memory, half_precision_slowdown
from mixpool.training.data import BatchOrder, TrainingImages
from mixpool.training.splits import check_classes


class Blank:
    """37 images whose class is their number."""

    def __len__(self):
        return 37

    def __getitem__(self, position):
        return Image.new("RGB", (1, 1)), position


def draws(image):
    """What a random transform would draw, from every generator that transforms use."""
    return torch.tensor([random.random(), np.random.rand(), torch.rand(()).item()], dtype=torch.float64)


def epoch(number: int, *, workers: int = 0, start: int = 0, rank: int = 0, world_size: int = 1, size: int = 8):
    order = BatchOrder(37, size, seed=3, rank=rank, world_size=world_size)
    order.epoch, order.start = number, start
    images = TrainingImages(Images(Blank()), draws, channels=3, on_error="raise", seed=3)
    batches = DataLoader(images, batch_sampler=order, num_workers=workers)
    return [torch.cat([labels[:, None], drawn], dim=1) for drawn, labels in batches]


def test_workers_and_what_was_drawn_before_do_not_matter():
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    here = torch.cat(epoch(2))
    random.seed(2), np.random.seed(2), torch.manual_seed(2)
    assert torch.equal(here, torch.cat(epoch(2, workers=2)))


def test_an_epoch_is_a_permutation_and_epochs_differ():
    first, second = (torch.cat(epoch(number)) for number in (0, 1))
    assert len(first) == 32 and len(set(first[:, 0].tolist())) == 32
    assert not torch.equal(first[:, 0], second[:, 0])
    shared = set(first[:, 0].tolist()) & set(second[:, 0].tolist())
    drawn = [dict(zip(rows[:, 0].tolist(), rows[:, 1:].tolist())) for rows in (first, second)]
    assert all(drawn[0][position] != drawn[1][position] for position in shared)
    assert len({tuple(row) for row in first[:, 1:].tolist()}) == 32


def test_a_pass_can_start_within_an_epoch():
    assert all(map(torch.equal, epoch(1)[2:], epoch(1, start=2)))
    assert len(epoch(1, start=2)) == len(epoch(1)) - 2


def test_the_processes_together_see_what_one_sees():
    alone = epoch(0, size=8)
    first, second = (epoch(0, rank=rank, world_size=2, size=4) for rank in (0, 1))
    assert len(alone) == len(first) == len(second)
    for whole, *halves in zip(alone, first, second):
        assert torch.equal(whole, torch.cat(halves))


def test_the_training_process_keeps_its_own_generators():
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    expected = random.random(), np.random.rand(), torch.rand(()).item()
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    TrainingImages(Images(Blank()), draws, channels=3, on_error="raise", seed=0)[(0, 3)]
    assert (random.random(), np.random.rand(), torch.rand(()).item()) == expected


def test_generator_states_survive_the_file(tmp_path):
    random.seed(7), np.random.seed(7), torch.manual_seed(7)
    random.gauss(0, 1), np.random.randn()  # both keep half of a pair
    device = torch.device("cpu")
    state_file.save(tmp_path / "x", {"run": state_file.generator_states(device)})

    def draw():
        return random.gauss(0, 1), random.random(), np.random.randn(), np.random.rand(), torch.randn(3).tolist()

    expected = draw()
    state_file.set_generator_states(state_file.load(tmp_path / "x")["run"], device)
    assert draw() == expected


def test_a_checkpoint_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "last"
    state_file.save(path, {"run": 1})

    def fail(state, file):
        file.write(b"half of it")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        state_file.save(path, {"run": 2})
    assert state_file.load(path) == {"run": 1} and [p.name for p in tmp_path.iterdir()] == ["last"]

    def fail_as_torch_does(state, file):
        raise RuntimeError("[enforce fail at inline_container.cc] unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", fail_as_torch_does)
    with pytest.raises(OSError, match="cannot write .*last: .*unexpected pos"):
        state_file.save(path, {"run": 2})


def test_files_that_are_no_checkpoint(tmp_path):
    (tmp_path / "damaged").write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(ValueError, match="cannot read the checkpoint"):
        state_file.load(tmp_path / "damaged")
    torch.save({"state_dict": {}}, tmp_path / "other")
    with pytest.raises(ValueError, match="has no entry 'run'"):
        state_file.load(tmp_path / "other")


# --- checks -----------------------------------------------------------------------------------------------------------


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


def test_only_classifiers_with_finite_outputs_pass():
    images = torch.rand(2, 3, 8, 8)
    assert count_outputs(nn.Sequential(nn.Flatten(), nn.Linear(192, 6)), images) == 6
    with pytest.raises(ValueError, match="expected a classifier"):
        count_outputs(nn.Conv2d(3, 4, 3), images)
    broken = nn.Sequential(nn.Flatten(), nn.Linear(192, 6))
    nn.init.constant_(broken[1].bias, torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        count_outputs(broken, images)


def test_the_memory_estimate_counts_what_autograd_keeps():
    """By hand: the inputs of the second convolution and of the ReLU, each of 8 x 16 x 16 floats per image."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
    options = SimpleNamespace(opt="sgd", momentum=0.9, amp=False, batch_size=64, model_ema=True)
    images, state = torch.rand(2, 3, 16, 16), torch.get_rng_state()
    before = [parameter.clone() for parameter in model.parameters()]
    found = estimate_memory(model, images, options, torch.device("cpu"))
    assert found.activations == 2 * 64 * 8 * 16 * 16 * 4
    assert found.weights == 4 * sum(p.numel() * 4 for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, before, model.parameters()))


def test_slowness_is_measured_and_draws_nothing():
    state = torch.get_rng_state()
    assert 0 < half_precision_slowdown(torch.bfloat16) < float("inf")
    assert 0.1 < half_precision_slowdown(torch.float32) < 10
    assert torch.equal(torch.get_rng_state(), state)
