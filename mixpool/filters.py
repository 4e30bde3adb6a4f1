"""What a convolution filter is: its centre frequency, orientation, bandwidth, and its analytic partner.

Legend: C output channels, I input channels, (kH, kW) kernel, G side of the frequency grid.
Frequencies are (fy, fx) in radians per input pixel, each in [-pi, pi]; Nyquist is pi. y points down.
Everything here is pure tensor code, batched over channels, and computed in float64 unless said otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

SPECTRUM_SIZE = 65  # odd, so that no bin is its own mirror image but DC
PRIOR_SIZE = 255  # side of the frequency grid on which the partner is fitted
MAX_MAP_TAPS = 225  # above, the partner is computed without its map


def power_spectrum(weight: Tensor, size: int | None = None) -> Tensor:
    """Energy of each filter on a frequency grid, summed over input channels; differentiable.

    Args:
        weight: (C, I, kH, kW), any float dtype.
        size: odd side G of the zero-padded grid, at least the kernel's; default 65, more for kernels above 16 taps.
    Returns:
        (C, G, G) float64, bin (i, j) at the frequencies `frequency_grid(G)[i, j]`.
    """
    weight = check_weight(weight)
    size = _spectrum_size(weight) if size is None else size
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
    return torch.where(_is_upper(frequency)[:, None], frequency, -frequency)


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
    return _ratio(power[:, 0, 0], power.amax(dim=(1, 2)))


def slow_share(weight: Tensor, stride: int | Sequence[int], *, power: Tensor | None = None) -> Tensor:
    """(C,) share of a filter's response to natural images that hardly turns within a pooling window; differentiable.

    The response's energy is S(xi) |W^(xi)|^2, with the prior S of natural images. From one step of the convolution to
    the next its phase turns by stride * xi, of which only the remainder modulo 2 pi counts (aliasing). Where that is
    less than pi / 2 a window of 3 does not see a whole half wave, and its maximum is not a modulus. So this one
    number joins frequency, orientation, bandwidth and stride. 0 for a zero filter.
    """
    power = power_spectrum(weight) if power is None else power
    grid = frequency_grid(power.shape[-1], power.device, power.dtype)
    energy = power * natural_image_prior(grid)
    turn = grid * torch.tensor(pair(stride), device=grid.device, dtype=grid.dtype)
    turn = ((turn + math.pi).remainder(2 * math.pi) - math.pi).norm(dim=-1)
    slow = (energy * (turn < math.pi / 2)).sum(dim=(1, 2))
    return _ratio(slow, energy.sum(dim=(1, 2)))


def natural_image_prior(grid: Tensor) -> Tensor:
    """Power spectrum of natural images up to a factor, 1 / (|xi|^2 + 0.02^2), at frequencies (..., 2) in rad/px."""
    return 1 / (grid.square().sum(dim=-1) + 0.02**2)


def partner_prior(grid: Tensor) -> Tensor:
    """Weight of an error of the analytic partner at frequencies (..., 2) in rad/px, 1 / (|xi|^2 + 0.01^2)^(3/2).

    One power of |xi| steeper than the images themselves: an error at low frequencies is seen by the whole pooling
    window at once. Measured against the images' own prior, the correlation of CMod with max pooling on SqueezeNet's
    filters below 1.2 rad/px rises from 0.60 to 0.66 (`benchmarks.partner`).
    """
    return (grid.square().sum(dim=-1) + 0.01**2) ** -1.5


def analytic_partner_map(direction: Tensor, kernel_size: int | Sequence[int]) -> Tensor:
    """The linear map from a kernel W to its analytic partner V, for each direction of the frequency vector.

    V on the same kH x kW taps minimises  sum over xi of S(xi) |V^(xi) - (-i sgn<xi, direction>) W^(xi)|^2  with
    S = `partner_prior`: twice the energy of W + iV on its wrong side, so no other V on these taps has less of it.
    With s the inverse transform of S and h that of -i sgn<xi, direction> S, on the taps a:
    sum_b s(a-b) V(b) = sum_b h(a-b) W(b).

    Args:
        direction: (C, 2) vectors (fy, fx), any length: only the half plane <xi, direction> > 0 matters.
        kernel_size: taps of the kernel, even or odd.
    Returns:
        (C, kH*kW, kH*kW) float64, V.flatten() = map @ W.flatten() for every input channel; zero for direction (0, 0).
    """
    taps_y, taps_x = pair(kernel_size)
    grid = frequency_grid(PRIOR_SIZE, direction.device)
    # The spectra below are even and odd: half of the grid, DC apart, holds all of them.
    half_grid = grid[: PRIOR_SIZE // 2 + 1]
    weight_of_row = torch.full((len(half_grid), 1), 2.0, dtype=grid.dtype, device=grid.device)
    weight_of_row[0] = 1.0  # the row fy = 0 holds both members of each pair
    prior = weight_of_row * partner_prior(half_grid) / PRIOR_SIZE**2
    side = half_plane_side(half_grid, direction)

    lag_y = torch.arange(1 - taps_y, taps_y, device=grid.device, dtype=grid.dtype)
    lag_x = torch.arange(1 - taps_x, taps_x, device=grid.device, dtype=grid.dtype)
    wave_y = torch.polar(torch.ones((), dtype=grid.dtype, device=grid.device), lag_y[:, None] * half_grid[:, 0, 0])
    wave_x = torch.polar(torch.ones((), dtype=grid.dtype, device=grid.device), lag_x[:, None] * half_grid[0, :, 1])

    prior_kernel = (wave_y @ prior.to(wave_y.dtype) @ wave_x.T).real  # s at all lags
    odd_prior = (prior * side).to(wave_y.dtype)
    hilbert_kernel = (wave_y @ odd_prior @ wave_x.T).imag  # h at all lags: real part of -i exp(i<xi,n>) is sin

    row_lag = _lags(taps_y, grid.device)[:, None, :, None].expand(taps_y, taps_x, taps_y, taps_x)
    column_lag = _lags(taps_x, grid.device)[None, :, None, :].expand(taps_y, taps_x, taps_y, taps_x)
    taps = taps_y * taps_x
    normal_matrix = prior_kernel[row_lag, column_lag].reshape(taps, taps)
    right_side = hilbert_kernel[:, row_lag, column_lag].reshape(-1, taps, taps)
    return torch.cholesky_solve(right_side, torch.linalg.cholesky(normal_matrix))


def apply_partner_map(partner_map: Tensor, weight: Tensor) -> Tensor:
    """(C, I, kH, kW) imaginary part: each channel's map, (C, k*k, k*k), applied to its weights; differentiable."""
    return torch.einsum("cab,cib->cia", partner_map, weight.flatten(2)).reshape(weight.shape)


def analytic_partner(weight: Tensor, direction: Tensor | None = None) -> Tensor:
    """Imaginary part V that makes W + iV nearly one-sided on the kernel's own taps (prior-weighted least squares).

    Args:
        weight: (C, I, kH, kW).
        direction: (C, 2) frequency vectors (fy, fx); default the filters' centre frequencies.
    Returns:
        (C, I, kH, kW), dtype of `weight`; differentiable with respect to `weight` at fixed direction.
    """
    direction = center_frequency(weight).detach() if direction is None else direction
    if weight.shape[-2] * weight.shape[-1] > MAX_MAP_TAPS:
        return _solve_partner(weight, direction)
    partner_map = analytic_partner_map(direction, weight.shape[-2:])
    return apply_partner_map(partner_map.to(weight.dtype), weight)


def _solve_partner(weight: Tensor, direction: Tensor) -> Tensor:
    """What `analytic_partner_map` gives when applied, without the maps: one factorisation for all channels.

    The maps of 64 filters of 31x31 hold 470 MB, of 65x65 9 GB; here it is one matrix of that kind.
    """
    taps_y, taps_x = weight.shape[-2:]
    size = max(PRIOR_SIZE, 2 * max(taps_y, taps_x) + 1)  # no lag wraps around
    grid = frequency_grid(size, weight.device)
    prior = partner_prior(grid)
    prior_kernel = torch.fft.ifft2(prior).real
    row_lag = (_lags(taps_y, weight.device) - taps_y + 1)[:, None, :, None].expand(taps_y, taps_x, taps_y, taps_x)
    column_lag = (_lags(taps_x, weight.device) - taps_x + 1)[None, :, None, :].expand(taps_y, taps_x, taps_y, taps_x)
    factor = torch.linalg.cholesky(prior_kernel[row_lag, column_lag].reshape(taps_y * taps_x, -1))
    right_side = []
    for kernel, side in zip(weight.double(), half_plane_side(grid, direction.double()), strict=True):
        spectrum = torch.fft.fft2(kernel, s=(size, size)) * (-1j * side * prior)
        right_side.append(torch.fft.ifft2(spectrum).real[..., :taps_y, :taps_x].flatten(1))
    partner = torch.cholesky_solve(torch.stack(right_side).flatten(0, 1).T, factor).T
    return partner.reshape(weight.shape).to(weight.dtype)


def hilbert_partner(weight: Tensor, direction: Tensor | None = None, size: int = PRIOR_SIZE) -> Tensor:
    """Plain Hilbert partner: the directional Hilbert transform on a large odd grid, cropped back to the taps.

    For comparison only: cropping leaves a DC leak that ruins low-frequency edge filters. Arguments as
    `analytic_partner`; `size` is the odd side of the grid.
    """
    direction = center_frequency(weight).detach() if direction is None else direction
    side = half_plane_side(frequency_grid(size, weight.device), direction.double())
    spectrum = torch.fft.fft2(weight.double(), s=(size, size))
    partner = torch.fft.ifft2(-1j * side[:, None] * spectrum).real
    return partner[..., : weight.shape[-2], : weight.shape[-1]].to(weight.dtype)


def analytic_filter(weight: Tensor, direction: Tensor | None = None) -> Tensor:
    """Complex filter W + iV, (C, I, kH, kW); its real part equals `weight` exactly."""
    return torch.complex(weight, analytic_partner(weight, direction))


def wrong_side_energy(weight: Tensor, weight_imag: Tensor, direction: Tensor) -> Tensor:
    """(C,) share of the energy of W + iV, weighted by `partner_prior`, in the half plane <xi, direction> < 0.

    0 is perfectly analytic, 0.5 a real filter. Computed in float64 on the grid of the prior.
    """
    grid = frequency_grid(PRIOR_SIZE, weight.device)
    prior = partner_prior(grid)
    spectrum = torch.fft.fft2(torch.complex(weight.double(), weight_imag.double()), s=(PRIOR_SIZE, PRIOR_SIZE))
    energy = spectrum.abs().square().sum(dim=1) * prior
    wrong = (energy * (1 - half_plane_side(grid, direction.double())) / 2).sum(dim=(1, 2))
    return _ratio(wrong, energy.sum(dim=(1, 2)))


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
    return _ratio(energy, energy.sum(dim=(1, 2), keepdim=True))


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole; 0, with gradient 0, where the whole is 0."""
    return torch.where(whole > 0, part / torch.where(whole > 0, whole, 1.0), 0.0)


def _is_upper(frequency: Tensor) -> Tensor:
    return (frequency[:, 0] > 0) | ((frequency[:, 0] == 0) & (frequency[:, 1] >= 0))


def _lags(taps: int, device: torch.device) -> Tensor:
    """(taps, taps) index of lag a - b in a table of the lags 1 - taps .. taps - 1."""
    tap = torch.arange(taps, device=device)
    return tap[:, None] - tap[None, :] + taps - 1


def _spectrum_size(weight: Tensor) -> int:
    return max(SPECTRUM_SIZE, 4 * max(weight.shape[-2:]) + 1)


def check_weight(weight: Tensor) -> Tensor:
    if not isinstance(weight, Tensor) or weight.ndim != 4 or not weight.is_floating_point():
        got = f"{tuple(weight.shape)} {weight.dtype}" if isinstance(weight, Tensor) else type(weight).__name__
        raise ValueError(f"expected a floating-point weight of shape (C_out, C_in, kH, kW), got {got}")
    return weight


def pair(value: int | Sequence[int]) -> tuple[int, int]:
    """(y, x) from one number or two."""
    values = (value, value) if isinstance(value, int) else tuple(value)
    if len(values) != 2:
        raise ValueError(f"expected one integer or a pair of them, got {value!r}")
    return values
