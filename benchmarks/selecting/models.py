"""Every model of the census whose stem mixpool claims to convert: is the all-max conversion bit-equal?

    python -m benchmarks.selecting.models   about 3 minutes; writes records/models.jsonl

Random weights (of the stem's norm layer too, negative scales included); evaluation: whole model on 2 images, bits;
training: the stem alone, largest difference over the output's std; the way back by revert, bits.
"""

from __future__ import annotations

import csv

import timm
import torch
import torchvision
from rich.progress import track
from torch import Tensor, nn

from benchmarks.kit import command
from benchmarks.kit.sample import shared_folder
from benchmarks.kit.store import RECORDS
from mixpool import convert, records, revert
from mixpool.conversion.find import find_stem

TIERS = ("A:", "A3:", "D:")


def build(source: str, name: str) -> nn.Module:
    if source == "timm":
        return timm.create_model(name)
    return torchvision.models.get_model(name, **({"init_weights": False} if name == "googlenet" else {}))


def stem_parts(model: nn.Module) -> nn.Sequential:
    """The stem's modules in the order of the data (an activation without a module of its own added)."""
    found = find_stem(model)
    parts = [found.modules[n] for n in (found.conv, found.norm) if n is not None]
    if found.act is not None or found.norm is None or getattr(parts[-1], "act", None) is None:
        parts.append(nn.ReLU() if found.act is None else found.modules[found.act])
    return nn.Sequential(*parts, *(found.modules[n] for n in (found.pool, found.blur) if n is not None))


@torch.no_grad()
def check(source: str, name: str) -> dict:
    """Convert one model with select="none" and compare it with itself before, in evaluation and in training."""
    torch.manual_seed(0)
    model = build(source, name)
    stock = stem_parts(model)
    norm = next((m for m in stock if isinstance(m, nn.modules.batchnorm._BatchNorm)), None)
    if norm is not None:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
        nn.init.normal_(norm.running_mean, 0, 0.1)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    model.eval()
    size = 256 if name.startswith("halonet") else 96
    x = torch.randn(2, 3, size, size)
    before = model(x)
    conv_input = stem_input(model, stock[0], x)
    if norm is not None:
        state = {key: value.clone() for key, value in norm.state_dict().items()}
    in_training = stock.train()(conv_input)
    if norm is not None:
        norm.load_state_dict(state)
    stock.eval()
    convert(model, select="none")
    equal = torch.equal(before, model(x))
    stem = next(m for m in model.modules() if type(m).__name__ == "MixPoolStem")
    difference = (stem.train()(conv_input) - in_training).abs().max() / in_training.std()
    stem.eval()
    if norm is not None:
        norm.load_state_dict(state)
    revert(model)
    return {
        "model": f"{source}/{name}",
        "eval_bit_equal": equal,
        "train_max_difference_over_std": difference.item(),
        "revert_bit_equal": torch.equal(before, model(x)),
    }


def stem_input(model: nn.Module, conv: nn.Module, x: Tensor) -> Tensor:
    """What reaches the convolution when the model sees x."""
    seen = []
    handle = conv.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(x)
    handle.remove()
    return seen[0]


def main() -> None:
    with open(shared_folder() / "data/stems.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["tier"].startswith(TIERS)]
    results = [
        {**check(row["source"], row["model"]), "tier": row["tier"][:2].rstrip(":")} for row in track(rows, "models")
    ]
    worst = max(r["train_max_difference_over_std"] for r in results)
    counts = {tier: sum(r["tier"] == tier for r in results) for tier in ("A", "A3", "D")}
    record = records.stamp(
        "models",
        counts=counts,
        eval_bit_equal=sum(r["eval_bit_equal"] for r in results),
        revert_bit_equal=sum(r["revert_bit_equal"] for r in results),
        train_max_difference_over_std=worst,
        models=results,
    )
    print(
        f"{len(results)} models {counts}: {record['eval_bit_equal']} bit-equal, training within {worst:.1e} of the std"
    )
    records.write(RECORDS / "models.jsonl", [record])


if __name__ == "__main__":
    command.run(main, __doc__)
