"""Bootstrap over photographs of what a comparison of two poolings finds."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mixpool.selection.compare import Comparison, PoolingStats


def resample(parts: Sequence[Comparison], draws: int, seed: int = 0) -> PoolingStats:
    """What comparisons find that put together as many parts, drawn with replacement.

    Args:
        parts: comparisons of disjoint sets of images, of equal channels and shifts.
        draws: how many, at least 1.
        seed: of the draws.
    Returns:
        PoolingStats with a first dimension of length `draws`: (draws, C), and (draws, S, C) for the instabilities.
    Raises:
        ValueError: nothing was added to a part that is drawn, or parts differ in shifts or channels.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(parts), (draws, len(parts)), generator=generator, device="cpu")
    found = []
    for rows in chosen.tolist():
        whole = Comparison()
        for row in rows:
            whole.update(parts[row])
        found.append(whole.result())
    return PoolingStats(*(torch.stack(draws) for draws in zip(*found, strict=True)))
