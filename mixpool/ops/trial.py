"""The fused path tried once on random images before it is trusted: against wrong code from a compiler, and to warm up.

Legend: N images, C channels, (H, W) size of an image, W + iV the complex kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from mixpool.ops import reference
from mixpool.ops.geometry import ConvGeometry, Pair, PoolGeometry
from mixpool.ops.reference import Channels

IMAGES = 2  # so that a wrong step from image to image shows
SIZE = (64, 64)  # of the images where the true size may be a symbol
MAX_SIZES = 8  # of images per case: the size is a constant to the kernels, so that each is a compilation
TOLERANCE = 0.05  # of the largest value: finds wrong code, not rounding


class Case(NamedTuple):
    """What is tried once: a call of the fused path without its data and its number of images, as constants.

    device: with its index, as a string; layout: "NCHW" or "channels_last"; size: (H, W), or None while compiling;
    grads: whether the images and the weights need one.
    """

    device: str
    x_dtype: torch.dtype
    weight_dtype: torch.dtype
    dtype: torch.dtype
    layout: str
    size: Pair | None
    in_channels: int
    kernel_size: int
    num_max: int
    num_modulus: int
    conv: ConvGeometry
    pool: PoolGeometry
    blur: int
    grads: tuple[bool, bool]
    with_moments: bool

    @property
    def kernels(self) -> list[str]:
        """The kernels that it runs, as measured.json names them."""
        return ["max"] * (self.num_max > 0) + [f"modulus{self.blur}"] * (self.num_modulus > 0)

    @property
    def mode(self) -> str:
        return "training" if any(self.grads) or self.with_moments else "inference"


_reasons: dict[Case, str | None] = {}


def failure_of_trial(case: Case) -> str | None:
    """Why the fused path failed on random images of this case, or None; tried on the first call, which warms it up."""
    if case not in _reasons:
        if sum(other._replace(size=case.size) == case for other in _reasons) >= MAX_SIZES:
            return f"it was compiled for {MAX_SIZES} sizes of images already, and compiles for each anew"
        if _is_capturing(case.device):  # not remembered: the next call may come outside
            return "the first call came inside the capture of a CUDA graph: call the stem once before"
        try:
            # In a thread of its own, where the caller's autocast, grad mode, hooks and modes do not hold.
            with ThreadPoolExecutor(1) as pool:
                error = pool.submit(_largest_error, case).result()
            reason = f"a trial of it gave wrong numbers (relative error {error:.2g})" if error > TOLERANCE else None
        except Exception as failure:
            lines = str(failure).splitlines() or [""]
            reason = f"a trial of it failed ({type(failure).__name__}: {lines[0]})"
        _reasons[case] = reason
    return _reasons[case]


def _is_capturing(device: str) -> bool:
    return device.startswith("cuda") and torch.cuda.is_current_stream_capturing()


def _largest_error(case: Case) -> float:
    """The largest error of the fused outputs and gradients on random images, over the largest value of each."""
    from mixpool.ops.fused import ops  # here, because a fault in it is one of the things to be found

    device = torch.device(case.device)
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        x, weight, weight_imag, channels = _trial_problem(case)
        # With gradients all is above 0, so that rounding cannot decide where ReLU lets them through.
        lowest = 8.0 if any(case.grads) else -1.0
        scale, shift = (
            torch.linspace(first, first + 1, len(weight), dtype=torch.float32, device=device) for first in (0.5, lowest)
        )

        def fused(x: Tensor, weight: Tensor, weight_imag: Tensor | None) -> list[Tensor]:
            options = {"blur": case.blur, "with_moments": case.with_moments, "dtype": case.dtype}
            tensors = (x, weight, weight_imag, channels, case.conv, case.pool)
            if case.mode == "inference":
                return [ops.convolve_and_pool(*tensors, scale=scale, shift=shift, relu=True, **options)[0]]
            pooled, moments = ops.convolve_and_pool(*tensors, **options)
            return [ops.affine_relu(pooled, scale, shift, True), *(moments if case.with_moments else ())]

        def plain(x: Tensor, weight: Tensor, weight_imag: Tensor | None) -> list[Tensor]:
            tensors = (x, weight, None, weight_imag, channels, case.conv, case.pool)
            pooled = reference.convolve_and_pool(*tensors, blur=case.blur, with_moments=case.with_moments)
            merge = (channels, lambda part: part, case.pool, 1, torch.contiguous_format)
            out = reference.activate_and_merge(pooled.max, pooled.modulus, *merge)
            moments = []
            if case.with_moments:
                kinds = [kind for kind in (pooled.max_moments, pooled.modulus_moments) if kind is not None]
                order = torch.cat(channels).argsort()
                moments = [torch.cat(rows).index_select(0, order) for rows in zip(*(kind[:2] for kind in kinds))]
            return [reference.affine(out, scale, shift).relu(), *moments]

        leaves = (x.to(case.x_dtype), weight.to(case.weight_dtype))
        leaves = (*leaves, None if weight_imag is None else weight_imag.to(case.weight_dtype))
        actual = _outputs_and_gradients(fused, leaves, case.grads)
        expected = _outputs_and_gradients(plain, (x, weight, weight_imag), case.grads)
        return max(_relative_error(a, b) for a, b in zip(actual, expected, strict=True))


def _trial_problem(case: Case) -> tuple[Tensor, Tensor, Tensor | None, Channels]:
    """Random (x, W, V, channels) of a case, float32, on its device, in its layout.

    The values are multiples of a power of 2, few enough that every dtype holds them and float32 their sums: so both
    paths see the same maxima, and the same ties.
    """
    generator = torch.Generator().manual_seed(0)
    num_channels = case.num_max + case.num_modulus
    taps = case.in_channels * case.kernel_size**2

    def random(*shape: int, unit: float) -> Tensor:
        return torch.randint(-127, 128, shape, generator=generator).float() * unit

    x = random(IMAGES, case.in_channels, *(case.size or SIZE), unit=2.0**-7)
    shape = (num_channels, case.in_channels, case.kernel_size, case.kernel_size)
    weight = random(*shape, unit=2.0 ** (-7 - math.ceil(math.log2(taps) / 2)))
    weight_imag = weight.flip(2, 3).roll(1, 0)[: case.num_modulus]
    order = torch.randperm(num_channels, generator=generator)
    indices = (order[: case.num_max], order[case.num_max :])
    channels = Channels(*(index.sort().values.to(case.device) for index in indices))
    memory_format = torch.channels_last if case.layout == "channels_last" else torch.contiguous_format
    x = x.to(case.device).contiguous(memory_format=memory_format)
    return x, weight.to(case.device), weight_imag.to(case.device) if case.num_modulus else None, channels


def _outputs_and_gradients(
    function: Callable[..., list[Tensor]], tensors: tuple[Tensor | None, ...], grads: tuple[bool, bool]
) -> list[Tensor]:
    """The outputs, and the gradients of the images and the weights that are wanted, in float32."""
    needed = (grads[0], grads[1], grads[1])
    leaves = [t if t is None else t.detach().requires_grad_(need) for t, need in zip(tensors, needed, strict=True)]
    with torch.set_grad_enabled(any(grads)):
        outputs = function(*leaves)
    wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
    gradients = ()
    if wanted:
        generator = torch.Generator().manual_seed(1)
        upstream = [torch.randn(out.shape, generator=generator).to(out) for out in outputs]
        loss = sum((out * grad).sum() for out, grad in zip(outputs, upstream, strict=True))
        gradients = torch.autograd.grad(loss, wanted)
    return [tensor.detach().float() for tensor in (*outputs, *gradients)]


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest error over the largest value; infinite where anything is not finite."""
    if actual.shape != expected.shape or not torch.isfinite(actual).all():
        return math.inf
    size = expected.abs().max()
    return ((actual - expected).abs().max() / torch.where(size > 0, size, 1.0)).item()
