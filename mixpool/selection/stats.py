"""FilterStats: the numbers that describe a convolution's filters, and what their poolings will do on photographs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from mixpool.filters.spectrum import (
    bandwidth,
    center_frequency,
    check_weight,
    concentration,
    dc_share,
    orientation,
    pair,
    power_spectrum,
)
from mixpool.selection.compare import PoolingStats
from mixpool.selection.predict import predict


@dataclass(frozen=True, eq=False)
class FilterStats:
    """The numbers that describe each filter of a convolution. All tensors are on the CPU.

    What is named `predicted_` is computed when it is first asked for (half a second for 64 filters of 7x7 at stride 2):
    the filter's poolings on synthetic pictures stand for those on photographs, see `selection.predict`; the exact
    definitions are in `selection.compare`. NaN for a zero filter. RMax is the maximum of the real response over the
    window, CMod the modulus of W + iV with the tied partner V, blur 1 or 3 as in MixPoolStem.

    Attributes:
        center_frequency: (C, 2) float64, (fy, fx) in radians per pixel, in the half plane fy > 0 (or fy = 0, fx > 0).
        bandwidth: (C,) rms distance of the half-plane energy from the centre frequency, radians per pixel.
        concentration: (C,) largest share of the half-plane energy inside a square of side pi / stride, in [0, 1].
        dc_share: (C,) energy at zero frequency over the peak energy, in [0, 1]; 1 for a low-pass filter.
        stride: pixels per step of the convolution, (y, x).
        weight: (C, I, kH, kW) float64, the filters themselves.
        window: positions of the convolution per axis under one pooling window, 2 or 3.
    """

    center_frequency: Tensor
    bandwidth: Tensor
    concentration: Tensor
    dc_share: Tensor
    stride: tuple[int, int]
    weight: Tensor
    window: int = 3

    @property
    def kernel_size(self) -> tuple[int, int]:
        """(kH, kW)."""
        return tuple(self.weight.shape[-2:])

    @property
    def frequency(self) -> Tensor:
        """(C,) modulus of the centre frequency, radians per pixel."""
        return self.center_frequency.norm(dim=1)

    @property
    def orientation(self) -> Tensor:
        """(C,) angle of the centre frequency, atan2(fy, fx) mod pi, radians in [0, pi)."""
        return orientation(self.center_frequency)

    @property
    def phase_step(self) -> Tensor:
        """(C,) modulus of stride * centre frequency: radians per step of the convolution (the theory's omega)."""
        return (self.center_frequency * self.center_frequency.new_tensor(self.stride)).norm(dim=1)

    @property
    def relative_bandwidth(self) -> Tensor:
        """(C,) bandwidth over the half side pi / (2 stride) of the theory's largest support; below 1 is narrow."""
        return self.bandwidth * max(self.stride) * 2 / math.pi

    @cached_property
    def predicted(self) -> PoolingStats:
        """All predictions, float64; the instabilities (1, C) for a shift of one pixel to the side."""
        return predict(self.weight, self.stride, window=self.window)

    @property
    def predicted_correlation_blur3(self) -> Tensor:
        """(C,) Pearson correlation of CMod at blur 3 with RMax."""
        return self.predicted.correlation_blur3

    def __len__(self) -> int:
        return len(self.bandwidth)


def analyze(
    conv_or_weight: nn.Module | Tensor, stride: int | Sequence[int] | None = None, *, window: int = 3
) -> FilterStats:
    """Measure every filter of a convolution, from its weights alone.

    Args:
        conv_or_weight: a module with a 4-D `weight` (its `stride` is used), or the weight itself, (C, I, kH, kW).
        stride: pixels per step of the convolution; overrides the module's; 1 for a bare weight.
        window: positions per axis of the pooling window that follows, 2 or 3; only the predictions depend on it.
    Returns:
        FilterStats, detached, on the CPU, in float64.
    Raises:
        ValueError: the weight is not a finite floating-point (C, I, kH, kW) tensor, or the stride is not positive.
    Example:
        >>> stats = analyze(torch.nn.Conv2d(3, 64, 7, stride=2))
        >>> tuple(stats.center_frequency.shape)
        (64, 2)
    """
    weight = conv_or_weight
    if isinstance(conv_or_weight, nn.Module):
        weight = getattr(conv_or_weight, "weight", None)
        if not isinstance(weight, Tensor):
            raise ValueError(f"expected a convolution with a weight, got {type(conv_or_weight).__name__}")
        stride = getattr(conv_or_weight, "stride", 1) if stride is None else stride
    stride = pair(1 if stride is None else stride)
    if min(stride) < 1:
        raise ValueError(f"expected a positive stride, got {stride}")
    if window not in (2, 3):
        raise ValueError(f"expected a pooling window of 2 or 3, got {window!r}")
    weight = check_weight(weight).detach().to("cpu", torch.float64)
    if not torch.isfinite(weight).all():
        raise ValueError("expected finite weights, got NaN or infinity in the convolution's weight")
    power = power_spectrum(weight)
    frequency = center_frequency(weight, power=power)
    return FilterStats(
        center_frequency=frequency,
        bandwidth=bandwidth(weight, frequency, power=power),
        concentration=concentration(weight, stride, frequency, power=power),
        dc_share=dc_share(weight, power=power),
        stride=stride,
        weight=weight,
        window=window,
    )
