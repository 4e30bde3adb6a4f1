"""What follows the pooling, by plain loops."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support import assert_close

from mixpool.ops.geometry import PoolGeometry
from mixpool.ops.merge import activate_and_merge, affine
from mixpool.ops.reference import groups_of

POOL = PoolGeometry((3, 3), (2, 2), (1, 1))
NAMES = ("modulus", "max", "cmod", "max", "energy", "modulus")


@pytest.mark.parametrize("scale", [torch.tensor([2.0, 0.0, -1.0]), None], ids=["scale", "no-scale"])
@pytest.mark.parametrize("shift", [torch.tensor([1.0, 0.5, 0.0]), None], ids=["shift", "no-shift"])
def test_affine_is_per_channel(scale, shift):
    x = torch.randn(2, 3, 4, 5)
    expected = torch.stack(
        [x[:, c] * (1 if scale is None else scale[c]) + (0 if shift is None else shift[c]) for c in range(3)],
        dim=1,
    )
    assert_close("affine", affine(x, scale, shift), expected)
    assert affine(x.half(), scale, shift).dtype == torch.float16


@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_every_channel_comes_to_its_place(memory_format, needs_grad):
    groups = groups_of(NAMES)
    wanted = torch.randn(2, len(NAMES), 5, 4).requires_grad_(needs_grad)
    parts = [wanted[:, group.index].contiguous(memory_format=memory_format) for group in groups]
    out = activate_and_merge(parts, groups, F.relu, POOL, memory_format)
    assert torch.equal(out, wanted.relu())
    assert out.is_contiguous(memory_format=memory_format)
    if needs_grad:
        upstream = torch.randn_like(out)
        (grad,) = torch.autograd.grad(out, wanted, upstream)
        assert torch.equal(grad, upstream * (wanted > 0))


def test_blurpool_is_finished_after_the_activation():
    groups = groups_of(["blurpool", "max"])
    maxima, dense = torch.randn(1, 1, 4, 4), torch.randn(1, 1, 8, 8)
    parts = [maxima if group.pooling == "max" else dense for group in groups]
    out = activate_and_merge(parts, groups, F.relu, POOL, torch.contiguous_format)
    binomial = torch.tensor([1.0, 2.0, 1.0])
    kernel = (binomial[:, None] * binomial / 16)[None, None]
    expected = F.conv2d(F.pad(dense.relu(), (1, 1, 1, 1), mode="reflect"), kernel, stride=2)
    assert_close("blurpool", out[:, :1], expected)
    assert torch.equal(out[:, 1:], maxima.relu())
