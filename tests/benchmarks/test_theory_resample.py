"""The bootstrap of the theory's experiment."""

import pytest
import torch

from benchmarks.theory.resample import resample
from mixpool.selection.compare import Comparison, PoolingStats, pool_both


def pooled():
    return pool_both(*torch.randn(2, 3, 4, 9, 8, dtype=torch.float64))


def test_resampling_draws_whole_parts():
    parts = []
    for _ in range(2):
        part = Comparison()
        part.add(pooled(), [pooled()])
        parts.append(part)
    draws = resample(parts, 40, seed=3)
    assert draws.gap.shape == (40, 4) and draws.instability_blur1.shape == (40, 1, 4)
    possible = []
    for i, j in ((0, 0), (0, 1), (1, 1)):
        both = Comparison()
        both.update(parts[i])
        both.update(parts[j])
        possible.append(both.result())
    for name, values in zip(PoolingStats._fields, draws, strict=True):
        known = torch.stack([getattr(stats, name) for stats in possible]).flatten(1)
        distance = (values.flatten(1)[:, None] - known).abs().amax(dim=2)
        assert distance.amin(dim=1).max() < 1e-12
        assert set(distance.argmin(dim=1).tolist()) == {0, 1, 2}
    assert torch.equal(resample(parts, 40, seed=3).gap, draws.gap)


def test_parts_that_do_not_fit():
    moved, still = Comparison(), Comparison()
    moved.add(pooled(), [pooled()])
    still.add(pooled())
    with pytest.raises(ValueError, match="maps were added"):
        resample([moved, Comparison()], 20)
    with pytest.raises(ValueError, match=r"\(shifts, channels\) = "):
        resample([moved, still], 20)
