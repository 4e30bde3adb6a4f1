"""Anti-aliased stems and networks of other packages, built by their own code, beside mixpool's."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import timm
from torch import nn

from benchmarks.kit.stems import Unavailable, chosen_stem

ADOBE = "antialiased_cnns"
PACKAGES = {ADOBE: "antialiased-cnns", "kornia": "kornia", "timm": "timm"}  # module -> distribution


def package(name: str) -> Any:
    """An imported package; Unavailable, with the reason, where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Unavailable(f"{PACKAGES[name]} cannot be imported ({error})") from error


class Provider(NamedTuple):
    """How to build what is compared, and the package that it is of (None: mixpool, or plain PyTorch)."""

    build: Callable[..., nn.Module]
    package: str | None = None


def _behind(blur: Callable[[int], nn.Module], window: int | None = None) -> Callable[[int, nn.MaxPool2d], nn.Module]:
    """Max pooling at stride 1, of the stock windows or of others without a border, then a blur of stride 2."""

    def build(channels: int, pool: nn.MaxPool2d) -> nn.Module:
        dense = nn.MaxPool2d(pool.kernel_size, 1, pool.padding) if window is None else nn.MaxPool2d(window, 1)
        return nn.Sequential(dense, blur(channels))

    return build


def _adobe(taps: int) -> Callable[[int], nn.Module]:
    return lambda channels: package(ADOBE).BlurPool(channels, filt_size=taps, stride=2)


# (channels, the stock max pool) -> what stands in its place. A window of 2, where the stock stem has 3, is what the
# packages' own models (antialiased_cnns) and layers (kornia) have. All leave the convolution of stride 2 as it is.
POOLINGS = {
    "stock": Provider(lambda channels, pool: pool),
    "timm BlurPool2d": Provider(_behind(lambda channels: timm.layers.BlurPool2d(channels)), "timm"),
    "antialiased_cnns BlurPool, 3 taps": Provider(_behind(_adobe(3)), ADOBE),
    "antialiased_cnns window 2, 3 taps": Provider(_behind(_adobe(3), window=2), ADOBE),
    "antialiased_cnns window 2, 4 taps": Provider(_behind(_adobe(4), window=2), ADOBE),
    "kornia BlurPool2D": Provider(_behind(lambda channels: package("kornia").filters.BlurPool2D(3, 2)), "kornia"),
    "kornia MaxBlurPool2D, window 2": Provider(
        lambda channels, pool: package("kornia").filters.MaxBlurPool2D(3, 2, 2), "kornia"
    ),
}
# Arguments of convert; "chosen" stands for the channels that the default (select="auto") takes.
MIXPOOL: dict[str, dict[str, Any]] = {
    "mixpool BlurPool": {"select": "none", "rest": "blurpool"},
    "mixpool CMod": {"select": "chosen", "pooling": "cmod"},
    "mixpool auto": {"select": "auto"},
    "mixpool auto, rest blurpool": {"select": "auto", "rest": "blurpool"},
}
# What records of version 0.1 call some of them.
EARLIER = {"mixpool CMod": "mixpool CMod, blur=1", "mixpool auto, rest blurpool": "mixpool auto, max_blur=3"}
STEMS = (*POOLINGS, *MIXPOOL)
# The classifier is trained with windows of 3, so the others' windows of 2 would be another stem before all else.
CLASSIFIERS = (*(name for name in POOLINGS if "window 2" not in name), *MIXPOOL)


def stem_of(provider: str, parts: tuple) -> nn.Module:
    """A stem with copies of the parts (conv, norm, act, max pool), under a provider's pooling."""
    conv, norm, act, pool = copy.deepcopy(parts)
    if provider in POOLINGS:
        pooling = POOLINGS[provider].build(conv.out_channels, pool)
        return nn.Sequential(*(part for part in (conv, norm, act, pooling) if part is not None))
    options = dict(MIXPOOL[provider])
    if options["select"] == "chosen":
        options["select"] = is_swapped(parts)
    return chosen_stem((conv, norm, act, pool), **options)


def is_swapped(parts: tuple) -> list[bool]:
    """The channels that take the modulus by default."""
    return [name == "modulus" for name in chosen_stem(copy.deepcopy(parts)).poolings]


def _timm(name: str, **options: Any) -> nn.Module:
    if name.startswith("mixpool_"):
        importlib.import_module("mixpool.timm_models")
    return timm.create_model(name, **options)


def _kornia_resnet() -> nn.Module:
    model = _timm("resnet18")
    model.maxpool = POOLINGS["kornia BlurPool2D"].build(64, model.maxpool)
    return model


def adobe_resnet(*edits: Callable[[nn.Module], None], taps: int = 3) -> nn.Module:
    """antialiased_cnns' ResNet-18 without trained weights, edited."""
    model = package(ADOBE).resnet18(pretrained=False, filter_size=taps)
    for edit in edits:
        edit(model)
    return model


def window_of_three(model: nn.Module) -> None:
    """Edit: the max pool's windows that the stock stem has."""
    model.maxpool[0] = nn.MaxPool2d(3, 1, 1)


def plain_shortcuts(model: nn.Module) -> None:
    """Edit: shortcuts that take every other position, without a blur."""
    for stage in (model.layer2, model.layer3, model.layer4):
        stage[0].downsample[0] = nn.MaxPool2d(1, 2)


OURS_BLURRED = Provider(lambda: _timm("mixpool_resnet18", select="none", init="none", rest="blurpool", aa_layer="blur"))
# Whole ResNet-18s; kornia has no models, so it is its layer in the stem alone.
NETWORKS = {
    "stock": Provider(lambda: _timm("resnet18")),
    "timm resnetblur18": Provider(lambda: _timm("resnetblur18"), "timm"),
    "antialiased_cnns, 3 taps": Provider(adobe_resnet, ADOBE),
    "antialiased_cnns, 4 taps": Provider(lambda: adobe_resnet(taps=4), ADOBE),
    "kornia BlurPool2D, stem only": Provider(_kornia_resnet, "kornia"),
    "mixpool BlurPool throughout": OURS_BLURRED,
    "mixpool_resnet18": Provider(lambda: _timm("mixpool_resnet18")),
    "mixpool_resnet18, aa_layer=blur": Provider(lambda: _timm("mixpool_resnet18", aa_layer="blur")),
}
# What is compared with timm's resnet18(aa_layer=BlurPool2d).
FUNCTIONS = {
    "timm resnetblur18": NETWORKS["timm resnetblur18"],
    "mixpool BlurPool throughout": OURS_BLURRED,
    "antialiased_cnns, 3 taps": NETWORKS["antialiased_cnns, 3 taps"],
    "antialiased_cnns, window 3": Provider(lambda: adobe_resnet(window_of_three), ADOBE),
    "antialiased_cnns, plain shortcuts": Provider(lambda: adobe_resnet(plain_shortcuts), ADOBE),
    "antialiased_cnns, both edits": Provider(lambda: adobe_resnet(window_of_three, plain_shortcuts), ADOBE),
}
