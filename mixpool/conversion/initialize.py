"""Wavelet and Gabor first layers for training from scratch: the twin of Leterme et al. (arXiv 2212.00394, "paper 2").

In the twin, half of the channels or fewer are complex wavelet packets of a colour mix and pool by their modulus; the
others are trained freely and pool by their maximum. Here three quarters of a ResNet's are packets, and the maxima are
blurred too. `initialize` does that to a model; the filters are those of `wavelet_bank`.

Legend: J depth of the packets, k taps per side, C_in input channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mixpool.conversion.convert import check_model, convert
from mixpool.conversion.find import find_stem
from mixpool.conversion.report import ConversionReport
from mixpool.filters.gabor import COLOR_SHARE, FREQUENCIES, gabor_bank
from mixpool.filters.spectrum import pair
from mixpool.filters.wavelets import max_channels, wavelet_bank
from mixpool.ops.modes import of_nobody
from mixpool.ops.reference import POOLINGS, check_poolings
from mixpool.ops.renamed import refuse_old
from mixpool.stem.parts import check_parts

# The packets are decimated by 2**J in all, so the convolution's stride is half of that and max pooling's is 2.
DEPTH_OF_STRIDE = {2: 2, 4: 3}
# At stride 2 more than the 24 of 64 of paper 2's twin of ResNet, since they did better on CIFAR-10
# (benchmarks/cifar10/README.md); at stride 4 the 32 of 64 of its twin of AlexNet.
SHARE_OF_STRIDE = {2: 3 / 4, 4: 1 / 2}


def initialize(
    model: nn.Module,
    bank: str | Tensor = "wavelet",
    *,
    num_channels: int | None = None,
    kernel_size: int | None = None,
    pooling: str = "modulus",
    rest: str | None = None,
    stem: str | None = None,
    backend: str = "auto",
    **old: Any,
) -> ConversionReport:
    """Give an untrained model's stem a bank of oriented filters that pool by the modulus, in place, all or nothing.

    The last `num_channels` channels of the first convolution take the bank's filters and the modulus; the others keep
    their own random weights and pool as in BlurPool (`rest`). Then the model is converted as by `convert`, whose notes
    hold here too (build the optimizer, compile and wrap afterwards; `revert` takes the stem out again).

    Scale: every filter gets the root mean square norm of the convolution's own filters, so that weight decay, learning
    rates and the response to white noise stay those of the model's initialisation. Where no norm layer follows, photos
    matter: over 24 of ImageNet the gray wavelet channels' outputs have 0.7 (ResNet-18) and 1.3 (AlexNet) times the rms
    of the max channels', from 0.3 for the highest frequency to 2.5 for the lowest; opponent colours have 0.05 to 0.25.

    Args:
        model: a timm, torchvision or own model with a stem as `convert` knows them, stride 2 or 4.
        bank: "wavelet" (`wavelet_bank`, depth 2 at stride 2 and 3 at stride 4), "gabor" (`gabor_bank`: the waves that
            are fast at this stride, one phase each), or filters of your own, (num_channels, C_in, k, k).
        num_channels: channels that the bank fills; default 3/4 of them at stride 2 and half at stride 4, or all
            wavelets that there are, if those are fewer (16 of gray images, 80 of colour images at stride 2).
        kernel_size: taps of the convolution, default its own; more taps hold more of a packet (9 at depth 2 and 17 at
            depth 3 keep over 95 % of its energy, the stock 7 and 11 keep 93 % and 80 %) and cost in proportion to
            their square. The output size stays: the padding grows too, and the other filters are continued by zeros.
            Then `weight` is a new parameter, else it is the same one.
        pooling: of the bank's channels: "modulus", "energy" or "cmod" as for `convert`; "max" or "blurpool" for all
            channels is the real-valued twin, as a control.
        rest: of the others, as for `convert`, but the default is "blurpool" beside a complex pooling: there are no
            trained layers behind the stem that expect anything else.
        stem, backend: as for `convert`. Paper 2's CMod is pooling="cmod", rest="max".
    Returns:
        ConversionReport.
    Raises:
        ValueError: (StemError) the model has no such stem or is converted already; or an argument does not fit. The
            model is then as it was.
    Reference: Leterme et al., arXiv 2212.00394.
    Example:
        >>> import torchvision
        >>> model = torchvision.models.alexnet()
        >>> initialize(model, "wavelet").num_complex
        32
    """
    refuse_old("initialize", old)
    check_poolings(pooling, 1)
    is_complex = POOLINGS[pooling].is_complex
    check_model(model, stem)
    if rest is None:
        rest = "blurpool" if is_complex else pooling
    found = find_stem(model, stem)
    conv = found.modules[found.conv]
    norm = None if found.norm is None else found.modules[found.norm]
    check_parts(conv, norm, found.act_module, found.modules[found.pool])
    bank = _bank_for(conv, bank, num_channels, kernel_size)
    with _filled(conv, bank):
        options = {"rest": rest, "stem": stem, "backend": backend}
        if not is_complex:
            return convert(model, select="none", **options)
        select = [channel >= conv.out_channels - len(bank) for channel in range(conv.out_channels)]
        return convert(model, select=select, pooling=pooling, **options)


@of_nobody()
def _bank_for(conv: nn.Conv2d, bank: str | Tensor, num_channels: int | None, kernel_size: int | None) -> Tensor:
    """(n, C_in, k, k) filters, from a name or as they were given."""
    if isinstance(bank, Tensor):
        if num_channels not in (None, len(bank)) or kernel_size not in (None, bank.shape[-1]):
            raise ValueError(f"expected num_channels and kernel_size of the bank, got {num_channels=}, {kernel_size=}")
        return bank
    if bank not in ("wavelet", "gabor"):
        raise ValueError(f'expected a bank of "wavelet", "gabor" or filters, got {bank!r}')
    taps, stride = _square(conv)
    kernel_size = taps if kernel_size is None else kernel_size
    count = _default_count(conv, stride) if num_channels is None else num_channels
    if bank == "gabor":
        return _gabor_modulus_bank(count, conv.in_channels, kernel_size, stride)
    if num_channels is None:
        count = min(count, max_channels(conv.in_channels, kernel_size, _depth_of(stride)))
    return wavelet_bank(count, conv.in_channels, kernel_size, _depth_of(stride))


@contextmanager
def _filled(conv: nn.Conv2d, bank: Tensor) -> Iterator[None]:
    """Write a bank into the last channels of a convolution, enlarging it if need be; undone if the body raises."""
    taps, _ = _square(conv)
    size = bank.shape[-1]
    if bank.ndim != 4 or bank.shape[1:] != (conv.in_channels, size, size) or not 1 <= len(bank) <= conv.out_channels:
        raise ValueError(
            f"expected 1 to {conv.out_channels} filters of shape ({conv.in_channels}, k, k), got {tuple(bank.shape)}"
        )
    margin, odd = divmod(size - taps, 2)
    if margin < 0 or odd:
        raise ValueError(f"expected a kernel_size of {taps}, {taps + 2}, {taps + 4}, ..., got {size}")
    parameter, geometry = conv.weight, (conv.kernel_size, conv.padding)
    if parameter.is_meta:
        raise ValueError("expected a convolution with initial weights, whose norm the bank takes; got a meta tensor")
    with of_nobody():
        before = parameter.detach().clone()
        norms = before.double().flatten(1).norm(dim=1)
        scale = norms.square().mean().sqrt()
        if not scale > 0:
            raise ValueError("expected a convolution with initial weights, whose norm the bank takes; got zeros or NaN")
        bank = bank.detach().to(before.device, torch.float64)
        if not (bank.flatten(1).norm(dim=1) > 0).all():
            raise ValueError("expected a bank of finite filters, none of them zero")
        weight = nn.functional.pad(before, (margin,) * 4)
        weight[-len(bank) :] = bank * (scale / bank.flatten(1).norm(dim=1))[:, None, None, None]
        enlarged = nn.Parameter(weight, requires_grad=parameter.requires_grad)
    try:
        if margin == 0:
            conv.weight.data.copy_(weight)
        else:
            padding = (0, 0) if conv.padding == "valid" else pair(conv.padding)
            conv.weight = enlarged
            conv.kernel_size = (size, size)
            conv.padding = tuple(p + margin * d for p, d in zip(padding, conv.dilation, strict=True))
        yield
    except BaseException:
        parameter.data.copy_(before)
        conv.weight = parameter
        conv.kernel_size, conv.padding = geometry
        raise


def _square(conv: nn.Conv2d) -> tuple[int, int]:
    """(taps per side, stride) of a convolution that has one of each."""
    (taps, width), (stride, stride_x) = pair(conv.kernel_size), pair(conv.stride)
    if taps != width or stride != stride_x:
        raise ValueError(f"expected a square kernel and one stride, got {conv.kernel_size=}, {conv.stride=}")
    return taps, stride


def _depth_of(stride: int) -> int:
    if stride not in DEPTH_OF_STRIDE:
        raise ValueError(f"expected a convolution of stride 2 (depth 2) or 4 (depth 3), got {stride=}")
    return DEPTH_OF_STRIDE[stride]


def _default_count(conv: nn.Conv2d, stride: int) -> int:
    if stride not in SHARE_OF_STRIDE:
        raise ValueError(f"expected the number of channels for a convolution of stride {stride}, got none")
    return max(1, round(conv.out_channels * SHARE_OF_STRIDE[stride]))


def _gabor_modulus_bank(num_channels: int, in_channels: int, kernel_size: int, stride: int) -> Tensor:
    """(num_channels, I, k, k) waves of `gabor_bank` that suit the modulus at this stride."""
    # Its two lowest rings stay on max pooling at stride 2; what counts is the phase per step of the convolution.
    frequencies = [frequency * 2 / stride for frequency in FREQUENCIES[2:]]
    num_color = round(num_channels * COLOR_SHARE)
    both_phases = gabor_bank(
        2 * num_channels,
        in_channels,
        kernel_size,
        frequencies=frequencies,
        color_share=num_color / num_channels,
        blob_share=0.0,
    )
    return both_phases[::2]  # the modulus of a wave does not depend on its phase
