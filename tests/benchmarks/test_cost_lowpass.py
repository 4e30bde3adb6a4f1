"""The measurement of the window's mean: both ways compute the same, and a record says how long each took."""

import torch
from support import assert_close

from benchmarks.cost import lowpass
from mixpool.ops.reference import lowpass_pool


def test_two_average_pools_are_the_binomial_mean():
    for size in ((8, 8), (9, 7)):
        values = torch.rand(2, 3, *size, dtype=torch.float64)
        assert_close(f"{size}", lowpass.by_average_pools(values), lowpass_pool(values, lowpass.POOL))


def test_records_hold_both_passes_and_their_ratio():
    found = lowpass.measure("channels_last", (1, 2, 8, 8), rounds=3)
    assert [record["provider"] for record in found] == list(lowpass.WAYS)
    for record in found:
        assert record["layout"] == "channels_last" and record["ratio"]["forward"]["n"] == 3
        assert record["ms"]["backward"]["p50"] >= 0
    assert found[0]["ratio"]["forward"]["p50"] == 1
