"""The main claim: converting a real pretrained classifier, with 100 photos and the default settings.

    python -m benchmarks.pretrained.squeezenet         about 10 minutes; writes records/squeezenet.jsonl

For several splits: `convert(model, images=<100 photos>)`; on the other 400 photos the top-1 of both models, how much
the swapped channels' output changes under a 1-pixel shift (rms change / std) with max pooling and with the modulus,
and flips and KL of the whole model at 1, 2 and 4 pixels to the right and along the diagonal. The same for
`convert(model)` without any images, on the same 400 photos.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor, nn

from benchmarks.kit import command
from benchmarks.kit.sample import difference_interval, logits, photos, shifted, split, squeezenet
from benchmarks.kit.store import RECORDS
from mixpool import convert, records
from mixpool.evaluation.shifts import relative_change

SHIFTS = {"h1": (0, 1), "d1": (1, 1), "h2": (0, 2), "d2": (2, 2), "h4": (0, 4), "d4": (4, 4)}


@torch.no_grad()
def stem_change(stem: nn.Module, images: Tensor, channels: Tensor) -> Tensor:
    """(channels,) change of the stem's output under a horizontal shift by 1 pixel, see `mixpool.evaluation.shifts`."""
    here, there = (torch.cat([stem(shifted(b, 0, dx))[:, channels] for b in images.split(50)]) for dx in (0, 1))
    return relative_change(here, there)


def stability(reference: Tensor, moved: Tensor) -> dict[str, float]:
    """Flips in percent and mean KL in nats between the outputs before and after a shift."""
    flips = (reference.argmax(dim=1) != moved.argmax(dim=1)).double().mean().item() * 100
    kl = F.kl_div(moved.log_softmax(1), reference.log_softmax(1), reduction="batchmean", log_target=True).item()
    return {"flips": flips, "kl": kl}


def main() -> None:
    images, labels = photos()
    stock = squeezenet()
    shifts = {"0": (0, 0), **SHIFTS}
    stock_logits = {name: logits(stock, shifted(images, *s)) for name, s in shifts.items()}
    results = []
    for with_images, seed in track(list(itertools.product((True, False), range(4))), "splits"):
        calibration, others = split(seed)
        if with_images or seed == 0:  # without images it is one model for all splits
            model = squeezenet()
            report = convert(model, images=shifted(images[calibration]) if with_images else None)
            chosen = others if with_images else torch.arange(len(images))
            outputs_of = {name: logits(model, shifted(images[chosen], *s)) for name, s in shifts.items()}
        swapped = torch.tensor(report.plan.is_complex).nonzero()[:, 0]
        before = stem_change(stock.features[:3], images[others], swapped)
        after = stem_change(model.features[:3], images[others], swapped)
        outputs = {name: o if with_images else o[others] for name, o in outputs_of.items()}
        right = outputs["0"].argmax(dim=1) == labels[others]
        right_of_stock = stock_logits["0"][others].argmax(dim=1) == labels[others]
        record = records.stamp(
            "conversion",
            model="squeezenet1_0",
            seed=seed,
            calibration_images=len(calibration) if with_images else 0,
            num_images=len(others),
            channels=len(report.poolings),
            num_modulus=report.num_complex,
            top1={"stock": right_of_stock.double().mean().item() * 100, "mixpool": right.double().mean().item() * 100},
            top1_change_ci95=difference_interval(right, right_of_stock),
            agreement=(outputs["0"].argmax(1) == stock_logits["0"][others].argmax(1)).double().mean().item() * 100,
            stem_change_1px={"max": before.mean().item(), "modulus": after.mean().item()},
            stem_change_fall=1 - (after.mean() / before.mean()).item(),
            shifts={
                name: {
                    "stock": stability(stock_logits["0"][others], stock_logits[name][others]),
                    "mixpool": stability(outputs["0"], outputs[name]),
                }
                for name in SHIFTS
            },
        )
        results.append(record)
        print(
            f"seed {seed}, {record['calibration_images']} photos: {report.num_complex} channels, top-1 "
            f"{record['top1']['stock']:.2f} -> {record['top1']['mixpool']:.2f}, stem change "
            f"{before.mean():.3f} -> {after.mean():.3f}"
        )
    records.write(RECORDS / "squeezenet.jsonl", results)


if __name__ == "__main__":
    command.run(main, __doc__)
