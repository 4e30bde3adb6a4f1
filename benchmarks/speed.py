"""Speed of stems on this CPU, side by side in one run, interleaved; ratios to the stock stem.

    python -m benchmarks.speed              about 4 minutes; writes records/speed.jsonl

ResNet-18's stem with a Gabor bank, batch 16, 224 x 224, float32, no_grad, NCHW and channels_last.
"""

from __future__ import annotations

import statistics
import time

import torch
import torchvision
from rich.progress import track
from torch import Tensor, nn

from benchmarks.sample import RECORDS
from mixpool import convert, records
from mixpool.gabor import gabor_bank


def stem_of(select: str | None, blur: int = 3, max_blur: int = 1) -> tuple[nn.Module, int]:
    """The stem of a ResNet-18 with a Gabor bank, stock (select=None) or converted; the number of modulus channels."""
    torch.manual_seed(0)
    model = torchvision.models.resnet18()
    with torch.no_grad():
        model.conv1.weight.copy_(gabor_bank(64, 3, 7))
        nn.init.normal_(model.bn1.weight, 1, 0.2)
        nn.init.normal_(model.bn1.running_mean, 0, 0.1)
        nn.init.uniform_(model.bn1.running_var, 0.5, 2)
    model.eval()
    num_modulus = 0 if select is None else convert(model, select=select, blur=blur, max_blur=max_blur).num_modulus
    return nn.Sequential(model.conv1, model.bn1, model.relu, model.maxpool).eval(), num_modulus


def blurpool_stem() -> nn.Module:
    """What timm users take today: max pooling at stride 1 and timm's BlurPool2d."""
    from timm.layers import BlurPool2d

    conv, norm, act, _ = stem_of(None)[0]
    return nn.Sequential(conv, norm, act, nn.MaxPool2d(3, 1, 1), BlurPool2d(64)).eval()


@torch.no_grad()
def compare(stems: dict[str, nn.Module], x: Tensor, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of every stem in every round; the order turns from round to round."""
    times: dict[str, list[float]] = {name: [] for name in stems}
    for stem in stems.values():
        stem(x), stem(x)
    names = list(stems)
    for turn in track(range(rounds), "rounds"):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.perf_counter()
            stems[name](x)
            times[name].append((time.perf_counter() - start) * 1e3)
    return times


def main(rounds: int = 41) -> None:
    stock, _ = stem_of(None)
    variants = {
        "stock": (stock, 0),
        "mixpool all-max": stem_of("none"),
        "mixpool auto": stem_of("auto"),
        "mixpool all-modulus": stem_of("all"),
        "mixpool auto, blur=1": stem_of("auto", blur=1),
        "mixpool auto, max_blur=3": stem_of("auto", max_blur=3),
        "timm BlurPool": (blurpool_stem(), 0),
    }
    results = []
    for layout, memory_format in {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}.items():
        stems = {name: stem.to(memory_format=memory_format) for name, (stem, _) in variants.items()}
        x = torch.randn(16, 3, 224, 224, generator=torch.Generator().manual_seed(0)).to(memory_format=memory_format)
        times = compare(stems, x, rounds)
        for name, (_, num_modulus) in variants.items():
            # The ratio within each round: both ran under the same load of the machine.
            ratios = [a / b for a, b in zip(times[name], times["stock"], strict=True)]
            quantiles = statistics.quantiles(times[name], n=5)
            record = records.stamp(
                "speed",
                case="resnet18_stem",
                provider=name,
                mode="forward",
                dtype="float32",
                layout=layout,
                params={"N": 16, "H": 224, "W": 224, "num_modulus": num_modulus, "C_out": 64},
                ms={"p50": statistics.median(times[name]), "p20": quantiles[0], "p80": quantiles[3], "n": rounds},
                ratio_to_stock={
                    "p50": statistics.median(ratios),
                    "p20": statistics.quantiles(ratios, n=5)[0],
                    "p80": statistics.quantiles(ratios, n=5)[3],
                },
            )
            results.append(record)
            ratio = record["ratio_to_stock"]
            print(
                f"{layout:13s} {name:26s} {record['ms']['p50']:7.1f} ms   {ratio['p50']:.2f} x stock "
                f"({ratio['p20']:.2f} to {ratio['p80']:.2f}), modulus {num_modulus}/64"
            )
    records.write(RECORDS / "speed.jsonl", results)


if __name__ == "__main__":
    main()
