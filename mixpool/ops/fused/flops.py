"""Floating-point operations of the fused stem, as `torch.utils.flop_counter` counts those of a convolution.

Import this module before a counter is made: that registers the formulas. Nothing of the package does it by itself,
since torch's counter imports triton, which nobody needs who does not count.
"""

from __future__ import annotations

import torch
from torch.utils.flop_counter import register_flop_formula

import mixpool.ops.fused.ops  # noqa: F401  (the operators)
from mixpool.ops.fused.geometry import StemGeometry

# The counter passes shapes in place of tensors.


@register_flop_formula(torch.ops.mixpool.convolve_and_pool)
def forward_flops(x, weight, imag, max_index, modulus_index, *options, out_shape=None, **kwargs) -> int:
    return _convolution_flops(x, weight, max_index[0], modulus_index[0], options[:5])


@register_flop_formula(torch.ops.mixpool.convolve_and_pool_backward)
def backward_flops(
    grad, grad_moments, x, weight, imag, max_index, modulus_index, argmax, moments, *options, out_shape=None, **kwargs
) -> int:
    """A convolution each for the filters' and the images' gradient; what is recomputed does not count, as in torch."""
    *geometry, with_input, with_weight = options
    return (with_input + with_weight) * _convolution_flops(x, weight, max_index[0], modulus_index[0], geometry)


def _convolution_flops(x_shape, weight_shape, n_max: int, n_modulus: int, options) -> int:
    """2 per tap, position and real filter: a modulus has two filters, with blur=1 at the windows' centres only."""
    stride, padding, pool_padding, ceil_mode, blur = options
    geometry = StemGeometry(weight_shape[-1], stride, padding, pool_padding, ceil_mode, *x_shape[1:])
    positions = n_max * geometry.positions("max") + 2 * n_modulus * geometry.positions(f"modulus{blur}")
    return 2 * x_shape[0] * positions * weight_shape[1] * weight_shape[2] * weight_shape[3]
