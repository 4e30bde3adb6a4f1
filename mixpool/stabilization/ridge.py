"""A linear layer refitted in closed form: least squares, held to the weights that it has.

For a layer of weights W and bias b, rows u of its unfolded input and targets t, the new W', b' minimise

    sum |W' u + b' - t|^2 + ridge * m * |W' - W|^2,    m the mean of sum u_i^2 over the inputs i

group by group of a grouped convolution. Only sums over the rows are kept (float64), so memory does not grow with the
images; where there are fewer rows than unknowns (a classifier behind 7 x 7 x 512 values) the rows are kept instead and
the dual problem is solved.

Reference: layers compensated by least squares on their own inputs, as in Frantar & Alistarh, Optimal Brain Compression,
2022, arXiv 2208.11580.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixpool.filters.spectrum import pair
from mixpool.ops.geometry import Pair
from mixpool.stabilization.lowpass import DecimatingConv2d, DenseConv2d, LowPassConv2d

MAX_UNKNOWNS = 8192  # per output: their Gram matrix takes half a GiB
BIAS_RIDGE = 1e-3  # of the weights' one: the bias is nearly free
PLAIN = {nn.Conv2d, nn.Linear, LowPassConv2d, DenseConv2d, DecimatingConv2d}


class Ridge:
    """Sums of a layer's least-squares problem.

    Args:
        layer: a convolution (groups, dilation, stride) or a linear layer, to whose weights the fit is held.
        with_bias: whether an offset is fitted.
        ridge: how strongly the weights are held, as a share of the inputs' mean energy.
        num_rows: how many rows will come at most; fewer than the unknowns: the dual problem.
    """

    def __init__(self, layer: nn.Conv2d | nn.Linear, *, with_bias: bool, ridge: float, num_rows: int) -> None:
        self.layer, self.with_bias, self.ridge = layer, with_bias, ridge
        self.groups = getattr(layer, "groups", 1)
        weight = layer.weight.detach().double().cpu()
        self.weight = weight.reshape(self.groups, weight.shape[0] // self.groups, -1)  # (g, o, d)
        self.unknowns = self.weight.shape[2] + with_bias
        self.is_dual = self.unknowns > MAX_UNKNOWNS or self.unknowns > 2 * num_rows
        self.gram = self.cross = None
        self.rows: list[Tensor] = []
        self.targets: list[Tensor] = []
        self.count = 0

    def add(self, inputs: Tensor, targets: Tensor) -> None:
        """Rows of unfolded inputs, (g, n, d), and what the layer should give for them, (g, n, o)."""
        self.count += inputs.shape[1]
        if self.with_bias:
            inputs = F.pad(inputs, (0, 1), value=1.0)
        if self.is_dual:
            self.rows.append(inputs.cpu())
            self.targets.append(targets.cpu())
            return
        gram = (inputs.mT @ inputs).double().cpu()
        cross = (inputs.mT @ targets).double().cpu()
        self.gram = gram if self.gram is None else self.gram.add_(gram)
        self.cross = cross if self.cross is None else self.cross.add_(cross)

    def solve(self) -> tuple[Tensor, Tensor | None]:
        """(weight, offset) in float64: the layer's shape, and (C_out,) or None. RuntimeError if nothing was added."""
        if self.count == 0:
            raise RuntimeError("expected rows of the layer's input before the solution, got none")
        start = self.weight.mT  # (g, d, o)
        if self.with_bias:
            bias = self.layer.bias
            bias = self.weight.new_zeros(self.weight.shape[:2]) if bias is None else bias.detach().double().cpu()
            start = torch.cat([start, bias.reshape(self.groups, 1, -1)], dim=1)
        found = start + (self._dual_step(start) if self.is_dual else self._primal_step(start))
        weight = found[:, : self.weight.shape[2]].mT.reshape(self.layer.weight.shape)
        return weight, found[:, -1].reshape(-1) if self.with_bias else None

    def _held(self, diagonal: Tensor) -> Tensor:
        """(g, unknowns) what each unknown is held with, from the Gram matrices' diagonals."""
        energy = diagonal[:, : self.weight.shape[2]].mean(dim=1, keepdim=True)
        held = (self.ridge * energy).clamp_min(torch.finfo(torch.float64).tiny).expand_as(diagonal).clone()
        if self.with_bias:
            held[:, -1] = BIAS_RIDGE * self.ridge * self.count
        return held.clamp_min(1e-12 * self.count)  # dead inputs keep their weights

    def _primal_step(self, start: Tensor) -> Tensor:
        held = self._held(self.gram.diagonal(dim1=1, dim2=2))
        return torch.linalg.solve(self.gram + torch.diag_embed(held), self.cross - self.gram @ start)

    def _dual_step(self, start: Tensor) -> Tensor:
        rows, targets = (torch.cat(parts, dim=1).double() for parts in (self.rows, self.targets))
        held = self._held(rows.square().sum(dim=1))
        scaled = rows / held[:, None]
        kernel = scaled @ rows.mT + torch.eye(rows.shape[1], dtype=torch.float64)
        return scaled.mT @ torch.linalg.solve(kernel, targets - rows @ start)


def is_plain(layer: nn.Module) -> bool:
    """Whether the output is the weights times the unfolded input: no subclass, no weights made from others."""
    return type(layer) in PLAIN and isinstance(layer._parameters.get("weight"), nn.Parameter)


def num_positions(layer: nn.Module, out_shape: tuple[int, ...]) -> int:
    """Positions of the stock layer's output per image."""
    if not isinstance(layer, nn.Conv2d):
        return max(1, _rows(out_shape))
    skip = layer.stride if isinstance(layer, DenseConv2d) else (1, 1)
    return -(-out_shape[-2] // skip[0]) * -(-out_shape[-1] // skip[1])


def _rows(shape: tuple[int, ...]) -> int:
    count = 1
    for length in shape[1:-1]:
        count *= length
    return count


def rows_of(layer: nn.Conv2d | nn.Linear, x: Tensor, positions: Tensor) -> Tensor:
    """(g, n * P, d) unfolded inputs of a layer at some positions (P,) of its output, in row-major order.

    Of a dense convolution at those of the stock one, which are all that has a target.
    """
    if isinstance(layer, nn.Linear):
        return x.reshape(x.shape[0], -1, x.shape[-1])[:, positions].flatten(0, 1)[None]
    is_low_passed = isinstance(layer, LowPassConv2d) and not isinstance(layer, DenseConv2d)
    x, stride = layer.lowpassed(x) if is_low_passed else (x, layer.stride)
    windows = _windows(layer, x, stride)  # (N, C, h, w, kh, kw)
    width = windows.shape[3]
    picked = windows[:, :, positions // width, positions % width]  # (N, C, P, kh, kw)
    number, channels = picked.shape[:2]
    grouped = picked.reshape(number, layer.groups, channels // layer.groups, *picked.shape[2:])
    return grouped.permute(1, 0, 3, 2, 4, 5).reshape(layer.groups, number * len(positions), -1)


def targets_of(layer: nn.Conv2d | nn.Linear, out: Tensor, positions: Tensor) -> Tensor:
    """(g, n * P, o) outputs of a layer at the same positions."""
    if isinstance(layer, nn.Linear):
        return out.reshape(out.shape[0], -1, out.shape[-1])[:, positions].flatten(0, 1)[None]
    picked = out.flatten(2)[:, :, positions]  # (N, O, P)
    grouped = picked.reshape(len(out), layer.groups, -1, len(positions))
    return grouped.permute(1, 0, 3, 2).reshape(layer.groups, len(out) * len(positions), -1)


def _windows(conv: nn.Conv2d, x: Tensor, stride: Pair) -> Tensor:
    """A view of the input's windows, none of them copied."""
    if conv.padding == "same" or conv.padding_mode != "zeros":
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        x = F.pad(x, conv._reversed_padding_repeated_twice, mode=mode)
    elif conv.padding != "valid":
        (top, left) = pair(conv.padding)
        x = F.pad(x, (left, left, top, top))
    sizes = [
        (length - dilation * (kernel - 1) - 1) // step + 1
        for length, dilation, kernel, step in zip(x.shape[2:], conv.dilation, conv.kernel_size, stride, strict=True)
    ]
    n, c, h, w = x.stride()
    steps = (n, c, h * stride[0], w * stride[1], h * conv.dilation[0], w * conv.dilation[1])
    return x.as_strided((*x.shape[:2], *sizes, *conv.kernel_size), steps, x.storage_offset())
