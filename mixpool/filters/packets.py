"""The filters of the 2-D dual-tree complex wavelet packet transform: oriented, complex, they tile the frequency plane.

Legend: J depth, P = 2**J packets per axis, n = 2 * P * P complex packets, k taps per side.
Frequencies are (fy, fx) in radians per pixel, Nyquist is pi, y points down.

Two real orthonormal wavelet packet trees per axis are grown so that tree 1 + i * tree 2 has energy at positive
frequencies only (Bayram & Selesnick, On the Dual-Tree Complex Wavelet Packet and M-Band Transforms, IEEE TSP 56(6),
2008):

- level 1: the family's pair "a" in both trees, low and high both one sample later in tree 2;
- then, as long as the path has taken no high branch after level 1, pair "a" in tree 1 and pair "b" in tree 2;
- after such a branch pair "a" in both trees: what is a Hilbert pair stays one under a filter common to both.

All P packets of an axis are then one-sided but the lowest and the highest, which reach the frequencies 0 and pi. (Were
the high filter of level 1 one sample earlier in tree 2, the trees would have to exchange their roles after it.)

Conventions. Kernels are applied as torch applies them, by cross-correlation. The spectrum `fft2(kernel)` lies around
+center_frequency; so a packet answers to exp(i <xi, n>) for xi near -center_frequency, and its coefficients for a real
image turn as exp(-i <center_frequency, n>). Each kernel has norm 1 / sqrt(2), so that at the stride 2**J image and
coefficients have the same energy ("qshift_32" up to 1e-8, the rounding of its table).
"""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

MAX_DEPTH = 4
SPECTRUM_SIZE = 4096  # bins of the 1-D spectra; eight times the longest kernel (467 taps)


@dataclass(frozen=True, eq=False)
class PacketFilters:
    """The complex packets of one depth and tap family. All tensors are on the CPU, rows are packets.

    A packet is the product of one 1-D packet of each axis, psi_iy(y) psi_ix(x) or psi_iy(y) conj(psi_ix(x)).

    Attributes:
        depth: levels J.
        wavelet: name of the tap family.
        axis_kernels: (P, k) complex128, the 1-D packets by rising frequency; packet i fills [i, i + 1] * pi / P.
        packet: (n, 3) int64, (iy, ix, sign); sign -1 has the conjugate along x, hence fx < 0.
        center_frequency: (n, 2) float64, (fy, fx) in radians per pixel, fy > 0: the centroid of the energy in the
            packet's own quadrant.
        negative_energy: (n, 2) float64, energy on the wrong side of zero over that on the right side, for fy and fx;
            0 is perfectly analytic. At depth 3 of "qshift_a" at most 0.0025, and 0.17 for the two outermost bands.
    """

    depth: int
    wavelet: str
    axis_kernels: Tensor
    packet: Tensor
    center_frequency: Tensor
    negative_energy: Tensor

    @property
    def kernels(self) -> Tensor:
        """(n, k, k) complex128 of norm 1 / sqrt(2), built at each access: 8 MiB at depth 3 of "qshift_a"."""
        along_y = self.axis_kernels[self.packet[:, 0]]
        along_x = self.axis_kernels[self.packet[:, 1]]
        along_x = torch.where(self.packet[:, 2:] > 0, along_x, along_x.conj())
        return along_y[:, :, None] * along_x[:, None, :]

    @property
    def kernel_size(self) -> int:
        """Taps k per side, odd: 11, 29, 65, 137 at depths 1 to 4 of "qshift_a"."""
        return self.axis_kernels.shape[1]

    def is_analytic(self, limit: float = 0.05) -> Tensor:
        """(n,) bool: the packet is one-sided along both axes."""
        return (self.negative_energy < limit).all(dim=1)

    def __len__(self) -> int:
        return len(self.packet)


def dtcwpt_filters(depth: int, wavelet: str = "qshift_a") -> PacketFilters:
    """All packets of the transform as explicit filters.

    Args:
        depth: levels J, 1 to 4.
        wavelet: a q-shift family of pytorch_wavelets, by rising length and analyticity "qshift_06", "qshift_a" (10
            taps), "qshift_b" (14), "qshift_c" (16), "qshift_d" (18), "qshift_32".
    Returns:
        PacketFilters; packet (iy, ix, sign) is row (iy * P + ix) * 2 + (0 for sign +1, 1 for sign -1).
    Raises:
        ValueError: the depth is out of range, or there is no such tap family (the message lists them).
        ModuleNotFoundError: pytorch_wavelets is not installed.
    Example:
        >>> from mixpool.filters.packets import dtcwpt_filters
        >>> tuple(dtcwpt_filters(2).kernels.shape)
        (32, 29, 29)
    """
    trees = torch.from_numpy(_trees(depth, wavelet).copy())
    axis_kernels = torch.complex(trees[:, 0], trees[:, 1])
    half = SPECTRUM_SIZE // 2
    power = torch.fft.fft(axis_kernels, SPECTRUM_SIZE).abs().square()
    positive, negative = power[:, : half + 1], power.roll(half, dims=1)[:, : half + 1]  # 0 .. pi and -pi .. 0
    energy = torch.trapezoid(positive)
    ratio = torch.trapezoid(negative) / energy
    frequency = torch.linspace(0, math.pi, half + 1, dtype=power.dtype, device="cpu")
    centroid = torch.trapezoid(positive * frequency) / energy

    index = torch.arange(len(axis_kernels), device="cpu")  # whatever the default device
    packet = torch.cartesian_prod(index, index, torch.tensor([1, -1], device="cpu"))
    i, j, sign = packet.unbind(dim=1)
    return PacketFilters(
        depth=depth,
        wavelet=wavelet,
        axis_kernels=axis_kernels,
        packet=packet,
        center_frequency=torch.stack([centroid[i], sign * centroid[j]], dim=1),
        negative_energy=torch.stack([ratio[i], ratio[j]], dim=1),
    )


@lru_cache(maxsize=None, typed=True)
def _trees(depth: int, wavelet: str) -> np.ndarray:
    """(P, 2, k) float64: the equivalent filters of both trees, by rising frequency; each of norm 2**(-3/4)."""
    if type(depth) is not int or not 1 <= depth <= MAX_DEPTH:
        raise ValueError(f"expected a depth from 1 to {MAX_DEPTH}, got {depth!r}")
    taps = _load_taps(wavelet)
    primal = taps["h0a"], taps["h1a"]
    dual = taps["h0b"], -taps["h1b"]  # this sign puts every packet on the positive side
    # A node is its filter in tree 1, that in tree 2, and whether the trees go on with different pairs.
    nodes = [(np.pad(taps, (0, 1)), np.pad(taps, (1, 0)), True) for taps in primal]
    for level in range(1, depth):
        children = []
        for i, (first, second, differ) in enumerate(nodes):
            pair = dual if differ else primal
            low, high = (
                (_cascade(first, primal[branch], level), _cascade(second, pair[branch], level)) for branch in (0, 1)
            )
            split = [(*low, differ), (*high, False)]
            # Decimating a high band mirrors it; the nodes of odd number have taken an odd number of high branches.
            children += split if i % 2 == 0 else split[::-1]
        nodes = children
    # Four real orthonormal bases, and each of their coefficients enters two packets: hence 1 / sqrt(8) in 2-D.
    return np.stack([[first, second] for first, second, _ in nodes]) * 8**-0.25


def _cascade(kernel: np.ndarray, taps: np.ndarray, level: int) -> np.ndarray:
    """Equivalent filter of `kernel`, decimation by 2**level, and `taps`."""
    dilated = np.zeros((len(taps) - 1) * 2**level + 1)
    dilated[:: 2**level] = taps
    return np.convolve(kernel, dilated)


def _load_taps(wavelet: str) -> dict[str, np.ndarray]:
    """The four q-shift filters of a family, (L,) each, from the tables of pytorch_wavelets, which is not imported."""
    # pytorch_wavelets 1.3.0 imports pkg_resources, which setuptools has dropped: its import would fail.
    spec = importlib.util.find_spec("pytorch_wavelets")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("the tap tables need pytorch_wavelets, which is not installed")
    tables = {path.stem: path for path in (Path(spec.origin).parent / "dtcwt" / "data").glob("qshift_*.npz")}
    # A "_bp" table is another family's pair and a third, band-pass filter, which a two-band tree has no use for.
    known = sorted(name for name in tables if not name.endswith("_bp"))
    if wavelet not in known:
        raise ValueError(f"expected a q-shift family of {known}, got {wavelet!r}")
    with np.load(tables[wavelet]) as table:
        return {name: table[name].ravel().astype(np.float64) for name in ("h0a", "h1a", "h0b", "h1b")}
