"""The modules of a stock stem: which of them a MixPoolStem can take over, and what it has to know of them."""

from __future__ import annotations

import copy
from collections import OrderedDict

from torch import nn

from mixpool.filters.spectrum import pair
from mixpool.ops.geometry import PoolGeometry
from mixpool.ops.norm import is_supported_norm

# Activations that never decrease, so that they commute with a maximum.
_INCREASING_ACTIVATIONS = (
    nn.Identity,
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.ELU,
    nn.CELU,
    nn.SELU,
    nn.Hardtanh,
    nn.Softplus,
    nn.Sigmoid,
    nn.Tanh,
)


def pool_geometry(pool: nn.MaxPool2d) -> PoolGeometry:
    """The geometry of an nn.MaxPool2d, as pairs."""
    return PoolGeometry(
        pair(pool.kernel_size),
        pair(pool.stride if pool.stride is not None else pool.kernel_size),
        pair(pool.padding),
        pool.ceil_mode,
    )


def check_parts(conv: nn.Module, norm: nn.Module | None, act: nn.Module, pool: nn.Module) -> None:
    """Raise ValueError naming the first part of a stem that a MixPoolStem cannot take over."""
    if type(conv) is not nn.Conv2d:
        raise ValueError(f"expected the convolution to be an nn.Conv2d, got {describe(conv)}")
    check_plain(conv, "the convolution")
    if conv.groups != 1 or conv.padding_mode != "zeros":
        raise ValueError(f"expected groups=1 and zero padding, got {conv.groups=} and {conv.padding_mode=}")
    if conv.padding == "same":
        raise ValueError('expected numbers as the convolution\'s padding, got "same"')
    check_norm(norm, conv.out_channels)
    if norm is not None:
        check_plain(norm, "the norm layer")
    check_act(act)
    if type(pool) is not nn.MaxPool2d:
        raise ValueError(f"expected the pooling to be an nn.MaxPool2d, got {describe(pool)}")
    if pair(pool.dilation) != (1, 1) or pool.return_indices:
        raise ValueError(f"expected a max pool with dilation=1 and return_indices=False, got {pool}")


def check_plain(module: nn.Module, name: str) -> None:
    """Raise ValueError if a weight or bias is computed from others each time the module is called."""
    for part in ("weight", "bias"):
        is_plain = part in module._parameters or part in module._buffers
        if not is_plain and getattr(module, part, None) is not None:
            raise ValueError(
                f"expected {name}'s {part} to be a plain parameter, got one that is computed (weight norm, spectral "
                "norm or pruning): make it permanent first"
            )


def check_norm(norm: nn.Module | None, num_channels: int) -> None:
    """Raise ValueError naming a norm layer that is none of those whose affine map is known."""
    if norm is None:
        return
    if not is_supported_norm(norm):
        raise ValueError(f"expected a batch norm of torch, torchvision or timm, got {describe(norm)}")
    channels = getattr(norm, "num_features", None) or len(norm.weight)
    if channels != num_channels:
        raise ValueError(f"expected a norm layer of {num_channels} channels, got {norm}")


def check_act(act: nn.Module) -> None:
    """Raise ValueError naming an activation that may decrease."""
    increasing = type(act) in _INCREASING_ACTIVATIONS and getattr(act, "negative_slope", 0) >= 0
    if not increasing or any(getattr(act, name, 1) < 0 for name in ("alpha",)):
        raise ValueError(
            f"expected an increasing activation such as ReLU (it has to commute with a maximum), got {describe(act)}"
        )


def without_hooks(act: nn.Module) -> nn.Module:
    """The activation, or a copy of it if it has hooks: the stem calls it on parts of its output."""
    names = [name for name in vars(act) if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called"))]
    if any(getattr(act, name) for name in names):
        act = copy.copy(act)
        for name in names:
            setattr(act, name, OrderedDict())
    return act


def describe(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"
