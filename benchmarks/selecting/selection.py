"""Where the thresholds of select="auto" come from.

    python -m benchmarks.selecting.selection   about 15 minutes on one core; writes records/selection.jsonl

1. Fidelity (correlation of the modulus with max pooling on photos, after the best affine map) of 288 Gabor filters
   on a 7x7/2 stem, 288 on an 11x11/4 stem, and the 96 filters of SqueezeNet, against numbers that are read from
   the weights: which of them predicts it.
2. On SqueezeNet, zero-shot top-1 against the two cuts: the predicted correlation (no images given) and the fidelity
   (100 photos), over four splits of the photos.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from rich.progress import track
from torch import Tensor, nn

from benchmarks.kit import command
from benchmarks.kit.sample import difference_interval, logits, photos, shifted, split, squeezenet
from benchmarks.kit.store import RECORDS
from mixpool import MixPoolStem, analyze, convert, records
from mixpool.filters.spectrum import frequency_grid, natural_image_prior, pair, power_spectrum, ratio
from mixpool.selection.calibrate import measure
from mixpool.selection.predict import pictures_for
from mixpool.selection.rules import MAX_DC_SHARE, select_by_filter

NUMBERS = ("predicted_correlation_blur3", "slow_share", "phase_step", "relative_bandwidth", "concentration", "dc_share")


def gabor(frequency: tuple[float, float], sigma: float, size: int, phase: float) -> Tensor:
    """(size, size) Gabor filter without mean."""
    tap = torch.arange(size) - (size - 1) / 2
    y, x = torch.meshgrid(tap, tap, indexing="ij")
    envelope = torch.exp(-(y**2 + x**2) / (2 * sigma**2))
    wave = envelope * torch.cos(frequency[0] * y + frequency[1] * x + phase)
    wave = wave - envelope * (wave.sum() / envelope.sum())
    return wave / wave.norm()


def gabor_stem(size: int, stride: int, padding: int, sigmas: tuple[float, ...], top_step: float) -> nn.Conv2d:
    """A convolution of 288 gray Gabor filters: 12 phase steps x 8 orientations x 3 widths, phases 0 or pi/2."""
    filters = []
    for step in torch.linspace(1.0, top_step, 12).tolist():
        for turn in range(8):
            angle = math.pi * turn / 8
            frequency = (step / stride * math.sin(angle), step / stride * math.cos(angle))
            filters += [gabor(frequency, sigma, size, math.pi / 2 * ((turn // 2 + turn) % 2)) for sigma in sigmas]
    conv = nn.Conv2d(3, len(filters), size, stride, padding)
    conv.weight.data = torch.stack(filters)[:, None].repeat(1, 3, 1, 1) / 3
    conv.bias.data.zero_()
    return conv.eval()


def slow_share(weight: Tensor, stride: int | Sequence[int]) -> Tensor:
    """(C,) share of a filter's response to natural images that hardly turns within a pooling window.

    The response's energy is S(xi) |W^(xi)|^2, with the prior S of natural images. From one step of the convolution to
    the next its phase turns by stride * xi, of which only the remainder modulo 2 pi counts (aliasing). Where that is
    less than pi / 2 a window of 3 does not see a whole half wave, and its maximum is not a modulus. So this one
    number joins frequency, orientation, bandwidth and stride. 0 for a zero filter.
    """
    power = power_spectrum(weight)
    grid = frequency_grid(power.shape[-1], power.device, power.dtype)
    energy = power * natural_image_prior(grid)
    turn = grid * torch.tensor(pair(stride), device=grid.device, dtype=grid.dtype)
    turn = ((turn + math.pi).remainder(2 * math.pi) - math.pi).norm(dim=-1)
    slow = (energy * (turn < math.pi / 2)).sum(dim=(1, 2))
    return ratio(slow, energy.sum(dim=(1, 2)))


def fidelity_of_all(conv: nn.Conv2d, pool: nn.MaxPool2d, images: Tensor) -> Tensor:
    """(C,) fidelity of every filter, were it pooled by its modulus."""
    stem, stats = MixPoolStem(conv, None, nn.ReLU(), pool), analyze(conv)
    return measure(stem, torch.arange(len(stats)), stats, images, ("modulus",) * len(stats)).fidelity


def fidelity_record(name: str, conv: nn.Conv2d, pool: nn.MaxPool2d, images: Tensor) -> dict:
    """All filters of a convolution: what their weights say, what the photos say, and how both correlate."""
    stats = analyze(conv)
    fidelity = fidelity_of_all(conv, pool, images).double()
    others = {"slow_share": slow_share(conv.weight.detach(), conv.stride)}
    values = {number: others[number] if number in others else getattr(stats, number) for number in NUMBERS}
    band_pass = stats.dc_share < 0.05
    correlations = {
        number: torch.corrcoef(torch.stack([value[band_pass], fidelity[band_pass]]))[0, 1].item()
        for number, value in values.items()
    }
    print(f"{name}: correlation with fidelity " + ", ".join(f"{k} {v:+.2f}" for k, v in correlations.items()))
    rounded = {number: [round(v, 4) for v in value.tolist()] for number, value in values.items()}
    return records.stamp(
        "selection_fidelity",
        filters=name,
        num_images=len(images),
        correlation_with_fidelity=correlations,
        fidelity=[round(v, 4) for v in fidelity.tolist()],
        **rounded,
    )


def zero_shot_record(
    cut: str, value: float, models: list[nn.Module], images: Tensor, labels: Tensor, right: Tensor
) -> dict:
    """Top-1 of converted SqueezeNets on the 400 photos of each split that calibrated nothing."""
    counts, drops, intervals = [], [], []
    for seed, model in enumerate(models):
        _, others = split(seed)
        if seed == 0 or model is not models[0]:
            right_of_all = logits(model, images).argmax(dim=1) == labels
        right_now = right_of_all[others]
        counts.append(model.features[0].num_complex)
        drops.append((right_now.double().mean() - right[others].double().mean()).item() * 100)
        intervals.append(difference_interval(right_now, right[others]))
    record = records.stamp(
        "selection_zero_shot",
        model="squeezenet1_0",
        cut=cut,
        value=value,
        seeds=list(range(len(models))),
        num_images=400,
        channels=counts,
        top1_change=drops,
        mean_top1_change=sum(drops) / len(drops),
        ci95=intervals,
    )
    print(f"{cut} {value:.2f}: channels {counts}, top-1 change " + ", ".join(f"{d:+.1f}" for d in drops), flush=True)
    return record


def converted(mask: Tensor, images: Tensor) -> nn.Module:
    """A SqueezeNet with the modulus on some channels, calibrated on images."""
    model = squeezenet()
    convert(model, select=mask.tolist(), images=images)
    return model


def main() -> None:
    images, labels = photos()
    some = images[split(0)[0]][:60]
    conv = squeezenet().features[0]
    results = [
        fidelity_record("gabor 7x7/2", gabor_stem(7, 2, 3, (1.1, 1.5, 2.0), 5.8), nn.MaxPool2d(3, 2, 1), some),
        fidelity_record("gabor 11x11/4", gabor_stem(11, 4, 2, (1.5, 2.2, 3.0), 7.0), nn.MaxPool2d(3, 2), some),
        fidelity_record("squeezenet1_0", conv, nn.MaxPool2d(3, 2, ceil_mode=True), shifted(some)),
    ]
    images = shifted(images)
    right_of_stock = logits(squeezenet(), images).argmax(dim=1) == labels
    stats = analyze(conv)
    pool = nn.MaxPool2d(3, 2, ceil_mode=True)
    calibration = [images[split(seed)[0]] for seed in range(4)]
    fidelities = [fidelity_of_all(conv, pool, some) for some in calibration]
    band_pass = stats.dc_share <= MAX_DC_SHARE
    for value in track((0.80, 0.82, 0.84, 0.86), "fidelity"):
        models = [converted(band_pass & (f >= value), some) for f, some in zip(fidelities, calibration, strict=True)]
        results.append(zero_shot_record("fidelity", value, models, images, labels, right_of_stock))
    for value in track((0.80, 0.82, 0.84, 0.85, 0.86, 0.88), "predicted correlation"):
        # What select="auto" does without images, at its own cut.
        model = converted(select_by_filter(stats, value)[0], pictures_for(conv.weight, conv.stride))
        results.append(zero_shot_record("prediction", value, [model] * 4, images, labels, right_of_stock))
    records.write(RECORDS / "selection.jsonl", results)


if __name__ == "__main__":
    command.run(main, __doc__)
