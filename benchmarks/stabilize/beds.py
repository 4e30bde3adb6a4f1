"""The networks to be stabilized, the images that repair them, and those that judge them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.kit import sample
from benchmarks.stabilize.measure import Measured, frames, of_classifier, of_features

HALF = 250


class Bed(NamedTuple):
    """A trained network and its images.

    Attributes:
        build: the stock network.
        repair: normalised squares (N, 3, size + 8, size + 8) for the repair.
        judge: a function from a network to what was measured on other images.
        size: of the network's input, pixels.
        num_images: that judge.
    """

    build: Callable[[], nn.Module]
    repair: Tensor
    judge: Callable[[nn.Module], Measured]
    size: int
    num_images: int


def squeezenet(half: int) -> Bed:
    """SqueezeNet 1.0: one half of the shared photos repairs, the other one judges."""
    images, labels = sample.photos()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    fit, other = (order[:HALF], order[HALF:]) if half == 0 else (order[HALF:], order[:HALF])
    start, side = sample.MARGIN - 4, sample.CROP + 8
    squares = images[:, :, start : start + side, start : start + side]
    return Bed(
        sample.squeezenet,
        squares[fit].contiguous(),
        lambda model: of_classifier(frames(model, squares[other], sample.CROP), labels[other]),
        sample.CROP,
        len(other),
    )


def open_nsfw(half: int) -> Bed:
    """open_nsfw, a bottleneck ResNet of folded norms: pooled features and logits move; classes say nothing here."""
    from benchmarks.pretrained.open_nsfw import open_nsfw as build

    images, _ = sample.photos()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    fit, other = (order[:HALF], order[HALF:]) if half == 0 else (order[HALF:], order[:HALF])
    start, side = sample.MARGIN - 2, 232
    squares = images[:, :, start : start + side, start : start + side]
    stock = build().eval()
    wanted = _with_features(stock, squares[other][..., 4:228, 4:228])

    def judge(model: nn.Module) -> Measured:
        values = {f"logit {k}": v for k, v in of_features(frames(model, squares[other], 224)).values.items()}
        features = frames(_Features(model), squares[other], 224)
        values |= {f"features {k}": v for k, v in of_features(features).values.items()}
        own = _with_features(model, squares[other][..., 4:228, 4:228])
        energy = (wanted - wanted.mean(dim=0)).square().sum(dim=1).mean()
        values["feature error"] = ((own - wanted).square().sum(dim=1) / energy).sqrt()
        return Measured(values)

    return Bed(lambda: build().eval(), squares[fit].contiguous(), judge, 224, len(other))


class _Features(nn.Module):
    """What the last linear layer reads."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return _with_features(self.model, x)


@torch.no_grad()
def _with_features(model: nn.Module, images: Tensor) -> Tensor:
    seen: list[Tensor] = []
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    handle = last.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        for batch in images.split(4):
            model(batch.contiguous(memory_format=torch.channels_last))
    finally:
        handle.remove()
    return torch.cat(seen)


def cifar10(recipe: str, seed: int, runs: Path, num_images: int = 10_000) -> Bed:
    """A stock network of `benchmarks.cifar10`, trained there: 1,000 training images repair, test images judge."""
    from benchmarks.cifar10.run import register_networks, trained_network
    from benchmarks.cifar10.variants import Row
    from mixpool.evaluation.photos import load_images, normalize

    register_networks()
    row = Row("stock", recipe, seed)
    _, wanted = trained_network(row, runs)
    data = runs / "data" / "cifar10"
    size = wanted.size

    def squares(split: str, count: int) -> tuple[Tensor, Tensor]:
        photos = load_images(data / split, size + 8, count)
        classes = sorted({name.split("/")[0] for name in photos.names})
        labels = torch.tensor([classes.index(name.split("/")[0]) for name in photos.names])
        return normalize(photos.images, wanted.mean, wanted.std), labels

    fit, _ = squares("train", 1000)
    images, labels = squares("test", num_images)
    own = normalize(load_images(data / "test", size, num_images).images, wanted.mean, wanted.std)

    @torch.no_grad()
    def judge(model: nn.Module) -> Measured:
        values = of_classifier(frames(model, images, size, batch=128), labels).values
        # Accuracy on the images as the training had them; the squares are enlarged ones.
        classes = torch.cat([model(batch).argmax(dim=1) for batch in own.split(128)])
        return Measured(values | {"top1": 100.0 * (classes == labels).double()})

    return Bed(lambda: trained_network(row, runs)[0].eval(), fit, judge, size, num_images)
