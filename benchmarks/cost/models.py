"""What the cost tables compare: four networks and their stems, each as it is today and with other poolings.

    stock               timm's ResNet, AlexNet as torchvision has it
    BlurPool stem       the stem's max pooling at stride 1, then binomial decimation; everything else is stock
    timm aa_layer       timm's `aa_layer=BlurPool2d`: the stem and every strided layer (timm has no AlexNet)
    CMod                paper 2's stem: 24 of a ResNet's 64 channels on the modulus, 32 of AlexNet's, nothing blurred
    mixpool             the default: 48 of a ResNet's channels on the blurred modulus, 32 of AlexNet's, the others as in
                        the BlurPool stem
    energy              the same with the root of the blurred energy in place of the blurred modulus
    mixpool aa_layer    the same, and every later strided layer antialiased by BlurPool

All weights are random: costs do not hang on them. mixpool's stems run on its reference path, the one there is on a CPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

NETWORKS = ("resnet18", "resnet34", "resnet50", "alexnet")
# The three ResNets have the same stem. What comes behind a stem is built small, since it is thrown away.
STEMS: dict[str, tuple[str, dict[str, Any]]] = {
    "resnet stem": ("resnet18", {"layers": (1, 1, 1, 1), "channels": (8, 8, 8, 8), "num_classes": 0}),
    "alexnet stem": ("alexnet", {"num_classes": 0, "global_pool": ""}),
}
SUBJECTS = (*STEMS, *NETWORKS)

BLUR_STEM, TIMM_AA, CMOD, ENERGY = "BlurPool stem", "timm aa_layer", "CMod", "energy"
OPTIONS: dict[str, dict[str, Any]] = {
    BLUR_STEM: {"select": "none", "init": "none", "rest": "blurpool"},
    CMOD: {"pooling": "cmod", "rest": "max"},
    "mixpool": {},
    ENERGY: {"pooling": "energy"},
    "mixpool aa_layer": {"aa_layer": "blur"},
}
VARIANTS = ("stock", BLUR_STEM, TIMM_AA, *(name for name in OPTIONS if name != BLUR_STEM))


def variants_of(subject: str) -> tuple[str, ...]:
    """The variants that a subject has; `aa_layer` adds nothing to mixpool's stem."""
    missing = {TIMM_AA} if "alexnet" in subject else set()
    missing |= {"mixpool aa_layer"} if subject in STEMS else set()
    return tuple(name for name in VARIANTS if name not in missing)


def build(subject: str, variant: str) -> nn.Module:
    """A network of 1000 classes or its stem alone, in training mode, with the random weights of a fixed seed.

    Raises:
        ValueError: there is no such subject, or it has no such variant.
    """
    if subject not in SUBJECTS or variant not in variants_of(subject):
        raise ValueError(f"expected one of {SUBJECTS} in a variant that it has, got {subject!r}, {variant!r}")
    torch.manual_seed(0)
    if subject in STEMS:
        name, small = STEMS[subject]
        return _stem_of(_network(name, variant, small))
    return _network(subject, variant, {})


def _network(name: str, variant: str, size: dict[str, Any]) -> nn.Module:
    import timm

    import mixpool.timm_models  # noqa: F401  registers mixpool_*
    from mixpool.timm_models.alexnet import AlexNet

    if variant in OPTIONS:
        options = OPTIONS[variant] | ({"num_bank": 32 if name == "alexnet" else 24} if variant == CMOD else {})
        return timm.create_model(f"mixpool_{name}", backend="reference", **options, **size)
    if name == "alexnet":
        return AlexNet(**size)
    return timm.create_model(name, **({"aa_layer": timm.layers.BlurPool2d} if variant == TIMM_AA else {}), **size)


def _stem_of(model: nn.Module) -> nn.Module:
    """conv, norm, activation and pool; of a converted model the mixpool stem and what it left in the other places."""
    if hasattr(model, "features"):
        return model.features[:3]
    return nn.Sequential(model.conv1, model.bn1, model.act1, model.maxpool)


def random_images(batch: int, size: int, layout: str = "NCHW") -> Tensor:
    """(batch, 3, size, size), about as large as normalised photographs."""
    x = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
    return x.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else x
