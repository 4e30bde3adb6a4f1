"""The norm layer after pooling: which layers there are, running and batch statistics, those of several processes."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.distributed as dist
import torchvision
from support import assert_close, assert_same_bits
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.functional import batch_norm

from mixpool.ops import reference
from mixpool.ops.geometry import ConvGeometry, PoolGeometry
from mixpool.ops.moments import Moments, real_moments
from mixpool.ops.norm import across_processes, is_supported_norm, normalize, sign_of_scale, uses_batch_statistics
from mixpool.ops.reference import Group, Pooled, convolve_and_pool

POOL = PoolGeometry((3, 3), (2, 2), (1, 1))
REAL = [name for name, entry in reference.POOLINGS.items() if not entry.is_complex]
COMPLEX = [name for name, entry in reference.POOLINGS.items() if entry.is_complex]


def norm_of(channels: int = 5, dtype: torch.dtype = torch.float32, **options) -> nn.BatchNorm2d:
    """As training leaves it, scales of both signs and one of 0."""
    norm = nn.BatchNorm2d(channels, dtype=dtype, **options)
    with torch.no_grad():
        if norm.affine:
            norm.weight.copy_(torch.tensor([0.7, -1.2, 0.0, -0.4, 1.5])[:channels])
            norm.bias.normal_()
        if norm.track_running_stats:
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
    return norm


# --- which layers, which statistics -----------------------------------------------------------------------------------


def test_layers_that_are_an_affine_map_per_channel():
    class Own(nn.BatchNorm2d):
        """Who knows what it computes."""

    for norm in (
        nn.BatchNorm2d(4),
        nn.SyncBatchNorm(4),
        BatchNormAct2d(4),
        torchvision.ops.FrozenBatchNorm2d(4),
    ):
        assert is_supported_norm(norm), type(norm)
    for other in (Own(4), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4), nn.BatchNorm1d(4), nn.Identity()):
        assert not is_supported_norm(other), type(other)


def test_the_sign_of_a_scale():
    norm = norm_of()
    sign = sign_of_scale(norm)
    assert sign.tolist() == [1, -1, 1, -1, 1] and not sign.requires_grad, "a scale of 0 counts as positive"
    assert sign_of_scale(norm.bfloat16()).dtype == torch.bfloat16
    assert sign_of_scale(None) is None and sign_of_scale(norm_of(affine=False)) is None


def test_batch_statistics_are_used_by_torchs_own_rule():
    norm = nn.BatchNorm2d(3)
    assert uses_batch_statistics(norm.train()) and not uses_batch_statistics(norm.eval())
    untracked = nn.BatchNorm2d(3, track_running_stats=False)
    assert uses_batch_statistics(untracked.train()) and uses_batch_statistics(untracked.eval())
    frozen = torchvision.ops.FrozenBatchNorm2d(3)
    assert not uses_batch_statistics(frozen.train()) and not uses_batch_statistics(None)


# --- running statistics -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", reference.POOLINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_running_statistics_give_the_bits_of_torchs_batch_norm(pooling, dtype):
    """Of the values with their sign: a negative scale acts on values that have changed theirs."""
    norm, index = norm_of().eval(), torch.tensor([4, 0, 3, 1])
    sign, values = sign_of_scale(norm), torch.randn(2, 4, 6, 5).to(dtype)
    (out,) = normalize([Pooled(values, None)], [Group(pooling, index)], norm, None, sign)
    mean, var, weight, bias = (v[index] for v in (norm.running_mean, norm.running_var, norm.weight, norm.bias))
    expected = batch_norm(values, mean * sign[index], var, weight * sign[index], bias, False, 0.0, norm.eps)
    assert_same_bits("values", out, expected)
    positive = values * sign[index][:, None, None].to(dtype)
    expected = batch_norm(positive, mean, var, weight, bias, False, 0.0, norm.eps)
    assert_same_bits("the other way round", out, expected)


def test_a_frozen_norm_is_its_own_forward():
    norm = torchvision.ops.FrozenBatchNorm2d(5)
    for name in ("weight", "bias", "running_mean"):
        getattr(norm, name).normal_()
    norm.running_var.uniform_(0.5, 2)
    sign, values = sign_of_scale(norm), torch.randn(2, 5, 6, 5)
    (out,) = normalize([Pooled(values, None)], [Group("max", torch.arange(5))], norm, None, sign)
    assert_close("values", out, norm(values * sign[:, None, None]))


def test_the_bias_of_the_convolution():
    """Complex channels get it here, with the sign of the scale; real ones hold it already."""
    values, bias, index = torch.randn(2, 3, 4, 4), torch.randn(5), torch.tensor([1, 2, 4])
    shifted = values + bias[index][:, None, None]
    for pooling, expected in (("max", values), ("modulus", shifted)):
        (out,) = normalize([Pooled(values, None)], [Group(pooling, index)], None, bias, None)
        assert_close(pooling, out, expected)
    norm = norm_of().eval()
    sign = sign_of_scale(norm)
    parts, group = [Pooled(values, None)], [Group("energy", index)]
    (with_bias,) = normalize(parts, group, norm, bias, sign)
    shifted = values + (bias * sign)[index][:, None, None]
    assert_close("energy", with_bias, normalize([Pooled(shifted, None)], group, norm, None, sign)[0])


# --- batch statistics -------------------------------------------------------------------------------------------------


def pooled(pooling: str, norm: nn.BatchNorm2d, x: Tensor, weight: Tensor, imag: Tensor) -> tuple[Tensor, Tensor]:
    """(a group of all channels after the norm, the convolution that it looks at)."""
    conv, group = ConvGeometry((2, 2), (1, 1)), Group(pooling, torch.arange(len(weight)))
    sign = sign_of_scale(norm)
    signs = 1.0 if sign is None else sign[:, None, None, None]
    own_imag = imag * signs if pooling in COMPLEX else None
    parts = convolve_and_pool(x, weight * signs, None, own_imag, [group], conv, POOL, with_moments=True)
    stride = (4, 4) if pooling == "cmod" else (2, 2)
    maps = [nn.functional.conv2d(x, w, None, stride, 1) for w in (weight, imag)]
    return normalize(parts, [group], norm, None, sign)[0], torch.stack(maps)


@pytest.mark.parametrize("momentum", [0.1, 0.7, None])
@pytest.mark.parametrize("pooling", reference.POOLINGS)
def test_batch_statistics_and_what_is_kept_of_them(pooling, momentum):
    norm = norm_of(dtype=torch.float64, momentum=momentum).train()
    stock = norm_of(dtype=torch.float64, momentum=momentum).train()
    stock.load_state_dict(norm.state_dict())
    weight, imag = (torch.randn(5, 3, 4, 4, dtype=torch.float64) for _ in "WV")
    for step in range(2):
        mean_before = norm.running_mean.clone()
        var_before = norm.running_var.clone()
        out, (real, imaginary) = pooled(pooling, norm, torch.randn(3, 3, 16, 20).double(), weight, imag)
        assert norm.num_batches_tracked == step + 1
        share = momentum if momentum is not None else 1 / (step + 1)
        if pooling in REAL:
            expected = stock(real)
            if pooling == "max":
                assert_close("output", out, reference.max_pool(expected, POOL))
            assert_close("mean", norm.running_mean, stock.running_mean)
            assert_close("variance", norm.running_var, stock.running_var)
        else:
            var = (real.square() + imaginary.square()).mean(dim=(0, 2, 3)) / 2
            assert_same_bits("the mean stays", norm.running_mean, mean_before)
            assert_close("variance", norm.running_var, var_before + share * (var - var_before))
            scale = norm.weight.abs() * (var + norm.eps).rsqrt()
            mean = mean_before * sign_of_scale(norm)
            values = convolved_modulus(pooling, real, imaginary)
            expected = (values - mean[:, None, None]) * scale[:, None, None] + norm.bias[:, None, None]
            assert_close("output", out, expected)


def convolved_modulus(pooling: str, real: Tensor, imaginary: Tensor) -> Tensor:
    if pooling == "cmod":
        return torch.hypot(real, imaginary)
    if pooling == "modulus":
        return reference.lowpass_pool(torch.hypot(real, imaginary), POOL)
    return reference.lowpass_pool(real.square() + imaginary.square(), POOL).sqrt()


def test_statistics_that_are_not_kept():
    norm = norm_of(dtype=torch.float64, track_running_stats=False).eval()
    weight, imag = (torch.randn(5, 3, 4, 4, dtype=torch.float64) for _ in "WV")
    out, (real, _) = pooled("max", norm, torch.randn(3, 3, 16, 20).double(), weight, imag)
    assert_close("output", out, reference.max_pool(norm(real), POOL))


def test_one_value_per_channel_teaches_nothing():
    norm, group = norm_of().train(), [Group("max", torch.arange(5))]
    before = norm.running_var.clone()
    part = Pooled(torch.randn(1, 5, 1, 1), Moments(torch.zeros(5), torch.zeros(5), 1))
    with pytest.raises(ValueError, match="expected more than 1 value per channel in training, got 1"):
        normalize([part], group, norm, None, None)
    empty = Pooled(torch.randn(0, 5, 1, 1), Moments(torch.zeros(5), torch.zeros(5), 0))
    normalize([empty], group, norm, None, None)
    assert torch.equal(norm.running_var, before) and norm.num_batches_tracked == 0


# --- several processes ------------------------------------------------------------------------------------------------


class Processes:
    """Several processes as threads: `all_reduce` waits for all of them and gives each the sum."""

    def __init__(self, count: int) -> None:
        self.barrier, self.given = threading.Barrier(count, timeout=30), {}

    def all_reduce(self, tensor: Tensor, group=None) -> None:
        self.given[threading.get_ident()] = tensor.detach().clone()
        self.barrier.wait()
        total = sum(self.given.values())
        self.barrier.wait()
        tensor.copy_(total)

    def run(self, work, arguments: list) -> list:
        answers = [None] * len(arguments)

        def one(i: int) -> None:
            answers[i] = work(*arguments[i])

        threads = [threading.Thread(target=one, args=(i,)) for i in range(len(arguments))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(answer is not None for answer in answers), "a thread has failed"
        return answers


@pytest.mark.parametrize("sizes", [(2, 3), (4, 0), (1, 1, 5)], ids=str)
def test_moments_of_all_processes_are_those_of_all_values(sizes, monkeypatch):
    """Means, variances and gradients; a large mean loses nothing, and a process may have nothing."""
    processes = Processes(len(sizes))
    monkeypatch.setattr(dist, "all_reduce", processes.all_reduce)
    values = (torch.randn(sum(sizes), 3, 4, 5, dtype=torch.float64) + 1e5).requires_grad_()
    whole = real_moments(values)
    upstreams = torch.randn(len(sizes), 2, 3, dtype=torch.float64)

    def one(part: Tensor, upstream: Tensor) -> tuple[Moments, Tensor]:
        own = part.detach().requires_grad_()
        moments = across_processes(real_moments(own), None)
        ((moments.mean * upstream[0]).sum() + (moments.var * upstream[1]).sum()).backward()
        return moments, own.grad

    answers = processes.run(one, list(zip(values.split(sizes), upstreams)))
    # Each process has a loss of its own; the gradients are those of their sum.
    ((whole.mean * upstreams[:, 0]).sum() + (whole.var * upstreams[:, 1]).sum()).backward()
    for moments, _ in answers:
        assert_close("mean", moments.mean, whole.mean, (1e-9, 1e-13))
        assert_close("variance", moments.var, whole.var, (1e-8, 0))  # because of a mean of 1e5
        assert moments.count == whole.count and not moments.count.requires_grad
    assert_close("gradient", torch.cat([grad for _, grad in answers]), values.grad, (1e-8, 1e-8))
