"""timm models with a mixpool stem: importing this module registers them, `timm.create_model("mixpool_resnet34")`.

The models are AlexNet, ResNet-18/26/34/50/101/152, ResNeXt-50/101, Wide-ResNet-50/101, SE-ResNet-50 and DenseNet-121,
under the names of timm's stock models after `mixpool_`, with the same tags (`mixpool_resnet34.tv_in1k`). Besides the
stock model's arguments every one of them takes those of `MixPoolModel`.
"""

from __future__ import annotations

import copy
import re
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import BlurPool2d
from timm.models import (
    BasicBlock,
    Bottleneck,
    DenseNet,
    PretrainedCfg,
    ResNet,
    adapt_input_conv,
    build_model_with_cfg,
    generate_default_cfgs,
    get_arch_pretrained_cfgs,
    register_model,
)
from torch import Tensor, nn

from mixpool.alexnet import TAPS, AlexNet
from mixpool.checkpoint import converted_stems, stock_state_dict
from mixpool.convert import convert, revert
from mixpool.report import ConversionReport
from mixpool.selection import Select
from mixpool.wavelet_stem import initialize

__all__ = ["MixPoolAlexNet", "MixPoolDenseNet", "MixPoolModel", "MixPoolResNet"]  # register_model adds the others

PREFIX = "mixpool_"
INITS = ("wavelet", "gabor", "none")


class ZeroPaddedBlurPool2d(BlurPool2d):
    """timm's "blurpc": BlurPool on a border of zeros. A class, where timm has a partial that its ResNet cannot take."""

    def __init__(self, channels: int | None = None, stride: int = 2, **place: Any) -> None:
        super().__init__(channels, stride=stride, pad_mode="constant", **place)


# timm's names; its ResNet and DenseNet take only classes, and YAML and JSON know only names.
AA_LAYERS = {
    "avg": nn.AvgPool2d,
    "avgpool": nn.AvgPool2d,
    "blur": BlurPool2d,
    "blurpool": BlurPool2d,
    "blurpc": ZeroPaddedBlurPool2d,
}


# --- models -----------------------------------------------------------------------------------------------------------


class MixPoolModel:
    """What the models here add to their stock class: the arguments of the stem, and how weights arrive.

    Weights that bring a channel plan (a converted model's, by whatever way: `pretrained=True` with a file, `local-dir:`
    or `hf-hub:`, `checkpoint_path`, `load_state_dict`) are loaded with their plan. Stock weights, which have none, go
    into the stock model, and then the channels are chosen from them as `select` says. `revert(model)` ends both: the
    model is then a stock model.

    For stock weights call the `load_state_dict` of the model itself: one that DDP or torch.compile has wrapped passes
    this class by and chooses no channels. And a state does not tell `aa_layer`, whose layers have no parameters: build
    the model with the same one before you load. (`mixpool evaluate` and timm's `save_for_hf` see to that themselves.)

    Args:
        select: as for `mixpool.convert`, which channels of stock weights take the modulus. Without weights, "auto" is
            the bank's channels (see `init`); anything else decides instead of it ("none": the real-valued twin).
        blur: as for `mixpool.convert`.
        max_blur: as for `mixpool.convert`; default 3 beside a bank on the modulus (see `init`) and with `aa_layer`, as
            a model antialiased throughout has it, else 1.
        imag: "tied" or "free", as for `mixpool.convert`; default the checkpoint's, and "tied" without one.
        backend: as for `mixpool.convert`.
        init: what the stem starts from where no weights are loaded: "wavelet" or "gabor" for the bank of
            `mixpool.initialize`, or "none" for the stock model's random filters. All filters are trainable. The
            default is "wavelet" because Leterme et al. (arXiv 2212.00394) trained models with these packets, there
            fixed, from scratch and found them more accurate than the stock ones.
        num_bank: channels that the bank fills; default 48 of 64 (AlexNet: 32 of 64; for gray images the others have 16
            wavelet packets).
        aa_layer: antialiases the strided layers behind the stem: a class such as `timm.layers.BlurPool2d`, or timm's
            name "blur", "blurpc" or "avg". The stem keeps its mixed pooling. (A class of your own has no name that
            `save_for_hf` could write.)
        bn_momentum, bn_eps: for all batch norms of the model, where they are given.
        expects_weights: weights will be loaded next, so `init` and `select` wait for them. The entry points set it.
    Attributes:
        report: ConversionReport of the last conversion; print it. None after a checkpoint brought its plan.
    Raises:
        ValueError: an argument does not fit, or the device is meta.
    """

    stem_pool: str | None = None  # name of the stem's pool where `aa_layer` changes that
    feature_options: Mapping[str, Any] = {}

    def __init__(
        self,
        *args: Any,
        select: Select = "auto",
        blur: int = 3,
        max_blur: int | None = None,
        imag: str | None = None,
        backend: str = "auto",
        init: str = "wavelet",
        num_bank: int | None = None,
        aa_layer: type[nn.Module] | str | None = None,
        bn_momentum: float | None = None,
        bn_eps: float | None = None,
        expects_weights: bool = False,
        **stock: Any,
    ) -> None:
        if init not in INITS:
            raise ValueError(f"expected init to be one of {INITS}, got {init!r}")
        if init == "none" and num_bank is not None:
            raise ValueError(f"expected no num_bank without a bank (init='none'), got {num_bank}")
        aa_layer = _aa_class(aa_layer)
        super().__init__(*args, aa_layer=aa_layer, **stock)
        if aa_layer is not None and self.stem_pool is not None:
            parent, _, child = self.stem_pool.rpartition(".")
            setattr(self.get_submodule(parent), child, nn.MaxPool2d(3, 2, 1))
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.momentum = module.momentum if bn_momentum is None else bn_momentum
                module.eps = module.eps if bn_eps is None else bn_eps
        self._select, self._imag = select, imag
        usual_blur = 1 if aa_layer is None else 3
        self._stem_options = {
            "blur": blur,
            "max_blur": usual_blur if max_blur is None else max_blur,
            "backend": backend,
        }
        self.report: ConversionReport | None = None
        if expects_weights:
            self._convert("none")
        elif init == "none":
            self._convert(select)
        elif _is_auto(select):
            options = self._stem_options | {"max_blur": max_blur}  # None: initialize's default
            imag = "tied" if imag is None else imag
            self.report = initialize(self, init, num_channels=num_bank, imag=imag, **options)
        else:
            initialize(self, init, num_channels=num_bank, pooling="max", **self._stem_options)
            revert(self)
            self._convert(select)
            if max_blur is None and usual_blur == 1 and self.report.num_modulus > 0:
                revert(self)
                self._convert(select, max_blur=3)

    def _convert(self, select: Select, imag: str | None = None, **blurs: int) -> None:
        imag = self._imag if imag is None else imag
        options = self._stem_options | blurs
        self.report = convert(self, select=select, imag="tied" if imag is None else imag, **options)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As torch's; a converted model's state brings its plan, from a stock state channels are chosen by `select`.

        Warns:
            UserWarning: `select="auto"` found no channel in a stock state that the modulus suits.
        """
        name, stem = next(iter(converted_stems(self).items()), (None, None))
        if stem is None or f"{name}.weight" not in state_dict:
            return super().load_state_dict(state_dict, strict, assign)
        is_stock = f"{name}.plan" not in state_dict
        becomes_free = self._imag is None and stem.imag == "tied" and f"{name}.weight_imag" in state_dict
        blurs = {"blur": stem.blur, "max_blur": stem.max_blur}
        present = {"select": [kind == "modulus" for kind in stem.kinds], "imag": stem.imag, **blurs}
        if is_stock or becomes_free:
            self._try_on_a_copy(state_dict, strict, is_stock)
            revert(self)
        try:
            if becomes_free:
                self._convert("none", imag="free")
            keys = super().load_state_dict(state_dict, strict, assign)
        except BaseException:
            if is_stock or becomes_free:
                if converted_stems(self):
                    revert(self)
                self._convert(**present)
            raise
        self.report = None
        if is_stock:
            self._convert(self._select)
            if self.report.num_modulus == 0 and _is_auto(self._select):
                message = f"no channel takes the modulus: {'; '.join(self.report.notes)}"
                warnings.warn(message, stacklevel=_levels_to_caller())
        return keys

    def _try_on_a_copy(self, state_dict: Mapping[str, Any], strict: bool, is_stock: bool) -> None:
        """Raise torch's error for a state that does not fit, while the model still is what it was."""
        wanted = stock_state_dict(self) if is_stock else self.state_dict()
        shapes = {key: getattr(value, "shape", None) for key, value in state_dict.items()}
        if shapes == {key: value.shape for key, value in wanted.items()}:
            return
        twin = copy.deepcopy(self)
        revert(twin)
        if not is_stock:
            twin._convert("none", imag="free")
        super(MixPoolModel, twin).load_state_dict(state_dict, strict)

    @property
    def _model_args(self) -> dict[str, Any]:
        """The arguments of the model as timm keeps them for `save_for_hf`, in a form that JSON can hold."""
        return self.__dict__.setdefault("_plain_arguments", {})

    @_model_args.setter
    def _model_args(self, arguments: Mapping[str, Any]) -> None:
        plain = dict(arguments)
        if isinstance(plain.get("aa_layer"), type):
            plain["aa_layer"] = next((n for n, cls in AA_LAYERS.items() if cls is plain["aa_layer"]), plain["aa_layer"])
        if isinstance(plain.get("select"), (Tensor, np.ndarray)):
            plain["select"] = plain["select"].tolist()
        elif callable(plain.get("select")):
            for stem in converted_stems(self).values():  # what it chose
                plain["select"] = [kind == "modulus" for kind in stem.kinds]
        self.__dict__["_plain_arguments"] = plain


class MixPoolResNet(MixPoolModel, ResNet):
    """timm's ResNet (also ResNeXt, Wide-ResNet and SE-ResNet) with a mixpool stem; see MixPoolModel."""

    stem_pool = "maxpool"


class MixPoolDenseNet(MixPoolModel, DenseNet):
    """timm's DenseNet with a mixpool stem; see MixPoolModel. `aa_layer` antialiases the transitions."""

    stem_pool = "features.pool0"
    feature_options = {"flatten_sequential": True}

    def __init__(self, *args: Any, aa_layer: type[nn.Module] | str | None = None, **options: Any) -> None:
        if _aa_class(aa_layer) is nn.AvgPool2d:
            raise ValueError("expected a BlurPool as DenseNet's aa_layer: its transitions have average pools already")
        super().__init__(*args, aa_layer=aa_layer, aa_stem_only=False, **options)


class MixPoolAlexNet(MixPoolModel, AlexNet):
    """AlexNet with a mixpool stem; see MixPoolModel."""

    feature_options = {"flatten_sequential": True, "out_indices": tuple(range(len(TAPS)))}


def _levels_to_caller() -> int:
    """For `warnings.warn`: how far above its caller the first code is that is not timm's, torch's or ours."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in (
        "mixpool",
        "timm",
        "torch",
    ):
        level, frame = level + 1, frame.f_back
    return level


def _is_auto(select: Select) -> bool:
    return isinstance(select, str) and select == "auto"


def _aa_class(aa_layer: type[nn.Module] | str | None) -> type[nn.Module] | None:
    """The class that a name stands for."""
    if aa_layer is None or isinstance(aa_layer, type):
        return aa_layer
    if isinstance(aa_layer, str) and aa_layer in AA_LAYERS:
        return AA_LAYERS[aa_layer]
    raise ValueError(f"expected aa_layer to be a class or one of {sorted(AA_LAYERS)}, got {aa_layer!r}")


# --- checkpoints and the registry -------------------------------------------------------------------------------------


def _fitted_state(state_dict: Mapping[str, Tensor], model: MixPoolModel) -> dict[str, Tensor]:
    """A checkpoint as the model can load it, where timm does not see to that: two keys that only some files have."""
    state = {}
    for key, value in state_dict.items():
        if key.endswith(".weight_imag") and value.shape[1] != model.in_chans:
            value = adapt_input_conv(model.in_chans, value, base_chans=value.shape[1])  # as timm does to the weight
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


def _register(name: str) -> Callable[..., nn.Module]:
    """Make and register the entry point of one model."""
    model_cls, sizes = ARCHITECTURES[name]

    def entry_point(pretrained: bool = False, **options: Any) -> nn.Module:
        return build_model_with_cfg(
            model_cls,
            PREFIX + name,
            pretrained,
            feature_cfg=dict(model_cls.feature_options),
            pretrained_filter_fn=_fitted_state,
            expects_weights=pretrained,
            **{**sizes, **options},
        )

    entry_point.__name__ = entry_point.__qualname__ = PREFIX + name
    entry_point.__doc__ = f"timm's {name} with a mixpool stem; options as for {model_cls.__name__}."
    return register_model(entry_point)


for _name in ARCHITECTURES:
    globals()[PREFIX + _name] = _register(_name)
