"""timm's models with a mixpool stem: the arguments they add, and how weights arrive."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
from timm.layers import BlurPool2d
from timm.models import DenseNet, ResNet
from torch import Tensor, nn

from mixpool.conversion.convert import convert, revert
from mixpool.conversion.initialize import initialize
from mixpool.conversion.report import ConversionReport
from mixpool.conversion.stock import converted_stems, stock_state_dict
from mixpool.ops.renamed import refuse_old
from mixpool.selection.rules import Select, check_words
from mixpool.timm_models.alexnet import TAPS, AlexNet

INITS = ("wavelet", "gabor", "none")
OLD_KEYWORDS = ("blur", "max_blur", "imag")


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
        select: as for `mixpool.convert`, which channels of stock weights are swapped. Without weights, "auto" is the
            bank's channels (see `init`); anything else decides instead of it ("none": the real-valued twin).
        pooling: of the swapped channels, as for `mixpool.convert`.
        rest: of the others, as for `mixpool.convert`; default "blurpool" beside a bank on a complex pooling (see
            `init`) and with `aa_layer`, as a model antialiased throughout has it, else "max".
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
        pooling: str = "modulus",
        rest: str | None = None,
        backend: str = "auto",
        init: str = "wavelet",
        num_bank: int | None = None,
        aa_layer: type[nn.Module] | str | None = None,
        bn_momentum: float | None = None,
        bn_eps: float | None = None,
        expects_weights: bool = False,
        **stock: Any,
    ) -> None:
        refuse_old(type(self).__name__, {name: stock[name] for name in OLD_KEYWORDS if name in stock})
        if init not in INITS:
            raise ValueError(f"expected init to be one of {INITS}, got {init!r}")
        if init == "none" and num_bank is not None:
            raise ValueError(f"expected no num_bank without a bank (init='none'), got {num_bank}")
        aa_layer = _aa_class(aa_layer)
        usual_rest = "max" if aa_layer is None else "blurpool"
        check_words(pooling, usual_rest if rest is None else rest)
        super().__init__(*args, aa_layer=aa_layer, **stock)
        if aa_layer is not None and self.stem_pool is not None:
            parent, _, child = self.stem_pool.rpartition(".")
            setattr(self.get_submodule(parent), child, nn.MaxPool2d(3, 2, 1))
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.momentum = module.momentum if bn_momentum is None else bn_momentum
                module.eps = module.eps if bn_eps is None else bn_eps
        self._select = select
        self._stem_options = {"pooling": pooling, "rest": usual_rest if rest is None else rest, "backend": backend}
        self.report: ConversionReport | None = None
        if expects_weights:
            self._convert("none")
        elif init == "none":
            self._convert(select)
        elif _is_auto(select):
            self.report = initialize(self, init, num_channels=num_bank, **{**self._stem_options, "rest": rest})
        else:
            options = {**self._stem_options, "pooling": "max"}
            initialize(self, init, num_channels=num_bank, **options)
            revert(self)
            self._convert(select)
            if rest is None and aa_layer is None and self.report.num_complex > 0:
                revert(self)
                self._convert(select, rest="blurpool")

    def _convert(self, select: Select, **options: str) -> None:
        self.report = convert(self, select=select, **{**self._stem_options, **options})

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As torch's; a converted model's state brings its plan, from a stock state channels are chosen by `select`.

        Warns:
            UserWarning: `select="auto"` found no channel in a stock state that the modulus suits.
        """
        name, stem = next(iter(converted_stems(self).items()), (None, None))
        if stem is None or f"{name}.weight" not in state_dict:
            return super().load_state_dict(state_dict, strict, assign)
        is_stock = f"{name}.plan" not in state_dict
        present = stem.poolings
        if is_stock:
            self._try_on_a_copy(state_dict, strict)
            revert(self)
        try:
            keys = super().load_state_dict(state_dict, strict, assign)
        except BaseException:
            if is_stock:
                self._convert(present)
            raise
        self.report = None
        if is_stock:
            self._convert(self._select)
            if self.report.num_complex == 0 and _is_auto(self._select):
                warnings.warn(f"no channel takes the modulus: {'; '.join(self.report.notes)}", stacklevel=2)
        return keys

    def _try_on_a_copy(self, state_dict: Mapping[str, Any], strict: bool) -> None:
        """Raise torch's error for a stock state that does not fit, while the model still is what it was."""
        shapes = {key: getattr(value, "shape", None) for key, value in state_dict.items()}
        if shapes == {key: value.shape for key, value in stock_state_dict(self).items()}:
            return
        twin = copy.deepcopy(self)
        revert(twin)
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
                plain["select"] = list(stem.poolings)
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


def _is_auto(select: Select) -> bool:
    return isinstance(select, str) and select == "auto"


def _aa_class(aa_layer: type[nn.Module] | str | None) -> type[nn.Module] | None:
    """The class that a name stands for."""
    if aa_layer is None or isinstance(aa_layer, type):
        return aa_layer
    if isinstance(aa_layer, str) and aa_layer in AA_LAYERS:
        return AA_LAYERS[aa_layer]
    raise ValueError(f"expected aa_layer to be a class or one of {sorted(AA_LAYERS)}, got {aa_layer!r}")
