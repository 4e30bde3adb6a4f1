"""Time of stems on this CPU, side by side in one run, interleaved; ratios to the stock stem. About 3 minutes.

ResNet-18's stem with a Gabor bank, batch 16, 224 x 224, float32, NCHW and channels_last; the forward pass in evaluation
and, in training, forward and backward for the weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.kit import timing
from benchmarks.kit.stems import RESNET, StemShape, chosen_stem, images, stem_parts, stock_stem
from benchmarks.kit.store import Store
from mixpool import records

MIXPOOL: dict[str, dict[str, Any]] = {
    "mixpool all-max": {"select": "none"},
    "mixpool auto": {"select": "auto"},
    "mixpool all-modulus": {"select": "all"},
    "mixpool auto, cmod": {"select": "auto", "pooling": "cmod"},
    "mixpool auto, rest blurpool": {"select": "auto", "rest": "blurpool"},
}
PROVIDERS = ("stock", *MIXPOOL, "timm BlurPool")
BATCH = 16
ROUNDS = {"forward": 41, "full": 15}


def stem_of(provider: str, shape: StemShape, layout: str) -> nn.Module:
    """A provider's stem; all have the same weights."""
    if provider == "stock":
        return stock_stem(shape, layout=layout)
    if provider == "timm BlurPool":  # what timm users take today: max pooling at stride 1 and timm's BlurPool2d
        from timm.layers import BlurPool2d

        conv, norm, act, _ = stem_parts(shape, layout=layout)
        return nn.Sequential(conv, norm, act, nn.MaxPool2d(3, 1, 1), BlurPool2d(shape.out_channels))
    return chosen_stem(stem_parts(shape, layout=layout), backend="reference", **MIXPOOL[provider])


def call_of(stem: nn.Module, x: Tensor, mode: str):
    """One pass: "forward" in evaluation, "full" forward and backward for the weights in training."""
    stem.train(mode == "full")
    parameters = list(stem.parameters())
    with torch.no_grad():
        upstream = torch.randn(stem(x).shape).to(memory_format=_format_of(x))

    @torch.no_grad()
    def forward() -> Tensor:
        return stem(x)

    def full() -> tuple[Tensor, ...]:
        return torch.autograd.grad(stem(x), parameters, upstream)

    return full if mode == "full" else forward


def _format_of(x: Tensor) -> torch.memory_format:
    is_channels_last = x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if is_channels_last else torch.contiguous_format


def _record(
    shape: StemShape, provider: str, mode: str, layout: str, batch: int, num_modulus: int = 0, **fields
) -> dict[str, Any]:
    params = shape.params(batch) | {"num_modulus": num_modulus}  # the word of all records for complex channels
    what = {"case": shape.name, "provider": provider, "mode": mode, "dtype": "float32", "layout": layout}
    return records.stamp("speed", **what, params=params, **fields)


def compare(
    layout: str, mode: str, rounds: int, shape: StemShape = RESNET, batch: int = BATCH, providers=PROVIDERS
) -> list[dict[str, Any]]:
    """The records of all providers in one layout and one pass."""
    x = images(shape, batch, "float32", layout=layout)
    stems = {name: stem_of(name, shape, layout) for name in providers}
    calls = {name: call_of(stem, x, mode) for name, stem in stems.items()}
    samples = timing.interleave(calls, rounds, 1, "cpu")
    results = []
    for name, stem in stems.items():
        record = _record(
            shape,
            name,
            mode,
            layout,
            batch,
            num_modulus=getattr(stem, "num_complex", 0),
            ms=timing.milliseconds(samples[name]),
            # Within each round both ran under the same load of the machine.
            ratio_to_stock=timing.ratio(samples[name], samples["stock"]),
        )
        results.append(record)
        ratio = record["ratio_to_stock"]
        print(
            f"{mode:8s} {layout:13s} {name:26s} {record['ms']['p50']:7.1f} ms   {ratio['p50']:.2f} x stock "
            f"({ratio['p20']:.2f} to {ratio['p80']:.2f}), modulus {record['params']['num_modulus']}/64",
            flush=True,
        )
    return results


def run_stem(store: Store, *, again: bool = False) -> None:
    """All layouts and passes; what the store has from these sources is measured again only if told so."""
    for mode, rounds in ROUNDS.items():
        for layout in ("NCHW", "channels_last"):
            if not again and all(store.has(_record(RESNET, name, mode, layout, BATCH)) for name in PROVIDERS):
                continue
            found = compare(layout, mode, rounds)
            store.drop(lambda record, of=(mode, layout): (record["mode"], record["layout"]) == of)
            store.add(*found)
