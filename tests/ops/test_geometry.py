"""Where a pooling looks, against torch's own layer and by going through all windows of small maps."""

from __future__ import annotations

import itertools

import pytest
import torch
from support import pooled_length
from torch import nn

from mixpool.ops.geometry import (
    PoolGeometry,
    centers_are_inside,
    check_pool,
    is_channels_last,
    memory_format_of,
    unreached,
)

# (size, stride, padding, ceil_mode) of an axis
AXES = [
    (size, stride, padding, ceil_mode)
    for size, stride, padding, ceil_mode in itertools.product((2, 3), (1, 2, 3), (0, 1), (False, True))
]


@pytest.mark.parametrize("ceil_mode", [False, True])
def test_output_size_is_that_of_max_pool2d(ceil_mode):
    seen = 0
    for size in (2, 3):
        for stride in (1, 2, 3):
            for padding in (0, 1):
                for length in range(size, 12):
                    geometry = PoolGeometry((size, 3), (stride, 2), (padding, 1), ceil_mode)
                    pool = nn.MaxPool2d((size, 3), (stride, 2), (padding, 1), ceil_mode=ceil_mode)
                    expected = tuple(pool(torch.zeros(1, 1, length, 9)).shape[-2:])
                    assert geometry.output_size(length, 9) == expected, (geometry, length)
                    assert pooled_length(length, size, stride, padding, ceil_mode) == expected[0], "support.py is wrong"
                    seen += 1
    assert seen > 100


def test_the_centre_of_an_even_window_is_its_upper_left_one():
    assert PoolGeometry((3, 3)).center == (1, 1) and PoolGeometry((2, 3)).center == (0, 1)


# --- the windows' centres ---------------------------------------------------------------------------------------------


def centers(length: int, size: int, stride: int, padding: int, ceil_mode: bool) -> list[int]:
    count = pooled_length(length, size, stride, padding, ceil_mode)
    return [i * stride + (size - 1) // 2 - padding for i in range(count)]


@pytest.mark.parametrize("axis", AXES, ids=str)
def test_whether_all_centers_are_inside(axis):
    """True where it holds for maps of every size; with one such axis and one other it does not hold."""
    size, stride, padding, ceil_mode = axis
    lengths = range(size, 20)
    expected = all(0 <= center < length for length in lengths for center in centers(length, *axis))
    assert centers_are_inside(PoolGeometry((size,) * 2, (stride,) * 2, (padding,) * 2, ceil_mode)) == expected
    mixed = PoolGeometry((3, size), (1, stride), (1, padding), ceil_mode)  # the first axis has all centres inside
    assert centers_are_inside(mixed) == expected
    reached = min(length - 1 - max(centers(length, *axis)) for length in lengths)
    assert unreached(size, stride, padding, (size - 1) // 2, ceil_mode) == reached


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pool", "message"),
    [
        (PoolGeometry((4, 3)), r"expected a pooling window of 2 or 3, got \(4, 3\)"),
        (PoolGeometry((3, 1)), r"window of 2 or 3, got \(3, 1\)"),
        (PoolGeometry(padding=(2, 0)), r"padding from 0 to half the window \(3, 3\), got \(2, 0\)"),
        (PoolGeometry(padding=(0, -1)), r"got \(0, -1\)"),
        (PoolGeometry(stride=(2, 0)), r"expected a positive pooling stride, got \(2, 0\)"),
    ],
)
def test_windows_that_are_not_defined(pool, message):
    with pytest.raises(ValueError, match=message):
        check_pool(pool)


def test_all_that_max_pool2d_takes_passes():
    for size, stride, padding, ceil_mode in AXES:
        pool = PoolGeometry((size, 3), (stride, 2), (padding, 1), ceil_mode)
        nn.MaxPool2d(*pool[:3])(torch.zeros(1, 1, 5, 5))
        assert check_pool(pool) is pool


# --- how maps lie in memory -------------------------------------------------------------------------------------------


def test_memory_formats():
    plain = torch.randn(2, 3, 6, 7)
    last = plain.contiguous(memory_format=torch.channels_last)
    for x, expected in {
        plain: False,
        last: True,
        last[:, :, 1:4, 2:5]: True,  # a crop
        plain[:, :, 1:4, 2:5]: False,
        last[:1]: True,
        torch.randn(4, 5, 1, 1): False,  # without pixels both are the same
        torch.randn(2, 1, 5, 5): False,
    }.items():
        assert is_channels_last(x) == expected, (x.shape, x.stride())
        assert memory_format_of(x) == (torch.channels_last if expected else torch.contiguous_format)
