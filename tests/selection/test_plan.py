"""ChannelPlan: its counts and the table it prints."""

from __future__ import annotations

import math

import torch
from gabor_stems import gabors

from mixpool.selection.plan import ChannelPlan
from mixpool.selection.stats import analyze

ANGLES = [0.0, 0.4, 1.2, 2.0, 2.9]
POOLINGS = ("blurpool", "modulus", "energy", "max", "modulus")
REASONS = ("low-pass", "given", "predicted correlation 0.900", "too slow", "")


def plan_of(**fields) -> ChannelPlan:
    stats = analyze(gabors([1.5], ANGLES), 2)
    return ChannelPlan(**{"poolings": POOLINGS, "reasons": REASONS, "stats": stats} | fields)


def test_counts():
    plan = plan_of()
    assert plan.is_complex == (False, True, True, False, True) and plan.num_complex == 3
    assert plan.count() == "1 max, 1 blurpool, 2 modulus, 1 energy", "in the order of the table of poolings"
    none = plan_of(poolings=("max",) * 5)
    assert none.num_complex == 0 and none.count() == "5 max"


def test_the_table_has_a_line_for_every_channel():
    fidelity = torch.tensor([math.nan, 0.913, 0.5, math.nan, 0.877])
    stats = plan_of().stats
    head, *lines = str(plan_of(fidelity=fidelity)).splitlines()
    assert len(lines) == 5 and "fid" in head
    for channel, line in enumerate(lines):
        assert line.split()[:2] == [str(channel), POOLINGS[channel]] and line.endswith(REASONS[channel])
        assert f"{stats.phase_step[channel]:.2f}" in line
        assert f"{math.degrees(stats.orientation[channel]):.1f}" in line
        assert (f"{fidelity[channel]:.2f}" in line) == (not fidelity[channel].isnan())
    assert "0.91" not in str(plan_of())
