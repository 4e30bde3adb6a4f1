"""Wavelet packets as the filters of a first layer: few taps, one orientation each, times a colour.

Legend: J depth, P = 2**J packets per axis, n packets, k taps per side, I input channels. Frequencies are (fy, fx) in
radians per pixel, Nyquist is pi, y points down.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from mixpool.filters.gabor import OPPONENTS
from mixpool.filters.packets import PacketFilters, dtcwpt_filters
from mixpool.filters.partner import PRIOR_SIZE
from mixpool.filters.spectrum import frequency_grid, half_plane_side, natural_image_prior

DEPTHS = (2, 3)  # at depth 1 every packet borders on the frequency 0 or pi
# A packet's energy in the half plane of its centre frequency: at least 0.992 for those kept, at most 0.925 for others.
MIN_HALF_PLANE_SHARE = 0.95


@dataclass(frozen=True, eq=False)
class PacketKernels:
    """Wavelet packets on k x k taps, those with a well-defined orientation, by rising frequency. Float64, on the CPU.

    Packets that are mirror images of each other, or the same with y and x exchanged, follow each other: an orbit of 4,
    or of 2 on the diagonal.

    Attributes:
        kernels: (n, k, k) real parts; sum 0, norm 1.
        packet: (n, 3) int64, (iy, ix, sign) as in `PacketFilters`.
        orbit: (n,) int64, number of the orbit.
        center_frequency: (n, 2), (fy, fx) of the uncut packet.
        kept_energy: (n,) share of the complex packet's energy that lies on the k x k taps, in [0, 1].
        image_correlation: (n,) correlation, over natural images, of the kernel's responses with the uncut packet's.
    """

    kernels: Tensor
    packet: Tensor
    orbit: Tensor
    center_frequency: Tensor
    kept_energy: Tensor
    image_correlation: Tensor

    def __len__(self) -> int:
        return len(self.packet)


# --- packets on few taps ----------------------------------------------------------------------------------------------


def half_plane_share(filters: PacketFilters) -> Tensor:
    """(n,) share of each packet's energy in the half plane <xi, centre frequency> > 0, in [0, 1].

    Near 1 the packet has one orientation, and its modulus is an envelope. A packet that borders on the frequency 0
    along one axis leaks over that axis, but stays in the half plane. One that borders on pi (0.75 to 0.85) leaks to the
    alias across pi, which has another orientation, and the low-pass packet (0.90 to 0.92) has none.
    """
    size = 2 * filters.kernel_size + 1
    power = torch.fft.fft(filters.axis_kernels, size).abs().square()
    mirrored = power.roll(-1, dims=1).flip(1)  # of the conjugate
    along_y = power[filters.packet[:, 0]]
    along_x = torch.where(filters.packet[:, 2:] > 0, power[filters.packet[:, 1]], mirrored[filters.packet[:, 1]])
    grid = frequency_grid(size)
    share = torch.empty(len(filters), dtype=torch.float64)
    for i, direction in enumerate(filters.center_frequency):  # one by one: all sides at once are large for long taps
        right = (1 + half_plane_side(grid, direction[None])[0]) / 2
        share[i] = along_y[i] @ right @ along_x[i] / (along_y[i].sum() * along_x[i].sum())
    return share


@lru_cache(maxsize=32, typed=True)
def packet_kernels(kernel_size: int = 7, depth: int = 2, wavelet: str = "qshift_a") -> PacketKernels:
    """The packets with a well-defined orientation, each as the k x k kernel that stands for it on natural images.

    The kernel K lies on the k x k window with the most of the packet P's energy and minimises, among kernels of sum 0,
    sum over xi of S(xi) |K^(xi) - Re(P)^(xi)|^2  with S = `natural_image_prior`. Plain cropping leaks at low
    frequencies, where images have their energy. At 11 taps and depth 3, over 24 ImageNet photos, the modulus of the
    cropped kernel with its analytic partner correlates with the uncut packet's by 0.60 in the worst case, after
    subtracting its mean by 0.92, and that of this kernel by 0.96.

    Kept are the packets of `half_plane_share` >= 0.95: all that border neither on pi nor, along both axes, on 0. At
    depth 2 these are the 16 of 32 that paper 2 keeps for ResNet, at depth 3 they are 96 of 128.

    What the taps cost, for "qshift_a" (of depth 3 the 32 lowest packets; the worst packet, the median in brackets).
    Error: distance of the half-plane centroid from the uncut packet's, both of real parts, in rad/px; "in images": of
    the response to natural images.

        depth  taps  kept energy  image correlation        error    in images
            2     7         0.93        0.95 (0.96)  0.17 (0.05)  0.09 (0.03)
            2     9         0.97        0.97 (0.99)  0.05 (0.01)  0.03 (0.02)
            3    11         0.80        0.89 (0.92)  0.40 (0.08)  0.07 (0.03)
            3    15         0.94        0.96 (0.97)  0.16 (0.02)  0.03 (0.01)
            3    17         0.96        0.97 (0.98)  0.06 (0.01)  0.02 (0.01)

    Args:
        kernel_size: taps k per side, from 3 to the packets' own length (29 at depth 2, 65 at depth 3).
        depth: levels J, 2 or 3; at depth 1 all packets border on 0 or pi.
        wavelet: a q-shift family, as for `dtcwpt_filters`.
    Returns:
        PacketKernels. The result is kept for the next call: do not write into it.
    Reference: Leterme et al., arXiv 2212.00394 ("paper 2"), and hubert-leterme/wcnn for the packets it keeps.
    """
    if depth not in DEPTHS:
        raise ValueError(f"expected a depth of 2 or 3, got {depth=}")
    filters = dtcwpt_filters(depth, wavelet)
    if not 3 <= kernel_size <= filters.kernel_size:
        raise ValueError(f"expected a kernel_size from 3 to {filters.kernel_size} at {depth=}, got {kernel_size=}")
    rows, orbit = _rows_by_frequency(filters)
    starts, kept_energy = _windows(filters, kernel_size)
    fits = _fit(filters, rows, starts, kernel_size)
    packet = filters.packet[rows]
    return PacketKernels(
        kernels=torch.stack([kernel / kernel.norm() for kernel, _ in fits]),
        packet=packet,
        orbit=orbit,
        center_frequency=filters.center_frequency[rows],
        kept_energy=kept_energy[packet[:, 0]] * kept_energy[packet[:, 1]],
        image_correlation=torch.stack([correlation for _, correlation in fits]),
    )


def _rows_by_frequency(filters: PacketFilters) -> tuple[Tensor, Tensor]:
    """(n,) rows of the well-oriented packets by rising frequency, orbit by orbit, and (n,) the orbits' numbers."""
    orbits: dict[tuple[int, ...], list[int]] = {}
    for row in (half_plane_share(filters) >= MIN_HALF_PLANE_SHARE).nonzero()[:, 0].tolist():
        orbits.setdefault(tuple(sorted(filters.packet[row, :2].tolist())), []).append(row)
    frequency = filters.center_frequency.norm(dim=1)
    ordered = sorted(orbits.values(), key=lambda rows: frequency[rows[0]].item())
    sizes = torch.tensor([len(rows) for rows in ordered])
    return torch.tensor(sum(ordered, [])), torch.arange(len(ordered)).repeat_interleave(sizes)


def _windows(filters: PacketFilters, kernel_size: int) -> tuple[Tensor, Tensor]:
    """(P,) first tap of the k taps with the most energy of each 1-D packet, and (P,) their share of it."""
    energy = filters.axis_kernels.abs().square().unfold(1, kernel_size, 1).sum(dim=2)
    best = energy.max(dim=1)
    return best.indices, best.values / filters.axis_kernels.abs().square().sum(dim=1)


def _fit(filters: PacketFilters, rows: Tensor, starts: Tensor, kernel_size: int) -> list[tuple[Tensor, Tensor]]:
    """The kernel and its image correlation for each row, by the normal equations of `packet_kernels`."""
    length = filters.kernel_size
    size = max(PRIOR_SIZE, 2 * length + 1)  # odd, and nothing wraps around
    prior = natural_image_prior(frequency_grid(size))[:, : size // 2 + 1]  # even, so half of it is enough
    lag = torch.arange(kernel_size)
    lag = lag[:, None] - lag
    prior_kernel = torch.fft.irfft2(prior, s=(size, size))  # s; s(a - b) over all taps a, b is the matrix below
    matrix = prior_kernel[lag[:, None, :, None], lag[None, :, None, :]].reshape(kernel_size**2, kernel_size**2)
    factor = torch.linalg.cholesky(matrix)
    ones = torch.ones(kernel_size**2, 1, dtype=matrix.dtype)
    flat = torch.cholesky_solve(ones, factor)  # what the condition of sum 0 takes away, up to a factor
    fits = []
    for packet, (top, left) in zip(filters.kernels.real[rows], starts[filters.packet[rows, :2]].tolist(), strict=True):
        seen = torch.fft.irfft2(torch.fft.rfft2(packet, s=(size, size)) * prior, s=(size, size))  # s * Re(P)
        right = seen[top : top + kernel_size, left : left + kernel_size].reshape(-1, 1)
        fit = torch.cholesky_solve(right, factor)
        fit = fit - flat * (fit.sum() / flat.sum())
        energies = (fit * (matrix @ fit)).sum() * (packet * seen[:length, :length]).sum()
        fits.append((fit.reshape(kernel_size, kernel_size), (fit * right).sum() / energies.sqrt()))
    return fits


# --- banks ------------------------------------------------------------------------------------------------------------


def wavelet_bank(num_channels: int, in_channels: int = 3, kernel_size: int = 7, depth: int = 2) -> Tensor:
    """Real filters, each one wavelet packet times one colour: the counterpart of `gabor_bank` for modulus channels.

    Packets are taken from the lowest frequency on, where natural images have the most energy, in whole orbits where the
    number allows (so that all orientations and both axes are served alike), gray first. Where there are more channels
    than packets, the packets come again from the lowest on, in opponent colours. For 24 channels at depth 2 these are
    the multiplicities of paper 2's ResNet; its AlexNet learns 32 sums of 94 packets, here they are the 32 lowest.
    No random numbers are drawn.

    Args:
        num_channels: number of filters.
        in_channels: 3 for colour images; for other numbers above 1 the single channels stand for the opponent colours.
        kernel_size, depth: as for `packet_kernels`.
    Returns:
        (num_channels, in_channels, kernel_size, kernel_size) float32, each filter of norm 1, each of its slices of
        sum 0.
    Raises:
        ValueError: an argument is out of range, or there are fewer pairs of a packet and a colour than channels.
    Example:
        >>> from mixpool.filters.wavelets import wavelet_bank
        >>> tuple(wavelet_bank(24).shape)
        (24, 3, 7, 7)
    """
    if num_channels < 1 or in_channels < 1:
        raise ValueError(f"expected at least 1 channel, got {num_channels=}, {in_channels=}")
    packets = packet_kernels(kernel_size, depth)
    rows = _choose(packets.orbit, num_channels)
    colors = _colors(packets.orbit[rows], len(packets), in_channels)
    colors = colors / colors.norm(dim=1, keepdim=True)
    return torch.einsum("ci,cyx->ciyx", colors, packets.kernels[rows]).float()


def max_channels(in_channels: int, kernel_size: int, depth: int) -> int:
    """How many filters `wavelet_bank` has: the packets times the colours."""
    return len(packet_kernels(kernel_size, depth)) * (1 + len(_opponents(in_channels)))


def _choose(orbit: Tensor, count: int) -> Tensor:
    """(count,) rows of packets: all as often as they fit, then whole orbits from the first on, then what is left."""
    rounds, left = divmod(count, len(orbit))
    chosen: list[int] = []
    for number in range(int(orbit[-1]) + 1):
        members = (orbit == number).nonzero()[:, 0].tolist()
        chosen += members if len(chosen) + len(members) <= left else []
    chosen += [row for row in range(len(orbit)) if row not in chosen][: left - len(chosen)]
    return torch.cat([torch.arange(len(orbit)).repeat(rounds), torch.tensor(sorted(chosen), dtype=torch.int64)])


def _colors(orbit: Tensor, num_packets: int, in_channels: int) -> Tensor:
    """(count, I) gray in the first round over the packets; then an opponent colour per orbit, another in each round."""
    gray, others = torch.ones(in_channels, dtype=torch.float64), _opponents(in_channels)
    most = num_packets * (1 + len(others))
    if len(orbit) > most:
        raise ValueError(
            f"expected at most {most} channels ({num_packets} packets in {1 + len(others)} colours), got {len(orbit)}"
        )
    rounds = torch.arange(len(orbit)) // num_packets
    return torch.stack(
        [gray if i == 0 else others[(i - 1 + number) % len(others)] for i, number in zip(rounds, orbit, strict=True)]
    )


def _opponents(in_channels: int) -> Tensor:
    """(number of colours beside gray, I)."""
    if in_channels == 3:
        return torch.tensor(OPPONENTS, dtype=torch.float64)
    return torch.eye(in_channels, dtype=torch.float64)[: in_channels if in_channels > 1 else 0]
