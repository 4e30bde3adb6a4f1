"""Floating-point operations of the fused stem, as `torch.utils.flop_counter` counts those of a convolution."""

from __future__ import annotations

import sys

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from mixpool.ops.fused.geometry import StemGeometry


def register_formulas() -> None:
    """Teach PyTorch's counter the operators, if it is there: it imports triton, which nobody needs who does not count.

    A counter that runs already gets them too; it took its copy of the table when it was made. (Looks into private parts
    of torch, tried with 2.14; where they are not as expected, such a counter counts 0 for these operators.)
    """
    if torch.compiler.is_compiling() or "torch.utils.flop_counter" not in sys.modules:
        return
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    formulas = {
        torch.ops.mixpool.convolve_and_pool: _forward_flops,
        torch.ops.mixpool.convolve_and_pool_backward: _backward_flops,
    }
    for operator, formula in formulas.items():
        if operator not in flop_registry:
            register_flop_formula(operator)(formula)
        for mode in _get_current_dispatch_mode_stack():
            if hasattr(mode, "counter"):
                mode.counter.flop_registry.setdefault(operator, flop_registry[operator])


def convolution_flops(x_shape, weight_shape, n_max: int, n_modulus: int, options) -> int:
    """2 per tap, position and real filter: a modulus has two filters, with blur=1 at the windows' centres only."""
    stride, padding, pool_padding, ceil_mode, blur = options
    geometry = StemGeometry(weight_shape[-1], stride, padding, pool_padding, ceil_mode, *x_shape[1:])
    positions = n_max * geometry.positions("max") + 2 * n_modulus * geometry.positions(f"modulus{blur}")
    return 2 * x_shape[0] * positions * weight_shape[1] * weight_shape[2] * weight_shape[3]


# The counter passes shapes in place of tensors.


def _forward_flops(x, weight, imag, max_index, modulus_index, *options, out_shape=None, **kwargs) -> int:
    return convolution_flops(x, weight, max_index[0], modulus_index[0], options[:5])


def _backward_flops(
    grad, grad_moments, x, weight, imag, max_index, modulus_index, argmax, moments, *options, out_shape=None, **kwargs
) -> int:
    """A convolution each for the filters' and the images' gradient; what is recomputed does not count, as in torch."""
    *geometry, with_input, with_weight = options
    return (with_input + with_weight) * convolution_flops(x, weight, max_index[0], modulus_index[0], geometry)
