"""The filters of the packets: analytic, tiling the plane, equal to the DT-CWT's trees, whatever tap family they are of.

Legend: J depth, P = 2**J packets per axis, n = 2 * P * P packets, k taps per side, s stride, N C H W images.
"""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from packet_filters import FAMILIES, cached_filters, explicit
from torch import Tensor

from mixpool.filters.packets import PacketFilters, _load_taps, dtcwpt_filters

NUM_TAPS = dict(zip(FAMILIES, (10, 10, 14, 16, 18, 32)))


def axis_bank(filters: PacketFilters) -> Tensor:
    """(P, 4096) energy spectra of the 1-D packets; bin b is at 2 pi b / 4096 radians per pixel."""
    return torch.fft.fft(filters.axis_kernels, 4096).abs().square()


# --- filters ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("wavelet", FAMILIES)
def test_shapes_norms_and_numbering(depth: int, wavelet: str):
    filters = cached_filters(depth, wavelet)
    packets, taps = 2**depth, NUM_TAPS[wavelet]
    size = taps + 1 + (taps - 1) * (2**depth - 2)
    assert filters.kernel_size == size and size % 2 == 1 and len(filters) == 2 * packets**2
    assert filters.kernels.shape == (2 * packets**2, size, size) and filters.kernels.dtype == torch.complex128
    # The taps of qshift_32 are rounded to 1e-9 relative to an orthonormal pair.
    assert torch.allclose(filters.kernels.abs().square().sum(dim=(1, 2)), torch.tensor(0.5).double(), atol=2e-8, rtol=0)
    iy, ix, sign = filters.packet.unbind(dim=1)
    assert torch.equal((iy * packets + ix) * 2 + (1 - sign) // 2, torch.arange(len(filters)))
    assert filters.center_frequency.dtype == torch.float64 and (filters.center_frequency[:, 0] > 0).all()
    assert torch.equal(filters.center_frequency[:, 1].sign(), sign.double())


# Largest energy ratio of an interior 1-D packet and that of the two outer ones, at depths 2 and 3.
ANALYTICITY = {
    "qshift_06": (0.0034, 0.206, 0.0070, 0.173),
    "qshift_a": (0.0016, 0.205, 0.0025, 0.172),
    "qshift_b": (0.0001, 0.223, 0.0001, 0.224),
    "qshift_c": (0.0001, 0.221, 0.0001, 0.220),
    "qshift_d": (0.0001, 0.224, 0.0001, 0.230),
    "qshift_32": (0.0001, 0.222, 0.0001, 0.222),
}


@pytest.mark.parametrize("wavelet", FAMILIES)
@pytest.mark.parametrize("depth", [2, 3])
def test_all_packets_but_the_outermost_are_analytic(depth: int, wavelet: str):
    filters, last = cached_filters(depth, wavelet), 2**depth - 1
    interior, outer = ANALYTICITY[wavelet][2 * depth - 4 : 2 * depth - 2]
    is_outer = (filters.packet[:, :2] == 0) | (filters.packet[:, :2] == last)
    assert filters.negative_energy[~is_outer].max() < interior + 5e-5
    assert (filters.negative_energy[is_outer] - outer).abs().max() < 1e-3
    assert torch.equal(filters.is_analytic(), ~is_outer.any(dim=1))
    assert filters.is_analytic().sum() == {2: 8, 3: 72}[depth]
    assert filters.is_analytic(limit=0.5).all()


def test_the_ratios_are_those_of_the_kernels():
    filters, size = cached_filters(2), 128
    energy = torch.fft.fft2(filters.kernels, s=(size, size)).abs().square()
    for axis in (0, 1):
        line = energy.sum(dim=2 - axis)
        up, down = line[:, : size // 2 + 1], torch.cat([line[:, size // 2 :], line[:, :1]], dim=1)
        if axis == 1:
            is_plus = filters.packet[:, 2:] > 0
            up, down = torch.where(is_plus, up, down), torch.where(is_plus, down, up)
        ratio = torch.trapezoid(down) / torch.trapezoid(up)
        torch.testing.assert_close(ratio, filters.negative_energy[:, axis], atol=1e-3, rtol=0)


@pytest.mark.parametrize("wavelet", ["qshift_06", "qshift_a", "qshift_b"])
@pytest.mark.parametrize("depth", [2, 3, 4])
def test_center_frequencies_tile_the_plane(depth: int, wavelet: str):
    filters, packets = cached_filters(depth, wavelet), 2**depth
    band = filters.center_frequency.abs() * packets / math.pi
    assert torch.equal(band.floor().long(), filters.packet[:, :2]), "one packet in each square, and in its own"
    cells = (filters.center_frequency * packets / math.pi).floor().long()
    assert len(set(map(tuple, cells.tolist()))) == len(filters)
    # The peaks too: bin / 4096 * 2 pi, in units of the band.
    peak = axis_bank(filters).argmax(dim=1) / 4096 * 2 * packets
    assert torch.equal(peak.floor().long(), torch.arange(packets))
    centroid = band[filters.packet[:, 0] == filters.packet[:, 1], 0][::2]
    assert (peak - centroid).abs().max() < {2: 0.25, 3: 0.4, 4: 0.6}[depth]


def test_kernels_peak_at_their_center_frequency():
    filters = cached_filters(2)
    energy = torch.fft.fft2(filters.kernels, s=(64, 64)).abs().square()
    index = energy.flatten(1).argmax(dim=1)
    peak = torch.stack([index // 64, index % 64], dim=1)
    peak = torch.where(peak >= 32, peak - 64, peak) * (2 * math.pi / 64)
    assert ((peak - filters.center_frequency).abs() < math.pi / 4 * 0.3).all()


def test_spectra_of_all_packets_sum_to_a_constant():
    energy = torch.fft.fft2(cached_filters(2).kernels, s=(64, 64)).abs().square().sum(dim=0)
    mirrored = energy.flip(0, 1).roll((1, 1), dims=(0, 1))
    assert torch.allclose((energy + mirrored) / 2, torch.tensor(16.0).double(), atol=1e-10)


def test_filters_of_one_call_are_their_own():
    filters = dtcwpt_filters(2)
    filters.axis_kernels.zero_()
    assert dtcwpt_filters(2).axis_kernels.abs().sum() > 0


def test_filters_are_on_the_cpu_whatever_the_default_device():
    with torch.device("meta"):
        filters = dtcwpt_filters(2)
    assert torch.equal(filters.kernels, cached_filters(2).kernels)
    assert torch.equal(filters.center_frequency, cached_filters(2).center_frequency)


# --- an independent transform, level by level -------------------------------------------------------------------------


def packet_tree(x: Tensor, depth: int, wavelet: str, rule: str = "paper") -> Tensor:
    """(P, 2, ..., L / P): both real packet trees along the last axis, filtered and decimated level by level, circular.

    Rules that break the pairing: "no_switch", tree 2 keeps its own pair after a high branch; "early_switch", it has
    it on level 2 only; "advance", the high filter of level 1 comes one sample earlier in tree 2, not later.
    """
    taps = _load_taps(wavelet)

    def branch(x: Tensor, h: np.ndarray, delay: int = 0) -> Tensor:
        return sum(float(h[m]) * x.roll(-m - delay, dims=-1) for m in range(len(h)))[..., ::2]

    delays = (1, -1 if rule == "advance" else 1)
    nodes = {(i,): (branch(x, taps[f"h{i}a"]), branch(x, taps[f"h{i}a"], delays[i])) for i in (0, 1)}
    for level in range(1, depth):
        children = {}
        for path, (first, second) in nodes.items():
            is_common = (any(path[1:]) and rule != "no_switch") or (rule == "early_switch" and level > 1)
            for i in (0, 1):
                # h1b changes its sign, so that all packets come to the same side.
                other = taps[f"h{i}a"] if is_common else taps[f"h{i}b"] * (-1) ** i
                children[(*path, i)] = (branch(first, taps[f"h{i}a"]), branch(second, other))
        nodes = children
    # By rising frequency: the bits of the packet's number are the parities of the high branches so far (Gray code).
    number = {path: sum((sum(path[: i + 1]) % 2) << (depth - 1 - i) for i in range(depth)) for path in nodes}
    return torch.stack([torch.stack(nodes[path]) for path in sorted(nodes, key=number.__getitem__)])


def interior_ratios(wavelet: str, rule: str) -> Tensor:
    """(6,) negative over positive energy of the interior 1-D packets at depth 3; below 1 also for the wrong side."""
    impulses = torch.eye(256, dtype=torch.float64)
    first, second = packet_tree(impulses, 3, wavelet, rule)[1:-1, :, :, 0].unbind(dim=1)  # (P - 2, 256), the kernels
    energy = torch.fft.fft(torch.complex(first, second)).abs().square()
    sides = torch.stack([energy[:, 1:128].sum(dim=1), energy[:, 129:].sum(dim=1)])
    return sides.amin(dim=0) / sides.amax(dim=0)


def test_analyticity_depends_on_the_rule():
    for wavelet in ("qshift_a", "qshift_b"):
        assert (interior_ratios(wavelet, "paper") < 0.003).all()
        assert (interior_ratios(wavelet, "no_switch") > 0.04).sum() == 4
        assert (interior_ratios(wavelet, "early_switch") > 0.04).sum() == 2
        spoilt = interior_ratios(wavelet, "advance")
        assert (spoilt > 0.05).sum() == 3 and spoilt.max() > 0.5, "the packets of the upper half band"


@pytest.mark.parametrize("wavelet", ["qshift_a", "qshift_b"])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_packets_are_the_decimated_filter_bank(depth: int, wavelet: str):
    x = torch.randn(2, 1, 32, 48, dtype=torch.float64)
    filters = cached_filters(depth, wavelet)
    half = filters.kernel_size // 2
    along_x = packet_tree(x.roll((half, half), dims=(2, 3)), depth, wavelet)  # (Px, tree, N, C, H, W')
    trees = packet_tree(along_x.transpose(-1, -2), depth, wavelet)  # (Py, tree, Px, tree, N, C, W', H')
    trees = trees.permute(4, 5, 0, 2, 1, 3, 7, 6)  # (N, C, Py, Px, tree_y, tree_x, H', W')
    (aa, ab), (ba, bb) = (tree.unbind(4) for tree in trees.unbind(4))
    expected = torch.stack([torch.complex(aa - bb, ab + ba), torch.complex(aa + bb, ba - ab)], dim=4) / math.sqrt(8)
    out = explicit(x, filters, 2**depth, "circular")
    torch.testing.assert_close(out, expected.flatten(2, 4), atol=1e-10, rtol=0)


# --- errors and imports -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [0, 5, -1, 2.0, "2", True])
def test_depth_must_be_one_to_four(depth):
    dtcwpt_filters(2), dtcwpt_filters(1)  # what is cached does not excuse what is wrong
    with pytest.raises(ValueError, match="expected a depth from 1 to 4, got"):
        dtcwpt_filters(depth)


@pytest.mark.parametrize("wavelet", ["haar", "qshift_b_bp", "farras", "near_sym_a", ""])
def test_unknown_wavelets_name_the_known_ones(wavelet: str):
    with pytest.raises(ValueError) as error:
        dtcwpt_filters(2, wavelet)
    assert all(repr(name) in str(error.value) for name in (*FAMILIES, wavelet))


def test_tables_are_read_without_importing_what_breaks():
    code = (
        "import sys, mixpool.filters.packets as d; d.dtcwpt_filters(2); "
        "print({'pytorch_wavelets', 'pywt', 'scipy', 'pkg_resources'} & set(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert out.stdout.strip() == "set()"
