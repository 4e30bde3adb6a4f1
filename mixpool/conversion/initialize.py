"""Wavelet and Gabor first layers for training from scratch: the twin of Leterme et al. (arXiv 2212.00394, "paper 2").

In the twin, half of the channels or fewer are complex wavelet packets of a colour mix and pool by their modulus; the
others are trained freely and pool by their maximum. Here three quarters of a ResNet's are packets, and the maxima are
blurred too. `initialize` does that to a model, `wavelet_stem` to the parts of a stem; the filters are those of
`wavelet_bank`.

Legend: J depth of the packets, k taps per side, C_in input channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mixpool.conversion.convert import convert
from mixpool.conversion.find import StemError, find_stem
from mixpool.conversion.report import ConversionReport
from mixpool.conversion.stock import converted_stems
from mixpool.filters.gabor import COLOR_SHARE, FREQUENCIES, gabor_bank
from mixpool.filters.spectrum import pair
from mixpool.filters.wavelets import max_channels, wavelet_bank
from mixpool.stem.module import MixPoolStem
from mixpool.stem.parts import check_parts

# The packets are decimated by 2**J in all, so the convolution's stride is half of that and max pooling's is 2.
DEPTH_OF_STRIDE = {2: 2, 4: 3}
# At stride 2 more than the 24 of 64 of paper 2's twin of ResNet, since they did better on CIFAR-10
# (benchmarks/README.md); at stride 4 the 32 of 64 of its twin of AlexNet.
SHARE_OF_STRIDE = {2: 3 / 4, 4: 1 / 2}
POOLINGS = ("modulus", "max")


def wavelet_stem(
    conv: nn.Conv2d,
    norm: nn.Module | None = None,
    act: nn.Module | None = None,
    pool: nn.MaxPool2d | None = None,
    *,
    num_wavelet: int | None = None,
    depth: int | None = None,
    kernel_size: int | None = None,
    wavelet: str = "qshift_a",
    color_mix: Tensor | None = None,
    trainable: bool = True,
    blur: int = 3,
    max_blur: int = 3,
    imag: str = "tied",
    backend: str = "auto",
) -> MixPoolStem:
    """A MixPoolStem whose last channels are wavelet packets on the modulus; the first keep the convolution's weights.

    `conv` is changed in place, as `initialize` describes. `initialize` does this to a whole model.

    Args:
        conv, norm, act, pool, blur, max_blur, imag, backend: as for MixPoolStem; the convolution has a square kernel.
        num_wavelet: number of wavelet channels; default 3/4 of them at stride 2 and half of them at stride 4, or all
            that `wavelet_bank` has, if that is fewer.
        depth: levels J; default 2 at stride 2 and 3 at stride 4, so that 2**J is the total stride.
        kernel_size: as for `initialize`.
        wavelet, color_mix: as for `wavelet_bank`.
        trainable: as for `initialize`.
    Raises:
        ValueError: an argument is out of range or a part cannot be taken over; `conv` is then as it was.
    Reference: Leterme et al., arXiv 2212.00394; its CMod is blur=1, max_blur=1, with num_wavelet=24 in a ResNet.
    Example:
        >>> stem = wavelet_stem(nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU())
        >>> stem.num_modulus, tuple(stem(torch.randn(2, 3, 224, 224)).shape)
        (48, (2, 64, 56, 56))
    """
    _check_imag(trainable, imag)
    check_parts(conv, norm, nn.ReLU() if act is None else act, nn.MaxPool2d(3, 2, 1) if pool is None else pool)
    taps, stride = _square(conv)
    is_given = num_wavelet is not None or color_mix is not None
    num_wavelet = _default_count(conv, stride) if num_wavelet is None else num_wavelet
    depth = _depth_of(stride) if depth is None else depth
    kernel_size = taps if kernel_size is None else kernel_size
    if not is_given:
        num_wavelet = min(num_wavelet, max_channels(conv.in_channels, kernel_size, depth))
    bank = wavelet_bank(num_wavelet, conv.in_channels, kernel_size, depth, wavelet=wavelet, color_mix=color_mix)
    kernels = None if trainable else _spatial_part(bank)
    with _filled(conv, bank):
        select = _last(conv, len(bank))
        options = {"blur": blur, "max_blur": max_blur, "imag": imag, "backend": backend}
        stem = MixPoolStem(conv, norm, act, pool, select=select, **options)
    if kernels is not None:
        parametrize.register_parametrization(stem, "weight", _ColorMixed(kernels.to(stem.weight)))
    return stem


def initialize(
    model: nn.Module,
    bank: str | Tensor = "wavelet",
    *,
    num_channels: int | None = None,
    kernel_size: int | None = None,
    trainable: bool = True,
    pooling: str = "modulus",
    blur: int = 3,
    max_blur: int | None = None,
    imag: str = "tied",
    stem: str | None = None,
    backend: str = "auto",
) -> ConversionReport:
    """Give an untrained model's stem a bank of oriented filters that pool by the modulus, in place, all or nothing.

    The last `num_channels` channels of the first convolution take the bank's filters and the modulus; the others keep
    their own random weights and max pooling, behind which they are blurred as in BlurPool (max_blur=3). Then the model
    is converted as by `convert`, whose notes hold here too (build the optimizer, compile and wrap afterwards; `revert`
    takes the stem out again).

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
        trainable: False fixes the filters' spatial part K(n): the weight is M(c, i) K(n), only the colour mix M is
            learned (`conv1.parametrizations.weight.original1`, (num_channels, C_in); `original0` holds the other
            channels' weights), whatever the optimizer. `revert` ends that, and so does
            `torch.nn.utils.parametrize.remove_parametrizations(stem, "weight")`; until then torch refuses to pickle
            the stem, and stock checkpoints do not load (its own state dict does).
        pooling: "max" leaves the bank's channels on max pooling too: the real-valued twin, as a control.
        max_blur: as for `convert`, but the default is 3 with pooling="modulus": there are no trained layers behind the
            stem that expect anything else.
        blur, imag, stem, backend: as for `convert`. Paper 2's CMod is blur=1, max_blur=1.
    Returns:
        ConversionReport.
    Raises:
        ValueError: (StemError) the model has no such stem or is converted already; or an argument does not fit. The
            model is then as it was.
    Reference: Leterme et al., arXiv 2212.00394.
    Example:
        >>> import torchvision
        >>> model = torchvision.models.alexnet()
        >>> initialize(model, "wavelet").num_modulus
        32
    """
    _check_imag(trainable, imag)
    if pooling not in POOLINGS:
        raise ValueError(f"expected a pooling of {POOLINGS}, got {pooling!r}")
    if not isinstance(model, nn.Module):
        raise StemError(f"expected a torch.nn.Module, got {type(model).__name__}")
    if max_blur is None:
        max_blur = 3 if pooling == "modulus" else 1
    stems = converted_stems(model)
    if stems and (stem is None or stem in stems):
        raise StemError(f"expected an unconverted model, found a MixPoolStem at {', '.join(map(repr, stems))}")
    found = find_stem(model, stem)
    conv = found.modules[found.conv]
    norm = None if found.norm is None else found.modules[found.norm]
    check_parts(conv, norm, found.act_module, found.modules[found.pool])
    if not isinstance(bank, Tensor):
        taps, stride = _square(conv)
        is_given = num_channels is not None
        num_channels = num_channels if is_given else _default_count(conv, stride)
        kernel_size = taps if kernel_size is None else kernel_size
        if bank == "wavelet":
            if not is_given:
                num_channels = min(num_channels, max_channels(conv.in_channels, kernel_size, _depth_of(stride)))
            bank = wavelet_bank(num_channels, conv.in_channels, kernel_size, _depth_of(stride))
        elif bank == "gabor":
            bank = _gabor_modulus_bank(num_channels, conv.in_channels, kernel_size, stride)
        else:
            raise ValueError(f'expected a bank of "wavelet", "gabor" or filters, got {bank!r}')
    elif num_channels not in (None, len(bank)) or kernel_size not in (None, bank.shape[-1]):
        raise ValueError(f"expected num_channels and kernel_size of the bank, got {num_channels=}, {kernel_size=}")
    kernels = None if trainable else _spatial_part(bank)
    with _filled(conv, bank):
        select = _last(conv, len(bank)) if pooling == "modulus" else "none"
        options = {"blur": blur, "max_blur": max_blur, "imag": imag, "stem": stem, "backend": backend}
        report = convert(model, select=select, **options)
    if kernels is not None:
        mixed = model.get_submodule(found.conv)
        parametrize.register_parametrization(mixed, "weight", _ColorMixed(kernels.to(mixed.weight)))
    return report


class _ColorMixed(nn.Module):
    """Parametrization of a weight whose last channels are a colour times a fixed kernel; `original0` is the others'."""

    def __init__(self, kernels: Tensor) -> None:
        super().__init__()
        self.register_buffer("kernels", kernels)  # (n, k, k), norm 1

    def forward(self, others: Tensor, color_mix: Tensor) -> Tensor:
        return torch.cat([others, color_mix[:, :, None, None] * self.kernels[:, None]])

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The parameters of the nearest weight that has this form."""
        others, mixed = weight[: -len(self.kernels)], weight[-len(self.kernels) :]
        return others, torch.einsum("ciyx,cyx->ci", mixed, self.kernels)


def _spatial_part(bank: Tensor) -> Tensor:
    """(n, k, k) of norm 1: the kernel K(n) of filters M(i) K(n)."""
    _, size, patterns = torch.linalg.svd(bank.detach().double().flatten(2), full_matrices=False)
    if size.shape[1] > 1 and (size[:, 1] > 1e-5 * size[:, 0]).any():
        raise ValueError(
            "expected a colour times one kernel for each filter with trainable=False, got filters that differ in more "
            "than a factor from input channel to input channel"
        )
    return patterns[:, 0].reshape(len(bank), *bank.shape[2:])


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
    parameter, before = conv.weight, conv.weight.detach().clone()
    geometry = conv.kernel_size, conv.padding
    norms = before.double().flatten(1).norm(dim=1)
    scale = norms.square().mean().sqrt()
    if not scale > 0:
        raise ValueError("expected a convolution with initial weights, whose norm the bank takes; got zeros or NaN")
    bank = bank.detach().to(before.device, torch.float64)
    if not (bank.flatten(1).norm(dim=1) > 0).all():
        raise ValueError("expected a bank of finite filters, none of them zero")
    weight = nn.functional.pad(before, (margin,) * 4)
    weight[-len(bank) :] = bank * (scale / bank.flatten(1).norm(dim=1))[:, None, None, None]
    try:
        if margin == 0:
            conv.weight.data.copy_(weight)
        else:
            padding = (0, 0) if conv.padding == "valid" else pair(conv.padding)
            conv.weight = nn.Parameter(weight, requires_grad=parameter.requires_grad)
            conv.kernel_size = (size, size)
            conv.padding = tuple(p + margin * d for p, d in zip(padding, conv.dilation, strict=True))
        yield
    except BaseException:
        parameter.data.copy_(before)
        conv.weight = parameter
        conv.kernel_size, conv.padding = geometry
        raise


def _check_imag(trainable: bool, imag: str) -> None:
    if not trainable and imag != "tied":
        raise ValueError(f'expected imag="tied" with trainable=False (a free V would be trained), got {imag=}')


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


def _last(conv: nn.Conv2d, count: int) -> list[bool]:
    return [i >= conv.out_channels - count for i in range(conv.out_channels)]


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
