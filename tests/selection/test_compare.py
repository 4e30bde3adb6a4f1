"""Both poolings of the same maps, against the definitions worked by loops."""

import itertools
import math

import pytest
import torch
from support import assert_close

from mixpool.selection.compare import Comparison, Poolings, PoolingStats, pool_both


def maps(n=3, c=4, h=9, w=8, dtype=torch.float64):
    return torch.randn(n, c, h, w, dtype=dtype), torch.randn(n, c, h, w, dtype=dtype)


def naive_pool(real, imag, window):
    """The definition, position by position."""
    weights = {3: (1, 2, 1), 2: (1, 1)}[window]
    n, c, height, width = real.shape
    h, w = (height - window) // 2 + 1, (width - window) // 2 + 1
    out = torch.zeros(3, n, c, h, w, dtype=torch.float64)
    for i, k, y, x in itertools.product(range(n), range(c), range(h), range(w)):
        values = {
            (dy, dx): (real[i, k, 2 * y + dy, 2 * x + dx].item(), imag[i, k, 2 * y + dy, 2 * x + dx].item())
            for dy in range(window)
            for dx in range(window)
        }
        center = (1, 1) if window == 3 else (0, 0)
        out[0, i, k, y, x] = max(re for re, _ in values.values())
        out[1, i, k, y, x] = math.hypot(*values[center])
        total = sum(weights[dy] * weights[dx] * math.hypot(*z) for (dy, dx), z in values.items())
        out[2, i, k, y, x] = total / sum(weights) ** 2
    return Poolings(*out)


def naive_stats(before, after):
    """The formulas at the top of comparison.py, one channel after the other."""

    def norm(values):
        return math.sqrt(sum(value**2 for value in values))

    def channel(pooling, k):
        return pooling[:, k].flatten().tolist()

    def pearson(a, b):
        mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
        a, b = [value - mean_a for value in a], [value - mean_b for value in b]
        return sum(x * y for x, y in zip(a, b)) / (norm(a) * norm(b))

    def difference(a, b):
        return norm([x - y for x, y in zip(a, b)])

    gap, r1, r3, moved = [], [], [], [[], [], []]
    for k in range(before.max.shape[1]):
        r, m, b = (channel(pooling, k) for pooling in before)
        gap.append(difference(r, m) / norm(m))
        r1.append(pearson(r, m))
        r3.append(pearson(r, b))
        for i, values in enumerate((r, m, b)):
            moved[i].append([difference(channel(other[i], k), values) / norm(values) for other in after])
    arrays = (torch.tensor(values, dtype=torch.float64) for values in (gap, r1, r3, *moved))
    return PoolingStats(*(array.T if array.ndim == 2 else array for array in arrays))


def assert_stats(actual, expected, **options):
    for name, a, e in zip(PoolingStats._fields, actual, expected, strict=True):
        assert a.dtype == torch.float64
        assert_close(name, a, e, **options)


@pytest.mark.parametrize("window", [2, 3])
@pytest.mark.parametrize("size", [(9, 8), (8, 9), (3, 3)])
def test_pooling_is_the_definition(window, size):
    real, imag = maps(h=size[0], w=size[1])
    for name, a, e in zip(Poolings._fields, pool_both(real, imag, window), naive_pool(real, imag, window), strict=True):
        assert_close(name, a, e)


def test_stats_are_the_definition():
    before, *after = (pool_both(*maps(h=13, w=11)) for _ in range(3))
    comparison = Comparison()
    comparison.add(before, after)
    expected = naive_stats(before, after)
    assert expected.instability_max.shape == (2, 4)
    assert_stats(comparison.result(), expected)


def test_batches_add_up_and_so_do_comparisons():
    (real, imag), (moved_real, moved_imag) = maps(n=6), maps(n=6)
    whole = Comparison()
    whole.add(pool_both(real, imag), [pool_both(moved_real, moved_imag)])
    batched, merged = Comparison(), Comparison()
    for rows in (slice(0, 1), slice(1, 6)):
        batch = pool_both(real[rows], imag[rows]), [pool_both(moved_real[rows], moved_imag[rows])]
        batched.add(*batch)
        part = Comparison()
        part.add(*batch)
        merged.update(part)
    assert_stats(batched.result(), whole.result())
    assert_stats(merged.result(), whole.result())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_float32_and_half_maps(dtype):
    real, imag = (part.to(dtype) for part in maps(n=4, h=21, w=21))
    half = pool_both(*(part.contiguous(memory_format=torch.channels_last) for part in (real, imag)))
    exact = pool_both(real.double(), imag.double())
    results = []
    for maps_ in (half, exact):
        comparison = Comparison()
        comparison.add(maps_, [maps_._replace(max=1.5 * maps_.max)])
        results.append(comparison.result())
    assert_stats(*results, tolerance=(2e-6, 2e-6))  # because the sums are of float32 products
    assert results[0].instability_max.sub(0.5).abs().max() < 1e-6


def test_without_shifts():
    comparison = Comparison()
    comparison.add(pool_both(*maps()))
    assert comparison.result().instability_blur3.shape == (0, 4)


def test_what_is_undefined_is_nan():
    real, imag = torch.zeros(2, 3, 7, 7), torch.zeros(2, 3, 7, 7)
    real[:, 1] = 3.1  # a constant: its mean is there, its variance is not
    real[:, 2] = torch.randn(2, 7, 7)
    pooled = pool_both(real, imag)
    comparison = Comparison()
    comparison.add(pooled, [pooled])
    stats = comparison.result()
    for values in (stats.correlation_blur1, stats.correlation_blur3):
        assert values.isnan().tolist() == [True, True, False]
    for values in (stats.gap, stats.instability_max[0], stats.instability_blur1[0], stats.instability_blur3[0]):
        assert values.isnan().tolist() == [True, False, False]
    assert stats.gap[1] == 0 and stats.instability_max[0, 1:].tolist() == [0, 0]


def test_scale_does_not_matter():
    real, imag = maps(dtype=torch.float32)
    results = []
    for scale in (1e-6, 1.0, 1e6):
        comparison = Comparison()
        comparison.add(pool_both(scale * real, scale * imag), [pool_both(-scale * real, scale * imag)])
        results.append(comparison.result())
    for other in results[1:]:
        assert_stats(other, results[0], tolerance=(1e-5, 1e-5))  # because of float32 maps


def test_errors():
    real, imag = maps()
    with pytest.raises(ValueError, match="window of 2 or 3"):
        pool_both(real, imag, window=4)
    with pytest.raises(ValueError, match="one shape"):
        pool_both(real, imag[:, :2])
    with pytest.raises(ValueError, match="at least 3 x 3"):
        pool_both(real[..., :2], imag[..., :2])
    comparison = Comparison()
    with pytest.raises(ValueError, match="got none"):
        comparison.result()
    with pytest.raises(ValueError, match="empty"):
        comparison.update(Comparison())
    pooled = pool_both(real, imag)
    comparison.add(pooled, [pooled])
    with pytest.raises(ValueError, match=r"\(1, 4\) as before, got \(2, 4\)"):
        comparison.add(pooled, [pooled, pooled])
    with pytest.raises(ValueError, match=r"\(1, 4\) as before, got \(1, 3\)"):
        comparison.add(*[Poolings(*(part[:, :3] for part in pooled)), [Poolings(*(part[:, :3] for part in pooled))]])
    with pytest.raises(ValueError, match="expected all poolings"):
        comparison.add(pooled, [Poolings(*(part[:1] for part in pooled))])
    assert comparison._count == pooled.max[:, 0].numel(), "a refused batch leaves nothing behind"
