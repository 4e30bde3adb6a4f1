"""The tables of trained networks stabilized without training, from the records of `benchmarks.stabilize`."""

from __future__ import annotations

from benchmarks.kit.markdown import origins, read, table
from benchmarks.kit.store import RECORDS

# The tables, by the names that pages call them.
__all__ = [
    "stabilize_squeezenet",
    "stabilize_resnet18",
    "stabilize_small_vgg",
    "stabilize_open_nsfw",
    "stabilize_cost",
    "stabilize",
]

NOT_RUN = "Not run yet."
CLASSIFIER = {"top1": "top-1, points", "flips1": "flips 1 px", "flips2": "2 px", "flips4": "4 px", "kl1": "KL 1 px"}
FEATURES = {
    "features moved1": "features, 1 px",
    "features moved4": "4 px",
    "logit moved1": "logit, 1 px",
    "logit moved4": "4 px",
}


def stabilize_squeezenet() -> str:
    """SqueezeNet 1.0, both halves of the photos."""
    return _of("squeezenet/0", "squeezenet/1", columns=CLASSIFIER)


def stabilize_resnet18() -> str:
    """A ResNet-18 of half the width, trained on CIFAR-10."""
    return _of("resnet18", columns=CLASSIFIER)


def stabilize_small_vgg() -> str:
    """A small VGG with batch norm, trained on CIFAR-10."""
    return _of("small_vgg", columns=CLASSIFIER)


def stabilize_open_nsfw() -> str:
    """open_nsfw: how far pooled features and the logit move."""
    return _of("open_nsfw/0", columns=FEATURES)


def stabilize() -> str:
    """The default beside stock, one line a network: for the README."""
    names = {
        "squeezenet/0": "SqueezeNet, ImageNet photos",
        "resnet18": "ResNet-18, CIFAR-10",
        "small_vgg": "VGG, CIFAR-10",
    }
    rows, used = [], []
    for bed, title in names.items():
        record = next((r for r in _records() if r["bed"] == bed and r["variant"] == "default"), None)
        if record is not None:
            used.append(record)
            cells = [_shown(record["to_stock"][key], key) for key in ("top1", "flips1", "kl1")]
            rows.append([title, *cells, f"{record['seconds']:.0f} s", str(record["num_images"])])
    if not rows:
        return NOT_RUN
    header = ["stabilized, beside stock", "top-1, points", "flips at 1 px, times", "KL, times", "took", "images"]
    return f"{table(header, rows)}\n\n{origins(used, 'python -m benchmarks.stabilize')}"


def stabilize_cost() -> str:
    """Time, FLOPs and activations of whole networks, times stock."""
    if not (RECORDS / "stabilize_cost.jsonl").exists():
        return NOT_RUN
    found = read("stabilize_cost")
    rows = []
    for network, variant in dict.fromkeys((r["network"], r["variant"]) for r in found):
        own = [r for r in found if (r["network"], r["variant"]) == (network, variant)]
        stock = next(r for r in found if (r["network"], r["variant"]) == (network, "stock"))
        counts = [f"{own[0][key] / stock[key]:.3f}" for key in ("parameters", "flops", "saved_bytes")]
        times = []
        for layout, mode in (
            ("NCHW", "eager"),
            ("NCHW", "compiled"),
            ("channels_last", "eager"),
            ("channels_last", "compiled"),
        ):
            ratios = [r["ratio_to_stock"] for r in own if (r["layout"], r["mode"]) == (layout, mode)]
            times.append("{p50:.2f} ({p20:.2f} to {p80:.2f})".format(**ratios[0]) if ratios else "-")
        rows.append([network, variant, *counts, *times])
    header = [
        "network",
        "variant",
        "parameters",
        "FLOPs",
        "saved",
        "NCHW, eager",
        "compiled",
        "channels_last, eager",
        "compiled",
    ]
    return f"{table(header, rows)}\n\n{origins(found, 'python -m benchmarks.stabilize.cost')}"


def _records() -> list[dict]:
    return read("stabilize") if (RECORDS / "stabilize.jsonl").exists() else []


def _of(*beds: str, columns: dict[str, str]) -> str:
    found = [record for bed in beds for record in _records() if record["bed"] == bed]
    if not found:
        return NOT_RUN
    rows = []
    for variant in dict.fromkeys(record["variant"] for record in found):
        own = [record for record in found if record["variant"] == variant]
        if variant == "stock":
            cells = [" / ".join(f"{r['means'][key]:.3g}" for r in own) for key in columns]
        else:
            cells = [" / ".join(_shown(r["to_stock"][key], key) for r in own) for key in columns]
        took = "-" if variant == "stock" else " / ".join(f"{r['seconds']:.0f}" for r in own)
        rows.append([variant, *cells, took])
    header = ["variant", *columns.values(), "seconds"]
    text = table(header, rows)
    counts = " and ".join(dict.fromkeys(str(record["num_images"]) for record in found))
    return f"{text}\n\n{counts} images; {origins(found, 'python -m benchmarks.stabilize')}"


def _shown(value: list[float], key: str) -> str:
    mean, low, high = value
    form = "{:+.1f} ({:+.1f} to {:+.1f})" if key == "top1" else "{:.2f} ({:.2f} to {:.2f})"
    return form.format(mean, low, high)
