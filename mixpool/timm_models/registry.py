"""The names of timm's registry: one line for each architecture, and where its weights are."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import (
    BasicBlock,
    Bottleneck,
    PretrainedCfg,
    build_model_with_cfg,
    generate_default_cfgs,
    get_arch_pretrained_cfgs,
)
from torch import Tensor, nn

from mixpool.timm_models.model import MixPoolAlexNet, MixPoolDenseNet, MixPoolModel, MixPoolResNet

PREFIX = "mixpool_"


def _fitted_state(state_dict: Mapping[str, Tensor], model: MixPoolModel) -> dict[str, Tensor]:
    """A checkpoint as the model can load it, where timm does not see to that: keys that only some files have."""
    state = {}
    for key, value in state_dict.items():
        # torchvision's DenseNet files still call the parts of a dense layer norm.1, conv.2 and so on.
        state[re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)", r"\1\2", key)] = value
    return state


ALEXNET_CFG = {
    "url": "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
    "num_classes": 1000,
    "input_size": (3, 224, 224),
    "pool_size": (6, 6),
    "crop_pct": 0.875,
    "interpolation": "bilinear",
    "mean": IMAGENET_DEFAULT_MEAN,
    "std": IMAGENET_DEFAULT_STD,
    "first_conv": "features.0",
    "classifier": "classifier.6",
    "license": "bsd-3-clause",
}
RESNETS = {
    "resnet18": {"block": BasicBlock, "layers": (2, 2, 2, 2)},
    "resnet26": {"block": Bottleneck, "layers": (2, 2, 2, 2)},
    "resnet34": {"block": BasicBlock, "layers": (3, 4, 6, 3)},
    "resnet50": {"block": Bottleneck, "layers": (3, 4, 6, 3)},
    "resnet101": {"block": Bottleneck, "layers": (3, 4, 23, 3)},
    "resnet152": {"block": Bottleneck, "layers": (3, 8, 36, 3)},
    "resnext50_32x4d": {"block": Bottleneck, "layers": (3, 4, 6, 3), "cardinality": 32, "base_width": 4},
    "resnext101_32x4d": {"block": Bottleneck, "layers": (3, 4, 23, 3), "cardinality": 32, "base_width": 4},
    "resnext101_32x8d": {"block": Bottleneck, "layers": (3, 4, 23, 3), "cardinality": 32, "base_width": 8},
    "resnext101_64x4d": {"block": Bottleneck, "layers": (3, 4, 23, 3), "cardinality": 64, "base_width": 4},
    "wide_resnet50_2": {"block": Bottleneck, "layers": (3, 4, 6, 3), "base_width": 128},
    "wide_resnet101_2": {"block": Bottleneck, "layers": (3, 4, 23, 3), "base_width": 128},
    "seresnet50": {"block": Bottleneck, "layers": (3, 4, 6, 3), "block_args": {"attn_layer": "se"}},
}
# Name of the stock model -> class and what the stock model is built with.
ARCHITECTURES: dict[str, tuple[type[MixPoolModel], dict[str, Any]]] = {
    **{name: (MixPoolResNet, sizes) for name, sizes in RESNETS.items()},
    "densenet121": (MixPoolDenseNet, {"growth_rate": 32, "block_config": (6, 12, 24, 16)}),
    "alexnet": (MixPoolAlexNet, {}),
}


def _stock_cfgs() -> dict[str, PretrainedCfg | dict[str, Any]]:
    """timm's configurations of the stock weights, the default first, under the names of the models here."""
    cfgs: dict[str, PretrainedCfg | dict[str, Any]] = {f"{PREFIX}alexnet.tv_in1k": ALEXNET_CFG}
    for name in ARCHITECTURES:
        cfgs |= {PREFIX + tagged: cfg for tagged, cfg in get_arch_pretrained_cfgs(name).items()}
    return cfgs


default_cfgs = generate_default_cfgs(_stock_cfgs())


def entry_point(name: str, module: str) -> Callable[..., nn.Module]:
    """timm's entry point of one model, as a function of the module that registers it."""
    model_cls, sizes = ARCHITECTURES[name]

    def create(pretrained: bool = False, **options: Any) -> nn.Module:
        return build_model_with_cfg(
            model_cls,
            PREFIX + name,
            pretrained,
            feature_cfg=dict(model_cls.feature_options),
            pretrained_filter_fn=_fitted_state,
            expects_weights=pretrained,
            **{**sizes, **options},
        )

    create.__module__ = module
    create.__name__ = create.__qualname__ = PREFIX + name
    create.__doc__ = f"timm's {name} with a mixpool stem; options as for {model_cls.__name__}."
    return create
