"""Batches that depend on seed, epoch and position alone, and what is checked before the first step."""

from __future__ import annotations

import random

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from mixpool.evaluation.dataset import Images
from mixpool.training.data import BatchOrder, TrainingImages


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
