"""The experiment of the theory's paper: all wavelet packets on photographs, both poolings, under shifts of the image.

Gray photographs go through the dual-tree packets of depth J at stride m = 2^(J-1), as a convolution of that stride
would apply them; the real part is max-pooled, the modulus pooled, both over 3 x 3 windows at stride 2 (`comparison`
defines the poolings and every number). Beside what is measured stands what `theory` says of each packet's frequency.

The image really moves: the crop that the packets see slides over a larger photograph by u pixels, so that new content
comes in and nothing is rolled; and output positions within a kernel's reach of the crop's border are not looked at.
Half a pixel is a translation of the band-limited image whose samples the pixels are (`translated`). It is the one that
keeps the spectrum, hence every packet's energy: linear or bicubic interpolation blurs, and both poolings would seem to
change by the blur.

Legend: N photographs, n packets, S shifts, D directions; rows of instabilities run over directions, then over shifts.
Source: Leterme, Polisano, Perrier, Alahari, arXiv 2209.11740.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.kit.dtcwpt import DTCWPT
from benchmarks.theory.closed_forms import max_shift_change
from benchmarks.theory.gap_parts import GapParts, gap_parts, gap_sums
from benchmarks.theory.resample import resample
from benchmarks.theory.translated import translated
from mixpool import records
from mixpool.evaluation.shifts import DIRECTIONS, shifted_crop
from mixpool.filters.packets import PacketFilters, dtcwpt_filters
from mixpool.filters.theory import expected_gap, modulus_shift_bound
from mixpool.selection.compare import Comparison, PoolingStats, pool_both

DEPTHS = (2, 3, 4)  # at depth 1 no packet is analytic
SHIFTS = (0.5, 1, 1.5, 2, 3, 4, 6, 8)  # pixels
LUMINANCE = (0.299, 0.587, 0.114)  # ITU-R BT.601, of R, G, B as they are stored
WINDOW = 3
DRAWS = 1000  # of the bootstrap
REFERENCE = ("horizontal", 1.0)  # the direction and the shift that the summary speaks of
CROWDED = 0.3  # gamma above which a packet's phases pile up; between 0.14 and 0.66 there is none at depths 2 and 3

Predictor = Callable[..., PoolingStats]  # (weight (n, 1, k, k), stride, weight_imag=...), as `prediction.predict`


@dataclass(frozen=True, eq=False)
class Experiment:
    """What was measured and what was expected; tensors are float64, packets in the order of `filters`.

    Attributes:
        filters: the packets.
        stride: m, pixels per step.
        num_photos: N.
        crop: side of the square that the packets see, pixels.
        num_positions: output positions per photograph and packet.
        directions, shifts: of the image; shifts in pixels.
        measured: over all photographs; instabilities (D * S, n).
        parts: of the gap, with one assumption of the theory made true; see `gap_parts`.
        expected_gap: (n,) the theory's gamma.
        expected_change: (D * S, n) its closed-form instability of RMax.
        bound: (D * S,) alpha, its bound of CMod's instability (kappa = pi / m).
        predicted: what a predictor said from the filters alone, for one pixel to the side; None without one.
        intervals: name of a number of the summary -> its 95 % interval over photographs; empty for one photograph.
    """

    filters: PacketFilters
    stride: int
    num_photos: int
    crop: int
    num_positions: int
    directions: tuple[str, ...]
    shifts: tuple[float, ...]
    measured: PoolingStats
    parts: GapParts
    expected_gap: Tensor
    expected_change: Tensor
    bound: Tensor
    predicted: PoolingStats | None = None
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)

    def row(self, direction: str = REFERENCE[0], shift: float = REFERENCE[1]) -> int:
        """Row of the instabilities for one direction and shift."""
        return self.directions.index(direction) * len(self.shifts) + self.shifts.index(shift)

    def summary(self) -> dict[str, float]:
        """The numbers of the experiment, over the analytic packets; NaN where there are too few.

        Changes and correlations with them are for 1 pixel to the side. Those in `_measured_numbers` have an interval.
        """
        kept, spread = self._analytic(), self._analytic(spread=True)
        gap, gamma, expected = self.measured.gap, self.expected_gap, self.expected_change[self.row()]
        flat, turning, blurred = self.parts
        numbers = self._measured_numbers(self.measured) | {
            "mean_gamma": gamma[kept].mean(),
            "mean_expected_change": expected[kept].mean(),
            "mean_gap_flat_envelope": flat[kept].mean(),
            "mean_gap_theory_phases": turning[kept].mean(),
            "correlation_theory_phases_gap": _correlation(turning[kept], gap[kept]),
            "correlation_theory_phases_gap_spread": _correlation(turning[spread], gap[spread]),
            "correlation_gamma_blurred_gap": _correlation(gamma[kept], blurred[kept]),
            # A shift of 0 has 0 / 0.
            "largest_share_of_bound": (self.measured.instability_blur1[:, kept] / self.bound[:, None])
            .nan_to_num()
            .max(),
        }
        return {name: number.item() for name, number in numbers.items()}

    def _analytic(self, spread: bool = False) -> Tensor:
        """Indices of the analytic packets; with `spread` of those of them whose phases do not pile up."""
        mask = self.filters.is_analytic()
        return (mask & (self.expected_gap < CROWDED) if spread else mask).nonzero()[:, 0]

    def _turned(self, gap: Tensor, shift: float) -> Tensor:
        """(..., n) change of RMax - CMod over CMod under a shift to the side, were it a wave of the packet's frequency.

        A wave of root mean square `gap`, minus itself turned by <theta, u>.
        """
        return gap * 2 * (self.filters.center_frequency[:, 1] * shift / 2).sin().abs()

    def _measured_numbers(self, stats: PoolingStats) -> dict[str, Tensor]:
        """The summary's numbers that depend on the photographs, (...) for stats (..., n) and (..., D * S, n)."""
        kept, spread, row = self._analytic(), self._analytic(spread=True), self.row()
        gamma, gap, moved = self.expected_gap, stats.gap, stats.instability_max[..., row, :]
        numbers = {
            "correlation_gamma_gap": _correlation(gamma[kept], gap[..., kept]),
            "correlation_gamma_gap_spread": _correlation(gamma[spread], gap[..., spread]),
            "correlation_gap_change": _correlation(gap[..., kept], moved[..., kept]),
            "correlation_gap_change_spread": _correlation(gap[..., spread], moved[..., spread]),
            "correlation_expected_change": _correlation(self.expected_change[row, kept], moved[..., kept]),
            "correlation_turned_gap": _correlation(self._turned(gap, 1.0)[..., kept], moved[..., kept]),
            "mean_gap": gap[..., kept].mean(dim=-1),
            "mean_correlation_blur1": stats.correlation_blur1[..., kept].mean(dim=-1),
            "mean_correlation_blur3": stats.correlation_blur3[..., kept].mean(dim=-1),
        }
        if 0.5 in self.shifts:
            moved_half = stats.instability_max[..., self.row(shift=0.5), :]
            numbers["correlation_gap_change_half"] = _correlation(gap[..., kept], moved_half[..., kept])
            turned = self._turned(gap, 0.5)
            numbers["correlation_turned_gap_half"] = _correlation(turned[..., kept], moved_half[..., kept])
        for direction in self.directions:
            row = self.row(direction)
            change = {
                "max": stats.instability_max[..., row, kept].mean(dim=-1),
                "blur1": stats.instability_blur1[..., row, kept].mean(dim=-1),
                "blur3": stats.instability_blur3[..., row, kept].mean(dim=-1),
            }
            numbers |= {f"change_{name}_{direction}": mean for name, mean in change.items()}
            numbers |= {f"ratio_{name}_{direction}": change["max"] / change[name] for name in ("blur1", "blur3")}
        if self.predicted is not None:
            predicted_gap, predicted_change = self.predicted.gap, self.predicted.instability_max[0]
            numbers |= {
                "correlation_predicted_gap": _correlation(predicted_gap[kept], gap[..., kept]),
                "correlation_predicted_gap_spread": _correlation(predicted_gap[spread], gap[..., spread]),
                "correlation_predicted_change": _correlation(predicted_change[kept], moved[..., kept]),
                "error_predicted_gap": (predicted_gap[kept] - gap[..., kept]).abs().mean(dim=-1),
                "error_predicted_change": (predicted_change[kept] - moved[..., kept]).abs().mean(dim=-1),
            }
        return numbers

    def as_record(self, photos: str) -> dict[str, Any]:
        """Everything as one record; per packet, instabilities per direction, shift and packet; None for NaN.

        Args:
            photos: where the photographs came from.
        """
        grid = len(self.directions), len(self.shifts)
        measured, filters = self.measured, self.filters
        arrays = {
            "center_frequency": filters.center_frequency,
            "negative_energy": filters.negative_energy,
            "gamma": self.expected_gap,
            "gap": measured.gap,
            "correlation_blur1": measured.correlation_blur1,
            "correlation_blur3": measured.correlation_blur3,
            **{f"gap_{name}": part for name, part in self.parts._asdict().items()},
            "expected_change": self.expected_change.unflatten(0, grid),
            "change_max": measured.instability_max.unflatten(0, grid),
            "change_blur1": measured.instability_blur1.unflatten(0, grid),
            "change_blur3": measured.instability_blur3.unflatten(0, grid),
            "bound": self.bound.unflatten(0, grid),
        }
        if 0.5 in self.shifts:
            arrays["turned_gap_half"] = self._turned(measured.gap, 0.5)
        if self.predicted is not None:
            arrays |= {"predicted_gap": self.predicted.gap, "predicted_change": self.predicted.instability_max[0]}
        return records.stamp(
            "theory",
            photos=photos,
            num_photos=self.num_photos,
            params={
                "depth": filters.depth,
                "wavelet": filters.wavelet,
                "stride": self.stride,
                "window": WINDOW,
                "crowded_gamma": CROWDED,
                "crop": self.crop,
                "positions_per_photo": self.num_positions,
                "directions": list(self.directions),
                "shifts": list(self.shifts),
            },
            num_packets=len(filters),
            num_analytic=len(self._analytic()),
            num_crowded=len(self._analytic()) - len(self._analytic(spread=True)),
            is_analytic=filters.is_analytic().tolist(),
            summary=_plain(self.summary()),
            ci95=_plain(self.intervals),
            **{name: _plain(array.tolist()) for name, array in arrays.items()},
        )


@torch.no_grad()
def run_experiment(
    photos: Tensor,
    depth: int,
    *,
    wavelet: str = "qshift_a",
    shifts: Sequence[float] = SHIFTS,
    directions: Sequence[str] = tuple(DIRECTIONS),
    predict: Predictor | None = None,
    draws: int = DRAWS,
    track: Callable[[Iterable, int], Iterable] = lambda steps, total: steps,
) -> Experiment:
    """Measure gap and instability of both poolings of all packets, and put the theory beside them.

    Args:
        photos: (N, 3, H, W) RGB or (N, 1, H, W) gray, in [0, 1]; the largest centred square that can move is used.
        depth: levels J of the packets, 2 to 4.
        wavelet: as for `dtcwpt_filters`.
        shifts: pixels, not negative, any fraction; 1 must be among them.
        directions: of "horizontal", "vertical", "diagonal" (k pixels along both axes); the first must be among them.
        predict: called once as predict(weight, stride, weight_imag=...), weight (n, 1, k, k) the real parts; its answer
            is kept in `predicted`.
        draws: of the bootstrap over photographs.
        track: wraps the loop over photographs, (iterable, total), for a progress bar.
    Raises:
        ValueError: an argument is out of its range, or the photographs are blank or too small for the kernels.
    Example:
        >>> import torch
        >>> from benchmarks.theory.experiment import run_experiment
        >>> run_experiment(torch.rand(2, 1, 64, 64), depth=2, shifts=[1]).measured.instability_max.shape
        torch.Size([3, 32])
    """
    _check(photos, depth, shifts, directions)
    filters = dtcwpt_filters(depth, wavelet)
    stride = 2 ** (depth - 1)
    least = smallest_photo(depth, wavelet, max(shifts))
    if min(photos.shape[-2:]) < least:
        raise ValueError(
            f"expected photos of at least {least} pixels (depth {depth} of {wavelet} has kernels of "
            f"{filters.kernel_size}, shifts go up to {max(shifts):g}), got {photos.shape[-2]} x {photos.shape[-1]}"
        )
    crop = min(photos.shape[-2:]) - 2 * math.ceil(max(shifts))
    cut = _cut(filters.kernel_size, stride)
    packets = DTCWPT(depth, wavelet, stride=stride)

    def maps(image: Tensor) -> tuple[Tensor, Tensor]:
        z = packets(image)[:, 0, :, cut:-cut, cut:-cut]
        layout = torch.channels_last
        return z.real.contiguous(memory_format=layout), z.imag.contiguous(memory_format=layout)

    # Photo by photo: the maps stay small, and the bootstrap needs each photo's sums.
    parts, whole = [], Comparison()
    parts_of_gap = torch.zeros(5, len(filters), dtype=torch.float64)
    for photo in track(_gray(photos).split(1), len(photos)):
        real, imag = maps(shifted_crop(photo, crop, 0))
        before = pool_both(real, imag, WINDOW)
        after = [
            pool_both(*maps(_moved(photo, crop, u, direction)), WINDOW) for direction in directions for u in shifts
        ]
        part = Comparison()
        part.add(before, after)
        parts.append(part)
        whole.update(part)
        parts_of_gap += gap_sums(real, imag, before, filters.center_frequency * stride)

    steps = torch.tensor([DIRECTIONS[direction] for direction in directions], dtype=torch.float64)
    vectors = torch.cat([step * torch.tensor(shifts, dtype=torch.float64)[:, None] for step in steps])  # (D * S, 2)
    theta = filters.center_frequency
    experiment = Experiment(
        filters=filters,
        stride=stride,
        num_photos=len(photos),
        crop=crop,
        num_positions=before.max.shape[-2] * before.max.shape[-1],
        directions=tuple(directions),
        shifts=tuple(float(u) for u in shifts),
        measured=whole.result(),
        parts=gap_parts(parts_of_gap),
        expected_gap=expected_gap(theta, stride, WINDOW),
        expected_change=max_shift_change(theta, vectors[:, None], stride, WINDOW),
        bound=modulus_shift_bound(math.pi / stride, vectors),
        predicted=None if predict is None else _predicted(predict, filters, stride),
    )
    experiment.intervals.update(_intervals(experiment, parts, draws))
    return experiment


def smallest_photo(depth: int, wavelet: str = "qshift_a", max_shift: float = max(SHIFTS)) -> int:
    """Pixels per side under which no output position is out of the border's reach at all shifts.

    Raises:
        ValueError: as `dtcwpt_filters`.
    """
    stride = 2 ** (depth - 1)
    cut = _cut(dtcwpt_filters(depth, wavelet).kernel_size, stride)
    return (2 * cut + WINDOW - 1) * stride + 1 + 2 * math.ceil(max_shift)


def _cut(kernel_size: int, stride: int) -> int:
    """Positions of the map at each side that a kernel centred there does not fit into the image."""
    return -(-(kernel_size // 2) // stride)


# --- images -----------------------------------------------------------------------------------------------------------


def _moved(photo: Tensor, crop: int, shift: float, direction: str) -> Tensor:
    """The crop, moved: by whole pixels as a slice, and by the rest, if any, as a translation of the whole photo."""
    whole = math.floor(shift)
    if shift != whole:
        photo = translated(photo, shift - whole, direction)
    return shifted_crop(photo, crop, whole, direction)


def _gray(photos: Tensor) -> Tensor:
    """(N, 1, H, W): luminance."""
    if photos.shape[1] == 1:
        return photos
    return torch.einsum("nchw,c->nhw", photos, photos.new_tensor(LUMINANCE))[:, None]


# --- numbers ----------------------------------------------------------------------------------------------------------


def _check(photos: Tensor, depth: int, shifts: Sequence[float], directions: Sequence[str]) -> None:
    if photos.ndim != 4 or photos.shape[1] not in (1, 3) or len(photos) == 0 or not photos.is_floating_point():
        raise ValueError(f"expected floating-point photos (N, 3 or 1, H, W), got {tuple(photos.shape)} {photos.dtype}")
    if photos.amax() == photos.amin():
        raise ValueError(f"expected photos that show something, got {photos.amin().item():g} at every pixel")
    if depth not in DEPTHS:
        raise ValueError(f"expected a depth from {DEPTHS[0]} to {DEPTHS[-1]}, got {depth}")
    if REFERENCE[1] not in shifts or not all(u >= 0 for u in shifts):
        raise ValueError(f"expected shifts of at least 0 pixels, 1 among them, got {tuple(shifts)}")
    if REFERENCE[0] not in directions or not set(directions) <= set(DIRECTIONS):
        raise ValueError(f"expected directions out of {tuple(DIRECTIONS)}, the first among them, got {directions!r}")


def _predicted(predict: Predictor, filters: PacketFilters, stride: int) -> PoolingStats:
    kernels = filters.kernels[:, None].to(torch.complex64)
    return predict(kernels.real.contiguous(), stride, weight_imag=kernels.imag.contiguous())


def _intervals(experiment: Experiment, parts: Sequence[Comparison], draws: int) -> dict[str, tuple[float, float]]:
    """95 % percentile intervals of what depends on the photographs; the packets are all there are, not a sample."""
    if len(parts) < 2:
        return {}
    samples = experiment._measured_numbers(resample(parts, draws))
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    return {name: tuple(sample.nanquantile(ends).tolist()) for name, sample in samples.items()}


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's along the last dimension; NaN where one of them does not vary.

    By symmetry gamma is the same for all analytic packets of depth 2: its roundings must not correlate with anything.
    """
    variances = a.var(dim=-1, correction=0), b.var(dim=-1, correction=0)
    varies = (variances[0] > 1e-12 * a.square().mean(dim=-1)) & (variances[1] > 1e-12 * b.square().mean(dim=-1))
    covariance = ((a - a.mean(dim=-1, keepdim=True)) * (b - b.mean(dim=-1, keepdim=True))).mean(dim=-1)
    return torch.where(varies, covariance / (variances[0] * variances[1]).sqrt(), torch.nan)


def _plain(value: Any) -> Any:
    """Nested lists, tuples and dicts with four digits per number, and None for what is not finite."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    return value
