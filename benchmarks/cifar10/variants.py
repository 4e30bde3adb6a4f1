"""What is trained on CIFAR-10: recipes, networks that differ in the stem alone, and the tables that compare them."""

from __future__ import annotations

from typing import Any, NamedTuple

from benchmarks.kit.store import ROOT

# What puts the networks into timm's registry.
MODULES = [
    "mixpool.timm_models",
    "benchmarks.cifar10.dense_stem",
    "benchmarks.cifar10.small_alexnet",
    "benchmarks.cifar10.small_vgg",
]
CONFIG = ROOT / "configs" / "cifar10_resnet18_30epochs.yaml"


class Recipe(NamedTuple):
    """A network, stock and with mixpool's stem (timm's names), and options of `mixpool train` beside CONFIG's."""

    stock: str
    mixed: str
    options: dict[str, Any]


# half as many channels behind the stem, which has all of its 64: 5 times faster, for comparing many
HALF = {
    "model_kwargs": {"channels": [32, 64, 128, 256]},
    "epochs": 12,
    "warmup_epochs": 1,
    "val_interval": 4,
}
RECIPES = {
    "full": Recipe("resnet18", "mixpool_resnet18", {"val_interval": 5}),
    # the first runs, before the configuration's batch was doubled
    "batch_128": Recipe(
        "resnet18",
        "mixpool_resnet18",
        {"batch_size": 128, "lr": 0.1, "warmup_lr": 0.01, "channels_last": False},
    ),
    "half": Recipe("resnet18", "mixpool_resnet18", HALF),
    # for a CPU that has no bfloat16 of its own, and 20 times as slow in emulating it
    "half_float32": Recipe("resnet18", "mixpool_resnet18", HALF | {"amp": False}),
    # ... and all epochs of the configuration
    "half_30_float32": Recipe(
        "resnet18",
        "mixpool_resnet18",
        {"model_kwargs": HALF["model_kwargs"], "val_interval": 5, "amp": False},
    ),
    # a network of max pools of 2 x 2, to be stabilized
    "vgg_30_float32": Recipe("small_vgg", "small_vgg", {"val_interval": 5, "amp": False}),
    "alexnet": Recipe(
        "small_alexnet",
        "mixpool_small_alexnet",
        {
            "img_size": 64,
            "epochs": 12,
            "lr": 0.02,  # it has no norm layers
            "warmup_lr": 0.002,
            "val_interval": 5,
        },
    ),
}


def _last(count: int) -> list[bool]:
    return [channel >= 64 - count for channel in range(64)]


# mixpool's default in a ResNet, spelt out, so that a record says what it measured whatever the default is later.
DEFAULT: dict[str, Any] = {"num_bank": 48, "rest": "blurpool"}
# What a network with mixpool's stem is told; None: the stock network.
STEMS: dict[str, dict[str, Any] | None] = {
    "stock": None,
    "blurpool": {"select": "none", "init": "none", "rest": "blurpool"},
    "cmod": {"num_bank": 24, "pooling": "cmod", "rest": "max"},  # paper 2's
    "mixpool": DEFAULT,
    # one thing changed: how many channels
    **{f"wavelet_{count}": DEFAULT | {"num_bank": count} for count in (8, 16, 24, 32, 64)},
    # ... the filters that training starts from
    "gabor": DEFAULT | {"init": "gabor"},
    "random": {"init": "none", "select": _last(48), "rest": "blurpool"},
    # ... a pooling: |z| at the window's centre; the others on plain max pooling; the wavelets on BlurPool's
    "blur_1": DEFAULT | {"pooling": "cmod"},
    "no_max_blur": DEFAULT | {"rest": "max"},
    "wavelet_blurpool": DEFAULT | {"select": "none"},
    # more than one
    "wavelet_24_no_max_blur": {"num_bank": 24, "rest": "max"},  # the default until this table
}
# AlexNet's default has half of the channels on the modulus.
ALEXNET_STEMS: dict[str, dict[str, Any] | None] = STEMS | {
    "cmod": {"num_bank": 32, "pooling": "cmod", "rest": "max"},
    "mixpool": {"num_bank": 32, "rest": "blurpool"},
    "wavelet_32_no_max_blur": {"num_bank": 32, "rest": "max"},
    "wavelet_48": {"num_bank": 48, "rest": "blurpool"},
}
# What version 0.1 alone could train: imaginary filters that are free of the real ones, and a learned gate between both
# poolings. Their rows are those of the records.
GONE = ("free", "gabor_free", "random_free", "gated")
# Networks of another name, with arguments of their own.
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "wide_blur": ("wide_blur_resnet18", {}),
    "dense": ("dense_resnet18", {}),
    "dense_aa": ("dense_resnet18", {"aa_layer": "blur"}),
}


def _antialiased(stems: dict[str, dict[str, Any] | None]) -> dict[str, dict[str, Any]]:
    """With BlurPool in the strided layers behind the stem; the stem stays."""
    stock = {"rest": "max", "select": "none", "init": "none"}
    return {f"{name}_aa": (stock if stem is None else stem) | {"aa_layer": "blur"} for name, stem in stems.items()}


class Row(NamedTuple):
    """One run."""

    variant: str
    recipe: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.recipe}-{self.variant}-{self.seed}"

    def definition(self) -> dict[str, Any]:
        """What is trained and how, as `mixpool train` is told beside the configuration."""
        recipe = RECIPES[self.recipe]
        if self.variant in OTHERS:
            model, arguments = OTHERS[self.variant]
        else:
            stems = ALEXNET_STEMS if self.recipe == "alexnet" else STEMS
            arguments = (stems | _antialiased(stems))[self.variant]
            model = recipe.stock if arguments is None else recipe.mixed
        arguments = recipe.options.get("model_kwargs", {}) | (arguments or {})
        return recipe.options | {"model": model, "model_kwargs": arguments, "seed": self.seed}


MAIN = ("stock", "blurpool", "cmod", "mixpool")
DESIGNS = ("no_max_blur", "wavelet_64", "wide_blur", "wavelet_24_no_max_blur", "gabor_free", "blur_1", "free", "gabor")
FLOAT32_DESIGNS = (
    *("random", "wavelet_8", "wavelet_16", "wavelet_24", "wavelet_32", "gated", "wavelet_blurpool", "random_free"),
)
# Name -> recipe and networks; the seed of batch_128 is 42.
TABLES: dict[str, tuple[str, tuple[str, ...]]] = {
    "main": ("half", MAIN),
    "main_float32": ("half_float32", MAIN),
    "later": ("half", tuple(f"{name}_aa" for name in MAIN)),
    "bound": ("half", ("dense", "dense_aa")),
    "designs": ("half", DESIGNS),
    "designs_float32": ("half_float32", FLOAT32_DESIGNS),
    "main_30_float32": ("half_30_float32", MAIN),
    "full": ("full", MAIN),
    "alexnet": ("alexnet", (*MAIN, "wavelet_16", "wavelet_32_no_max_blur", "wavelet_48")),
    "vgg": ("vgg_30_float32", ("stock",)),
    "batch_128": ("batch_128", ("stock", "wavelet_24_no_max_blur")),
}


def rows(table: str, seeds: list[int]) -> list[Row]:
    """The runs of a table, all networks with the first seed before any with the next."""
    recipe, variants = TABLES[table]
    return [Row(variant, recipe, seed) for seed in seeds for variant in variants if variant not in GONE]
