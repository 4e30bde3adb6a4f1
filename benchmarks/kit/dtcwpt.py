"""The 2-D dual-tree complex wavelet packet transform of images, with the filters of `mixpool.filters.packets`.

At the default stride 2**J, and with circular padding of sides divisible by it, the transform is a tight frame of bound
1: image and coefficients have the same energy. At the stride 2**(J - 1) the coefficients have four times as much.

Legend: J depth, P = 2**J packets per axis, n = 2 * P * P complex packets, k taps per side, N C H W images.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixpool.filters.packets import dtcwpt_filters

PADDING_MODES = ("symmetric", "circular")


class DTCWPT(nn.Module):
    """All packets of `dtcwpt_filters` by separable filtering: (N, C, H, W) real -> (N, C, n, H', W') complex.

    Equal to `conv2d(x, kernels, stride=stride)` of the image extended by k // 2 pixels on each side; so H' is
    ceil(H / stride), and the kernels' centre for output (y, x) is pixel (y * stride, x * stride). A kernel's energy is
    centred there up to 0.3, 1.5 and 3.6 pixels per axis at depths 2, 3 and 4: q-shift filters have no linear phase.

    Each axis is one convolution with the equivalent filters of all its packets: on the CPU 3 to 8 times faster than
    level by level, where every filter is short. The three pairs of packets next to (0, 0) are the six sub-bands of the
    dual-tree wavelet transform. On CUDA, float32 is as precise as cuDNN's switch for TF32 says.

    Args:
        depth: levels J, 1 to 4.
        wavelet: as for `dtcwpt_filters`.
        stride: 2**depth (default), or 2**(depth - 1): the last level is not decimated.
        padding_mode: "symmetric" mirrors the image about its border (the edge pixels are repeated), "circular" wraps
            it; both work for images of any size, also smaller than the kernel.
    Raises:
        ValueError: an argument is out of range; forward: `x` is no real floating-point (N, C, H, W) with pixels.
    Example:
        >>> from benchmarks.kit.dtcwpt import DTCWPT
        >>> tuple(DTCWPT(2)(torch.randn(1, 3, 32, 30)).shape)
        (1, 3, 32, 8, 8)
    """

    def __init__(
        self, depth: int, wavelet: str = "qshift_a", stride: int | None = None, padding_mode: str = "symmetric"
    ) -> None:
        super().__init__()
        trees = _trees(depth, wavelet)
        stride = 2**depth if stride is None else stride
        if stride not in (2**depth, 2 ** (depth - 1)):
            raise ValueError(f"expected a stride of {2**depth} or {2 ** (depth - 1)} at depth {depth}, got {stride=}")
        if padding_mode not in PADDING_MODES:
            raise ValueError(f"expected a padding_mode of {PADDING_MODES}, got {padding_mode!r}")
        self.depth, self.wavelet, self.stride, self.padding_mode = depth, wavelet, int(stride), padding_mode
        self.register_buffer("trees", torch.tensor(trees), persistent=False)  # (P, 2, k)

    def _apply(self, fn, recurse: bool = True) -> DTCWPT:
        super()._apply(fn, recurse)
        # The taps follow the module's device but stay exact: the input decides the precision.
        self.trees = torch.tensor(_trees(self.depth, self.wavelet), device=self.trees.device)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, n, H', W') complex64, complex128 for float64; half inputs and autocast compute in float32."""
        if not isinstance(x, Tensor) or x.ndim != 4 or not x.is_floating_point() or 0 in x.shape[2:]:
            got = f"{tuple(x.shape)} {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"expected a real floating-point image batch (N, C, H, W), got {got}")
        with torch.autocast(x.device.type, enabled=False):
            x = x if x.dtype == torch.float64 else x.float()
            first, second = trees = self.trees.to(x.dtype).unbind(dim=1)  # (P, k) each
            packets, taps = first.shape
            along_y = torch.stack(trees, dim=1).reshape(2 * packets, 1, taps, 1)
            # (first_y + i second_y) (first_x + i second_x), then the same with first_x - i second_x: real, imaginary.
            along_x = torch.stack([first, -second, second, first, first, second, -second, first], dim=1)
            along_x = along_x.reshape(4 * packets, 2, 1, taps)

            batch, channels = x.shape[:2]
            x = self._extend(x, dim=2).flatten(0, 1)[:, None]  # (N*C, 1, H + k - 1, W)
            x = F.conv2d(x, along_y, stride=(self.stride, 1))  # (N*C, P*2, H', W)
            x = self._extend(x, dim=3).unflatten(1, (packets, 2)).flatten(0, 1)  # (N*C*P, 2, H', W + k - 1)
            x = F.conv2d(x, along_x, stride=(1, self.stride))  # (N*C*P, P*2*2, H', W')
            x = x.reshape(batch, channels, 2 * packets**2, 2, *x.shape[-2:])
            return torch.complex(x[:, :, :, 0], x[:, :, :, 1])

    def _extend(self, x: Tensor, dim: int) -> Tensor:
        """Image with k // 2 more pixels on both sides along one axis, however small it is."""
        size, margin = x.shape[dim], self.trees.shape[-1] // 2
        index = torch.arange(-margin, size + margin, device=x.device)
        if self.padding_mode == "circular":
            index = index.remainder(size)
        else:
            index = index.remainder(2 * size)
            index = torch.minimum(index, 2 * size - 1 - index)
        return x.index_select(dim, index)

    def extra_repr(self) -> str:
        return f"{self.depth}, {self.wavelet!r}, stride={self.stride}, padding_mode={self.padding_mode!r}"


def _trees(depth: int, wavelet: str) -> np.ndarray:
    """(P, 2, k) float64: the 1-D packets in both real trees."""
    axis_kernels = dtcwpt_filters(depth, wavelet).axis_kernels.numpy()
    return np.stack([axis_kernels.real, axis_kernels.imag], axis=1)
