"""Which modules a stem takes over. What is refused, part by part: test_module.py."""

from __future__ import annotations

import pytest
from torch import nn

from mixpool.ops.geometry import PoolGeometry
from mixpool.stem.parts import check_act, check_norm, check_parts, pool_geometry, without_hooks


def test_the_geometry_of_a_pool_is_torchs():
    assert pool_geometry(nn.MaxPool2d(3, 2, 1)) == PoolGeometry((3, 3), (2, 2), (1, 1), False)
    assert pool_geometry(nn.MaxPool2d((3, 2), ceil_mode=True)) == PoolGeometry((3, 2), (3, 2), (0, 0), True)


def test_known_parts_pass():
    check_parts(nn.Conv2d(3, 7, 5, device="meta"), nn.SyncBatchNorm(7), nn.LeakyReLU(0.1), nn.MaxPool2d(2))
    check_norm(None, 7)
    check_act(nn.ELU(0.5))


def test_another_count_of_channels_and_a_falling_activation_are_named():
    with pytest.raises(ValueError, match="norm layer of 7 channels, got BatchNorm2d.8"):
        check_norm(nn.BatchNorm2d(8), 7)
    with pytest.raises(ValueError, match="increasing activation such as ReLU .*, got torch.nn.modules.activation.GELU"):
        check_act(nn.GELU())


def test_an_activation_with_hooks_is_copied_without_them():
    act, seen = nn.ReLU(), []
    assert without_hooks(act) is act
    act.register_forward_hook(lambda *_: seen.append(1))
    other = without_hooks(act)
    assert type(other) is nn.ReLU and other is not act and not other._forward_hooks and act._forward_hooks
