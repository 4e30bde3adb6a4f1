"""What a convolution filter is: its centre frequency, orientation, bandwidth, and its analytic partner.

Legend: C output channels, I input channels, (kH, kW) kernel, G side of the frequency grid.
Frequencies are (fy, fx) in radians per input pixel, each in [-pi, pi]; Nyquist is pi. y points down.
Everything here is pure tensor code, batched over channels, and computed in float64 unless said otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

SPECTRUM_SIZE = 65  # odd, so that no bin is its own mirror image but DC


def power_spectrum(weight: Tensor, size: int | None = None) -> Tensor:
    """Energy of each filter on a frequency grid, summed over input channels; differentiable.

    Args:
        weight: (C, I, kH, kW), any float dtype.
        size: odd side G of the zero-padded grid, at least the kernel's; default 65, more for kernels above 16 taps.
    Returns:
        (C, G, G) float64, bin (i, j) at the frequencies `frequency_grid(G)[i, j]`.
    """
    weight = check_weight(weight)
    size = max(SPECTRUM_SIZE, 4 * max(weight.shape[-2:]) + 1) if size is None else size
    if size % 2 == 0 or size < max(weight.shape[-2:]):
        raise ValueError(f"expected an odd size of at least {max(weight.shape[-2:])}, got {size=}")
    return torch.fft.fft2(weight.double(), s=(size, size)).abs().square().sum(dim=1)


def frequency_grid(size: int, device: torch.device | None = None, dtype: torch.dtype = torch.float64) -> Tensor:
    """(G, G, 2) frequencies (fy, fx) of an FFT grid, radians per pixel."""
    axis = torch.fft.fftfreq(size, device=device, dtype=dtype) * (2 * math.pi)
    return torch.stack(torch.meshgrid(axis, axis, indexing="ij"), dim=-1)


def center_frequency(weight: Tensor, refinements: int = 2, *, power: Tensor | None = None) -> Tensor:
    """Centre frequency of each filter: the energy's centroid over the half plane around its peak.

    Differentiable with respect to the weight (the choice of the peak is not). A zero filter gets (0, 0).

    Args:
        weight: (C, I, kH, kW).
        refinements: how often the half plane is turned towards the last centroid.
        power: `power_spectrum(weight)`, if it is known already (here and below).
    Returns:
        (C, 2), (fy, fx) in radians per pixel, with fy > 0 or fy = 0 and fx >= 0.
    """
    power = power_spectrum(weight) if power is None else power
    grid = frequency_grid(power.shape[-1], power.device, power.dtype)
    upper = (grid[..., 0] > 0) | ((grid[..., 0] == 0) & (grid[..., 1] > 0))  # one of each pair +-xi, without DC
    peak = power.detach().masked_fill(~upper, -1).flatten(1).argmax(dim=1)
    frequency = grid.flatten(0, 1)[peak]
    for _ in range(1 + refinements):
        share = _half_plane_share(power, grid, frequency)
        frequency = torch.einsum("cyx,yxd->cd", share, grid)
    is_upper = (frequency[:, 0] > 0) | ((frequency[:, 0] == 0) & (frequency[:, 1] >= 0))
    return torch.where(is_upper[:, None], frequency, -frequency)


def orientation(frequency: Tensor) -> Tensor:
    """Angle of frequency vectors (..., 2), atan2(fy, fx) mod pi, radians in [0, pi): x right, y down."""
    return torch.atan2(frequency[..., 0], frequency[..., 1]).remainder(math.pi)


def bandwidth(weight: Tensor, frequency: Tensor | None = None, *, power: Tensor | None = None) -> Tensor:
    """(C,) rms distance of the half-plane energy from the centre frequency, radians per pixel; differentiable."""
    power = power_spectrum(weight) if power is None else power
    grid = frequency_grid(power.shape[-1], power.device, power.dtype)
    frequency = center_frequency(weight, power=power) if frequency is None else frequency.to(power)
    share = _half_plane_share(power, grid, frequency)
    squared_distance = (grid - frequency[:, None, None, :]).square().sum(dim=-1)
    variance = (share * squared_distance).sum(dim=(1, 2))
    # As for the modulus: no gradient rather than NaN where the filter is zero.
    return torch.where(variance > 0, variance.clamp_min(torch.finfo(variance.dtype).tiny).sqrt(), 0.0)


def concentration(
    weight: Tensor, stride: int | Sequence[int], frequency: Tensor | None = None, *, power: Tensor | None = None
) -> Tensor:
    """(C,) largest share of the half-plane energy inside a window of sides pi / stride; differentiable.

    The window may lie anywhere on the frequency torus; the theory's CMod needs its share near 1
    (arXiv 2209.11740, the condition kappa <= pi / m; computed there on the channel-averaged kernel).
    """
    power = power_spectrum(weight) if power is None else power
    size = power.shape[-1]
    grid = frequency_grid(size, power.device, power.dtype)
    frequency = center_frequency(weight, power=power) if frequency is None else frequency.to(power)
    share = _half_plane_share(power, grid, frequency)
    window_y, window_x = (max(1, math.floor(size / (2 * step))) for step in pair(stride))
    # Sums over all window positions at once: differences of the wrapped cumulative sum along each axis.
    share = torch.cat([share, share[:, : window_y - 1]], dim=1).cumsum(dim=1)
    share = torch.cat([share[:, window_y - 1 : window_y], share[:, window_y:] - share[:, :-window_y]], dim=1)
    share = torch.cat([share, share[:, :, : window_x - 1]], dim=2).cumsum(dim=2)
    share = torch.cat([share[..., window_x - 1 : window_x], share[..., window_x:] - share[..., :-window_x]], dim=2)
    return share.amax(dim=(1, 2)).clamp(0, 1)


def dc_share(weight: Tensor, *, power: Tensor | None = None) -> Tensor:
    """(C,) energy at zero frequency over the peak energy, |W^(0)|^2 / max |W^|^2; differentiable; 0 for a zero W."""
    power = power_spectrum(weight) if power is None else power
    return ratio(power[:, 0, 0], power.amax(dim=(1, 2)))


def natural_image_prior(grid: Tensor) -> Tensor:
    """Power spectrum of natural images up to a factor, 1 / (|xi|^2 + 0.02^2), at frequencies (..., 2) in rad/px."""
    return 1 / (grid.square().sum(dim=-1) + 0.02**2)


def half_plane_side(grid: Tensor, direction: Tensor) -> Tensor:
    """(C, ...) in [-1, 1]: the sign of <xi, direction> for bins (..., 2) of a frequency grid and directions (C, 2).

    A bin that the dividing line cuts counts in part, so that the result is continuous in the direction and no rounding
    decides it; 0 everywhere for direction (0, 0).
    """
    length = direction.norm(dim=1, keepdim=True)
    direction = direction / torch.where(length > 0, length, 1.0)
    projection = torch.einsum("...d,cd->c...", grid, direction.to(grid))
    half_bin = (grid[0, 1, 1] - grid[0, 0, 1]) / 2
    return (projection / half_bin).clamp(-1, 1)


def _half_plane_share(power: Tensor, grid: Tensor, frequency: Tensor) -> Tensor:
    """(C, G, G) energy in the half plane <xi, frequency> > 0, normalised to sum to 1 (0 for a zero filter)."""
    energy = power * (1 + half_plane_side(grid, frequency)) / 2
    return ratio(energy, energy.sum(dim=(1, 2), keepdim=True))


def ratio(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole; 0, with gradient 0, where the whole is 0."""
    return torch.where(whole > 0, part / torch.where(whole > 0, whole, 1.0), 0.0)


def check_weight(weight: Tensor) -> Tensor:
    if not isinstance(weight, Tensor) or weight.ndim != 4 or not weight.is_floating_point():
        got = f"{tuple(weight.shape)} {weight.dtype}" if isinstance(weight, Tensor) else type(weight).__name__
        raise ValueError(f"expected a floating-point weight of shape (C_out, C_in, kH, kW), got {got}")
    return weight


def pair(value: int | Sequence[int]) -> tuple[int, int]:
    """(y, x) from one number or two."""
    values = tuple(value) if isinstance(value, Iterable) else (value, value)
    if len(values) != 2:
        raise ValueError(f"expected one integer or a pair of them, got {value!r}")
    return values
