"""Layers of stride 2 with a low-pass before they decimate, in the place, the class and the keys of the stock layers.

    LowPassConv2d     binomial low-pass, then the stock convolution
    DenseConv2d       the stock convolution at every position; those that read it are DecimatingConv2d:
    DecimatingConv2d  binomial low-pass at the stride that was left out, then the stock convolution
    LowPassMaxPool2d  maxima at every position, then the binomial low-pass at the stock stride (BlurPool's order)
    FieldMaxPool2d    the same behind a DenseConv2d: maxima over all positions of the stock window's field

A layer is treated by giving the module another class, as torch's parametrisations do: parameters, buffers, hooks, keys
and everybody's references stay. Nothing is added to the state.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixpool.filters.spectrum import pair
from mixpool.ops.geometry import Pair, PoolGeometry
from mixpool.ops.modes import in_functorch, is_eager
from mixpool.ops.reference import dense_max_pool


def binomial(x: Tensor, axes: Pair = (2, 2), stride: Pair = (2, 2)) -> Tensor:
    """[1 2 1] / 4 along some axes, then every `stride`-th value from the first; beyond the border its values repeat.

    Args:
        x: (N, C, H, W), any float dtype, any strides.
        axes: (y, x), 2 along an axis with the low-pass, 1 along one without.
        stride: (y, x), 1 or 2.
    Returns:
        (N, C, ceil(H / stride), ceil(W / stride)).
    """
    if x.device.type == "cpu" and is_eager() and x.is_contiguous() and x.numel():
        # Average pools of NCHW maps take several times as long there.
        kernel = x.new_ones((1, 1, 1, 1))
        for size, axis in zip(axes, (2, 3), strict=True):
            taps = x.new_tensor([0.25, 0.5, 0.25] if size == 2 else [1.0])
            kernel = kernel * taps.view([-1 if i == axis else 1 for i in range(4)])
        padded = F.pad(x, (axes[1] - 1, axes[1] - 1, axes[0] - 1, axes[0] - 1), mode="replicate")
        return F.conv2d(padded, kernel.expand(x.shape[1], -1, -1, -1), stride=stride, groups=x.shape[1])
    # Two means of two neighbours each; the border's own values are means of themselves. Exporters know average pools.
    padding = (axes[0] - 1, axes[1] - 1)
    means = F.avg_pool2d(x, axes, 1, padding, count_include_pad=False)
    return F.avg_pool2d(means, axes, stride)


class LowPassConv2d(nn.Conv2d):
    """A convolution of stride 2 whose input is low-passed along the axes of stride 2."""

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, torch.fx.Proxy):
            return _one_node(self, x)
        x, stride = self.lowpassed(x)
        return self._at_stride(x, stride)

    def lowpassed(self, x: Tensor) -> tuple[Tensor, Pair]:
        """What the stock convolution sees, and the stride that is left for it."""
        if self.kernel_size == (1, 1) and self.padding == (0, 0):  # it sees every second position alone
            return binomial(x, self.stride, self.stride), (1, 1)
        return binomial(x, self.stride, (1, 1)), self.stride

    def _at_stride(self, x: Tensor, stride: Pair) -> Tensor:
        padding = self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode), (0, 0)
        return F.conv2d(x, self.weight, self.bias, stride, padding, self.dilation, self.groups)


class DenseConv2d(LowPassConv2d):
    """A convolution of stride 2 that is computed at every position; its readers decimate."""

    def lowpassed(self, x: Tensor) -> tuple[Tensor, Pair]:
        return x, (1, 1)


class DecimatingConv2d(LowPassConv2d):
    """A convolution of stride 1 that reads a dense map: it low-passes and decimates it first."""

    def lowpassed(self, x: Tensor) -> tuple[Tensor, Pair]:
        return binomial(x), self.stride


class LowPassMaxPool2d(nn.MaxPool2d):
    """Max pooling of stride 2 in BlurPool's order."""

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, torch.fx.Proxy):
            return _one_node(self, x)
        size, stride, padding = pair(self.kernel_size), pair(self.stride), pair(self.padding)
        geometry = PoolGeometry(size, stride, padding, self.ceil_mode)
        if torch.compiler.is_exporting() or torch.jit.is_tracing() or in_functorch():
            dense = F.max_pool2d(_with_hanging_windows(x, geometry), size, 1, padding)
        else:
            dense = dense_max_pool(x, geometry)
        return binomial(dense, stride, stride)


def _one_node(layer: nn.Module, x: torch.fx.Proxy) -> torch.fx.Proxy:
    """In any symbolic trace, as torch's own layers are."""
    return x.tracer.create_proxy("call_module", x.tracer.path_of_module(layer), (x,), {})


class FieldMaxPool2d(LowPassMaxPool2d):
    """Max pooling of stride 2 behind a convolution of stride 2 that is computed at every position.

    A stock window of k positions, 2 pixels apart, becomes one of 2k - 1 that are 1 pixel apart: the same field, with
    what lies between. The windows stand where LowPassMaxPool2d's stand, and the low-pass is the same.
    """

    def forward(self, x: Tensor) -> Tensor:
        size, stride, padding = pair(self.kernel_size), pair(self.stride), pair(self.padding)
        geometry = PoolGeometry(size, stride, padding, self.ceil_mode)
        lengths = tuple((length + 1) // 2 for length in x.shape[-2:])  # of the stock map
        pads = []
        for length, own, out, k, step, pad in zip(
            x.shape[-2:], lengths, geometry.output_size(*lengths), size, stride, padding, strict=True
        ):
            count = own + 2 * pad - k + 1  # of the stock windows at every position
            if self.ceil_mode:
                count = max(count, step * (out - 1) + 1)
            pads.append((2 * pad, 2 * (count - 1) + 2 * k - 1 - 2 * pad - length))
        (top, bottom), (left, right) = pads
        x = F.pad(x, (left, right, top, bottom), value=float("-inf"))
        return binomial(F.max_pool2d(x, (2 * size[0] - 1, 2 * size[1] - 1), 2), stride, stride)


def _with_hanging_windows(x: Tensor, pool: PoolGeometry) -> Tensor:
    """With ceil_mode, one more row and column of nothing where the last window hangs over the border."""
    if not pool.ceil_mode:
        return x
    height, width = x.shape[-2:]
    out = pool.output_size(height, width)
    below, right = (
        max((n - 1) * stride + size - 2 * padding - length, 0)
        for n, stride, size, padding, length in zip(out, pool.stride, pool.size, pool.padding, (height, width))
    )
    return F.pad(x, (0, right, 0, below), value=float("-inf"))
