"""The bank of wavelet packets: which packets, how well few taps hold them, which of them a bank takes.

Truth is the uncut packets themselves (`dtcwpt_filters`, see test_packets.py) and spectra by torch.fft.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from one_sided import wrong_side_share
from support import assert_close, assert_same_bits
from torch import Tensor

from mixpool import analytic_partner, analyze
from mixpool.filters.packets import dtcwpt_filters
from mixpool.filters.spectrum import frequency_grid, half_plane_side, natural_image_prior, orientation
from mixpool.filters.wavelets import half_plane_share, packet_kernels, wavelet_bank

GRID = 255


def rows_of(packet: Tensor, depth: int) -> list[int]:
    """Rows of packets (n, 3) among all packets of the depth."""
    return [2 * (iy * 2**depth + ix) + (sign < 0) for iy, ix, sign in packet.tolist()]


def spectrum(kernels: Tensor) -> Tensor:
    return torch.fft.fft2(kernels, s=(GRID, GRID))


def centroid(kernels: Tensor, direction: Tensor, seen: Tensor | float = 1.0) -> Tensor:
    """(n, 2) centroid of the energy, times `seen`, over the half planes of the directions."""
    grid = frequency_grid(GRID)
    energy = spectrum(kernels).abs().square() * seen * (1 + half_plane_side(grid, direction)) / 2
    return torch.einsum("cyx,yxd->cd", energy, grid) / energy.sum(dim=(1, 2))[:, None]


# --- which packets ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth, count", [(2, 16), (3, 96)])
def test_kept_are_the_packets_that_border_neither_on_pi_nor_twice_on_zero(depth, count):
    """At depth 2 these are the 16 that paper 2's ResNet keeps (hubert-leterme/wcnn, its 14 edges excluded)."""
    last = 2**depth - 1
    expected = {(iy, ix, sign) for iy in range(last) for ix in range(last) for sign in (1, -1) if iy > 0 or ix > 0}
    packets = packet_kernels(7, depth)
    assert {tuple(packet) for packet in packets.packet.tolist()} == expected
    assert len(packets) == count


@pytest.mark.parametrize("wavelet", ["qshift_06", "qshift_a", "qshift_d"])
@pytest.mark.parametrize("depth", [2, 3])
def test_the_limit_on_the_half_plane_share_lies_in_a_gap(depth, wavelet):
    share = half_plane_share(dtcwpt_filters(depth, wavelet))
    kept = share >= 0.95
    assert share[kept].min() > 0.992 and share[~kept].max() < 0.925
    assert kept.sum() == {2: 16, 3: 96}[depth]


def test_half_plane_share_is_that_of_the_two_dimensional_spectrum():
    filters = dtcwpt_filters(2)
    power = torch.fft.fft2(filters.kernels, s=(65, 65)).abs().square()
    side = half_plane_side(frequency_grid(65), filters.center_frequency)
    expected = (power * (1 + side) / 2).sum(dim=(1, 2)) / power.sum(dim=(1, 2))
    assert_close("share", half_plane_share(filters), expected, (0.01, 0))  # because the grids differ


# --- the packets on few taps ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("taps, depth", [(7, 2), (8, 2), (11, 3)])
def test_a_kernel_is_the_best_of_sum_zero_on_the_window_with_the_most_energy(taps, depth):
    packets, filters = packet_kernels(taps, depth), dtcwpt_filters(depth)
    prior = natural_image_prior(frequency_grid(GRID))
    rows = rows_of(packets.packet, depth)
    for i in range(0, len(packets), 5):
        packet, kernel = filters.kernels[rows[i]], packets.kernels[i]
        energy = packet.abs().square().unfold(0, taps, 1).unfold(1, taps, 1).sum(dim=(2, 3))
        assert packets.kept_energy[i].item() == pytest.approx((energy.max() / packet.abs().square().sum()).item())
        top, left = divmod(int(energy.argmax()), energy.shape[1])

        placed = torch.zeros_like(packet.real)
        placed[top : top + taps, left : left + taps] = kernel
        mine, whole = spectrum(placed), spectrum(packet.real)

        def inner(a: Tensor, b: Tensor) -> float:
            return (prior * a.conj() * b).sum().real.item()

        factor = inner(mine, whole) / inner(mine, mine)
        variation = torch.zeros_like(placed)
        variation[top : top + taps, left : left + taps] = torch.randn(taps, taps, dtype=torch.float64)
        variation[top : top + taps, left : left + taps] -= variation.sum() / taps**2
        slope = inner(spectrum(variation), factor * mine - whole)
        scale = math.sqrt(inner(spectrum(variation), spectrum(variation)) * inner(whole, whole))
        assert abs(slope) < 1e-8 * scale, packets.packet[i]
        correlation = inner(mine, whole) / math.sqrt(inner(mine, mine) * inner(whole, whole))
        assert packets.image_correlation[i].item() == pytest.approx(correlation, abs=1e-8)


# The table of `packet_kernels`: depth, taps, kept energy, image correlation, error, error in images.
TABLE = [
    (2, 7, 0.93, 0.95, 0.17, 0.09),
    (2, 9, 0.97, 0.97, 0.05, 0.03),
    (3, 11, 0.80, 0.89, 0.40, 0.07),
    (3, 15, 0.94, 0.96, 0.16, 0.03),
    (3, 17, 0.96, 0.97, 0.06, 0.02),
]


@pytest.mark.parametrize("depth, taps, kept, correlation, error, error_in_images", TABLE)
def test_what_few_taps_cost_is_what_the_docstring_says(depth, taps, kept, correlation, error, error_in_images):
    packets = packet_kernels(taps, depth)
    few = slice(0, 32)
    kernels, direction = packets.kernels[few], packets.center_frequency[few]
    whole = dtcwpt_filters(depth).kernels.real[rows_of(packets.packet[few], depth)]
    assert packets.kept_energy[few].min().item() == pytest.approx(kept, abs=0.005)
    assert packets.image_correlation[few].min().item() == pytest.approx(correlation, abs=0.005)
    for seen, limit in ((1.0, error), (natural_image_prior(frequency_grid(GRID)), error_in_images)):
        distance = (centroid(kernels, direction, seen) - centroid(whole, direction, seen)).norm(dim=1)
        assert distance.max().item() == pytest.approx(limit, abs=0.006)
    assert kernels.sum(dim=(1, 2)).abs().max() < 1e-12
    assert_close("norm", kernels.flatten(1).norm(dim=1), torch.ones(len(kernels)))
    partner = analytic_partner(kernels[:, None], direction)
    assert wrong_side_share(kernels[:, None], partner, direction).max() < 0.02  # nearly one-sided


def test_a_docstring_quotes_the_table():
    for depth, taps, kept, correlation, error, error_in_images in TABLE:
        row = f"{depth:13d}{taps:6d}         {kept:.2f}        {correlation:.2f} "
        assert row in packet_kernels.__wrapped__.__doc__, row
        assert f"{error:.2f} (" in packet_kernels.__wrapped__.__doc__
        assert f"{error_in_images:.2f} (" in packet_kernels.__wrapped__.__doc__


# --- banks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "count, in_channels, taps, depth", [(24, 3, 7, 2), (32, 3, 11, 3), (36, 3, 9, 2), (16, 1, 7, 2), (33, 4, 6, 2)]
)
def test_bank_shape_norm_mean_and_determinism(count, in_channels, taps, depth):
    bank = wavelet_bank(count, in_channels, taps, depth)
    assert bank.shape == (count, in_channels, taps, taps) and bank.dtype == torch.float32
    assert_close("norm", bank.flatten(1).norm(dim=1), torch.ones(count))
    assert bank.sum(dim=(2, 3)).abs().max() < 1e-5
    torch.manual_seed(1)
    assert_same_bits("again", bank, wavelet_bank(count, in_channels, taps, depth))


@pytest.mark.parametrize("count, in_channels, depth", [(24, 3, 2), (80, 3, 2), (32, 3, 3), (80, 4, 2)])
def test_no_filter_is_there_twice(count, in_channels, depth):
    bank = wavelet_bank(count, in_channels, 7, depth).flatten(1)
    similarity = (bank @ bank.T).abs() - torch.eye(count)
    assert similarity.max() < 0.98


def test_twenty_four_filters_have_the_multiplicities_of_paper_2():
    """wcnn's ResNet: two outputs for the packets of the lowest octave and for (2, 2), one for the others."""
    packets, bank = packet_kernels(7, 2), wavelet_bank(24)
    similarity = (bank.sum(dim=1).flatten(1), packets.kernels.float().flatten(1))
    is_gray = (bank - bank.mean(dim=1, keepdim=True)).abs().amax(dim=(1, 2, 3)) < 1e-6
    assert is_gray.tolist() == [True] * 16 + [False] * 8
    assert_close("gray", similarity[0][:16] / math.sqrt(3), similarity[1])
    patterns = bank[16:].flatten(2)[:, 2]  # no opponent colour used here is without blue or green alone
    patterns = torch.where(patterns.norm(dim=1, keepdim=True) > 0.1, patterns, bank[16:].flatten(2)[:, 0])
    again = (F.normalize(patterns, dim=1) @ similarity[1].T).abs().argmax(dim=1)
    doubled = {tuple(packets.packet[i].abs().tolist()[:2]) for i in again.tolist()}
    assert len(set(again.tolist())) == 8 and doubled == {(0, 1), (1, 0), (1, 1), (2, 2)}


def test_thirty_two_filters_are_the_lowest_packets_in_all_orientations():
    packets, bank = packet_kernels(11, 3), wavelet_bank(32, 3, 11, 3)
    assert_close("bank", bank[:, 0] * math.sqrt(3), packets.kernels[:32].float())
    chosen = {tuple(packet) for packet in packets.packet[:32].tolist()}
    assert chosen == {(ix, iy, sign) for iy, ix, sign in chosen} == {(iy, ix, -sign) for iy, ix, sign in chosen}
    frequency = packets.center_frequency.norm(dim=1)
    assert frequency[:32].max() < frequency[32:].min()


def test_whole_orbits_come_first():
    packets = packet_kernels(7, 2)
    for count, expected in [(6, {0, 1}), (8, {0, 1, 4}), (7, {0, 1, 2})]:
        bank = wavelet_bank(count, 1)
        rows = (bank[:, 0].flatten(1) @ packets.kernels.float().flatten(1).T).argmax(dim=1)
        assert set(packets.orbit[rows].tolist()) == expected


@pytest.mark.parametrize("taps, depth", [(9, 2), (17, 3)])
def test_the_filters_have_their_packets_frequency_and_orientation(taps, depth):
    packets = packet_kernels(taps, depth)
    stats = analyze(wavelet_bank(16, 1, taps, depth), stride=2 ** (depth - 1))
    whole = dtcwpt_filters(depth).kernels.real[rows_of(packets.packet[:16], depth)]
    expected = analyze(whole[:, None])
    turn = stats.orientation - expected.orientation
    turn = (turn + math.pi / 2).remainder(math.pi) - math.pi / 2
    assert turn.abs().max() < math.radians(2)
    assert (stats.frequency - expected.frequency).abs().max() < 0.07
    assert stats.dc_share.max() < 1e-10
    assert orientation(packets.center_frequency[:16]).unique().numel() >= 8


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"num_channels": 0}, "num_channels=0"),
        ({"num_channels": 8, "in_channels": 0}, "in_channels=0"),
        ({"num_channels": 81}, "at most 80 channels .* got 81"),
        ({"num_channels": 17, "in_channels": 1}, "at most 16 channels"),
        ({"num_channels": 8, "depth": 1}, "depth of 2 or 3, got depth=1"),
        ({"num_channels": 8, "kernel_size": 2}, "kernel_size=2"),
        ({"num_channels": 8, "kernel_size": 31}, "from 3 to 29"),
    ],
)
def test_bank_errors_name_the_number(arguments, message):
    with pytest.raises(ValueError, match=message):
        wavelet_bank(**arguments)
