"""The analytic partner V of a filter W: what makes W + iV nearly one-sided on W's own taps.

Legend: C output channels, I input channels, (kH, kW) kernel; frequencies are (fy, fx) in radians per pixel.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mixpool.filters.spectrum import center_frequency, frequency_grid, half_plane_side, pair

PRIOR_SIZE = 255  # side of the frequency grid on which the partner is fitted


MAX_MAP_TAPS = 225  # above, the partner is computed without its map


def partner_prior(grid: Tensor) -> Tensor:
    """Weight of an error of the analytic partner at frequencies (..., 2) in rad/px, 1 / (|xi|^2 + 0.01^2)^(3/2).

    One power of |xi| steeper than the images themselves: an error at low frequencies is seen by the whole pooling
    window at once. Measured against the images' own prior, the correlation of CMod with max pooling on SqueezeNet's
    filters below 1.2 rad/px rises from 0.60 to 0.66 (`benchmarks.selecting.partner`).
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


def _lags(taps: int, device: torch.device) -> Tensor:
    """(taps, taps) index of lag a - b in a table of the lags 1 - taps .. taps - 1."""
    tap = torch.arange(taps, device=device)
    return tap[:, None] - tap[None, :] + taps - 1
