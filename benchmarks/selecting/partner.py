"""The analytic partner on real filters: how well CMod follows max pooling, and how much energy is on the wrong side.

    python -m benchmarks.selecting.partner   about 2 minutes; writes records/partner.jsonl

Correlation of the modulus (raw: no fit, no activation; "blur" 1 in the records: at the window's centre, 3: its binomial
mean) with RMax over the 500 photos, for SqueezeNet's band-pass channels above and below 1.2 rad/px, with the
prior-weighted partner, the cropped Hilbert partner and the exact directional Hilbert transform of the responses'
filters (a 31 x 31 kernel).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor

from benchmarks.kit import command
from benchmarks.kit.sample import photos, shifted, squeezenet
from benchmarks.kit.store import RECORDS
from mixpool import analytic_partner, analyze, records
from mixpool.filters import partner as filters
from mixpool.filters.partner import PRIOR_SIZE, partner_prior
from mixpool.filters.spectrum import center_frequency, frequency_grid, half_plane_side, natural_image_prior, ratio
from mixpool.ops.geometry import ConvGeometry, PoolGeometry, centers_are_inside
from mixpool.ops.modulus import modulus
from mixpool.ops.reference import lowpass_pool, max_pool

CONV = ConvGeometry((2, 2))
POOL = PoolGeometry((3, 3), (2, 2), (0, 0), True)


def padded(weight: Tensor, size: int) -> Tensor:
    """The kernel with zeros around, so that a partner may have more taps."""
    margin = (size - weight.shape[-1]) // 2
    return F.pad(weight, (margin,) * 4)


def partner_by_image_prior(weight: Tensor, direction: Tensor) -> Tensor:
    """The partner fitted under the images' own prior instead of the steeper one."""
    steeper = filters.partner_prior
    filters.partner_prior = natural_image_prior
    try:
        return analytic_partner(weight, direction)
    finally:
        filters.partner_prior = steeper


def hilbert_partner(weight: Tensor, direction: Tensor | None = None, size: int = PRIOR_SIZE) -> Tensor:
    """Plain Hilbert partner: the directional Hilbert transform on a large odd grid, cropped back to the taps.

    Cropping leaves a DC leak that ruins low-frequency edge filters. Arguments as
    `analytic_partner`; `size` is the odd side of the grid.
    """
    direction = center_frequency(weight).detach() if direction is None else direction
    side = half_plane_side(frequency_grid(size, weight.device), direction.double())
    spectrum = torch.fft.fft2(weight.double(), s=(size, size))
    partner = torch.fft.ifft2(-1j * side[:, None] * spectrum).real
    return partner[..., : weight.shape[-2], : weight.shape[-1]].to(weight.dtype)


def wrong_side_energy(weight: Tensor, weight_imag: Tensor, direction: Tensor) -> Tensor:
    """(C,) share of the energy of W + iV, weighted by `partner_prior`, in the half plane <xi, direction> < 0.

    0 is perfectly analytic, 0.5 a real filter. Computed in float64 on the grid of the prior.
    """
    grid = frequency_grid(PRIOR_SIZE, weight.device)
    prior = partner_prior(grid)
    spectrum = torch.fft.fft2(torch.complex(weight.double(), weight_imag.double()), s=(PRIOR_SIZE, PRIOR_SIZE))
    energy = spectrum.abs().square().sum(dim=1) * prior
    wrong = (energy * (1 - half_plane_side(grid, direction.double())) / 2).sum(dim=(1, 2))
    return ratio(wrong, energy.sum(dim=(1, 2)))


@torch.no_grad()
def main() -> None:
    images = shifted(photos()[0])
    weight = squeezenet().features[0].weight.data
    stats = analyze(weight, 2)
    direction = stats.center_frequency
    partners = {
        "prior-weighted 7x7": (weight, analytic_partner(weight, direction)),
        "prior-weighted 7x7, prior 1/(xi^2 + 0.02^2)": (weight, partner_by_image_prior(weight, direction)),
        "cropped Hilbert 7x7": (weight, hilbert_partner(weight, direction)),
        "prior-weighted 9x9": (padded(weight, 9), analytic_partner(padded(weight, 9), direction)),
        "cropped Hilbert 31x31": (padded(weight, 31), hilbert_partner(padded(weight, 31), direction)),
    }
    sums = {(name, blur): torch.zeros(5, len(weight), dtype=torch.float64) for name in partners for blur in (1, 3)}
    count = 0
    assert centers_are_inside(POOL)
    for batch in track(images.split(25), "photos"):
        rmax = max_pool(F.conv2d(batch, weight, None, CONV.stride), POOL).double()
        count += rmax.numel() // len(weight)
        for name, (real, imag) in partners.items():
            pad = (real.shape[-1] - 7) // 2
            z = F.conv2d(batch, torch.cat([real, imag]), None, CONV.stride, pad)
            envelope = modulus(z)
            for blur, pooled in ((1, envelope[..., 1::2, 1::2]), (3, lowpass_pool(envelope, POOL))):
                cmod = pooled[..., : rmax.shape[-2], : rmax.shape[-1]].double()
                products = (rmax, cmod, rmax * rmax, cmod * cmod, rmax * cmod)
                sums[name, blur] += torch.stack([product.sum(dim=(0, 2, 3)) for product in products])
    band_pass = stats.dc_share < 0.05
    high = stats.frequency > 1.2
    wrong_side = {name: wrong_side_energy(*both, direction) for name, both in partners.items()}
    results = []
    for (name, blur), total in sums.items():
        x, y, xx, yy, xy = total / count
        correlation = (xy - x * y) / ((xx - x * x) * (yy - y * y)).sqrt()
        wrong = wrong_side[name]
        means = {
            "above_1.2": correlation[band_pass & high].mean().item(),
            "up_to_1.2": correlation[band_pass & ~high].mean().item(),
        }
        print(f"{name}, blur={blur}: correlation with RMax {means['above_1.2']:.3f} / {means['up_to_1.2']:.3f}")
        results.append(
            records.stamp(
                "partner",
                filters="squeezenet1_0",
                partner=name,
                blur=blur,
                num_images=len(images),
                channels={"above_1.2": int((band_pass & high).sum()), "up_to_1.2": int((band_pass & ~high).sum())},
                correlation_with_rmax=means,
                wrong_side_energy_median={
                    "above_1.2": wrong[band_pass & high].median().item(),
                    "up_to_1.2": wrong[band_pass & ~high].median().item(),
                },
            )
        )
    records.write(RECORDS / "partner.jsonl", results)


if __name__ == "__main__":
    command.run(main, __doc__)
