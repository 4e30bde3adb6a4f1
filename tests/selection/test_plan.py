"""ChannelPlan: its counts, the table it prints, and the small numbers in which a checkpoint keeps it."""

from __future__ import annotations

import math

import pytest
import torch
from gabor_stems import gabors

from mixpool.selection.plan import ChannelPlan
from mixpool.selection.stats import analyze

ANGLES = [0.0, 0.4, 1.2, 2.0, 2.9]
KINDS = ("max", "modulus", "modulus", "max", "modulus")
REASONS = ("low-pass", "given", "predicted correlation 0.900", "too slow", "")


def plan_of(**fields) -> ChannelPlan:
    stats = analyze(gabors([1.5], ANGLES), 2)
    return ChannelPlan(**{"kinds": KINDS, "reasons": REASONS, "stats": stats} | fields)


def test_counts():
    assert plan_of().is_modulus == (False, True, True, False, True) and plan_of().num_modulus == 3
    assert plan_of(kinds=("max",) * 5).num_modulus == 0


def test_the_table_has_a_line_for_every_channel():
    fidelity = torch.tensor([math.nan, 0.913, 0.5, math.nan, 0.877])
    stats = plan_of().stats
    head, *lines = str(plan_of(fidelity=fidelity)).splitlines()
    assert len(lines) == 5 and "fid" in head
    for channel, line in enumerate(lines):
        assert line.split()[:2] == [str(channel), KINDS[channel]] and line.endswith(REASONS[channel])
        assert f"{stats.phase_step[channel]:.2f}" in line
        assert f"{math.degrees(stats.orientation[channel]):.1f}" in line
        assert (f"{fidelity[channel]:.2f}" in line) == (not fidelity[channel].isnan())
    assert "0.91" not in str(plan_of())


@pytest.mark.parametrize("blur", [1, 3])
@pytest.mark.parametrize("max_blur", [1, 3])
def test_what_a_checkpoint_keeps(blur: int, max_blur: int):
    plan = plan_of()
    encoded = plan.encode(blur, max_blur)
    assert encoded.shape == (5, 3) and encoded.dtype == torch.float32
    assert torch.equal(encoded, encoded.round()) and encoded.abs().max() <= 256, "what bfloat16 holds exactly"
    codes = ChannelPlan.decode_codes(encoded)
    assert tuple("modulus" if code & 1 else "max" for code in codes) == KINDS
    assert ChannelPlan.decode_blurs(codes) == (max_blur, blur)
    frequency = plan.stats.center_frequency
    direction = ChannelPlan.decode_direction(encoded)
    turn = torch.atan2(*direction.unbind(1)) - torch.atan2(*frequency.unbind(1))
    assert turn.abs().max() <= math.radians(0.005) * 1.001, "directions are kept to a hundredth of a degree"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_averages_keep_it(dtype: torch.dtype):
    encoded = plan_of().encode(3, 1)
    moved = encoded.to(dtype).float().lerp(encoded, 0.3)
    assert torch.equal(moved, encoded)
    assert ChannelPlan.decode_codes(encoded + 0.2) == ChannelPlan.decode_codes(encoded), "decoded by rounding"


@pytest.mark.parametrize("damage", [-1.0, 77.0, math.nan, math.inf])
def test_a_damaged_plan_is_refused(damage: float):
    encoded = plan_of().encode(3, 1)
    encoded[2, 0] = damage
    with pytest.raises(ValueError, match="expected the checkpoint's plan to hold"):
        ChannelPlan.decode_codes(encoded)
