"""Random weights at a fraction of the price: a large tensor repeats a random block instead of drawing every number.

A network's initialisation draws up to 469 million numbers, each layer's twice, which took more time than the tests of
it. The block has a prime number of elements, so that rows, filters and channels differ from each other; equal seeds
still give equal weights.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

BLOCK = 4099  # prime; smaller tensors are drawn as ever


def repeated(draw):
    """`Tensor.uniform_` or `Tensor.normal_` that draws one block."""

    def draw_block(tensor: Tensor, *limits, **options) -> Tensor:
        if tensor.numel() < 4 * BLOCK or tensor.is_meta or not tensor.is_contiguous():
            return draw(tensor, *limits, **options)
        with torch.no_grad():
            flat = tensor.view(-1)
            whole = flat.numel() // BLOCK * BLOCK
            block = draw(flat[:BLOCK], *limits, **options)
            flat[BLOCK:whole].view(-1, BLOCK).copy_(block.expand(whole // BLOCK - 1, BLOCK))
            flat[whole:].copy_(block[: flat.numel() - whole])
        return tensor

    return draw_block


def make_cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("uniform_", "normal_"):
        monkeypatch.setattr(Tensor, name, repeated(getattr(Tensor, name)))
