"""What is trained on CIFAR-10: recipes, networks that differ in the stem alone, and the tables that compare them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

# What puts the networks into timm's registry.
MODULES = ["mixpool.timm_models", "benchmarks.dense_stem", "benchmarks.gated_stem", "benchmarks.small_alexnet"]
CONFIG = Path(__file__).parents[1] / "configs" / "cifar10_resnet18_30epochs.yaml"


class Recipe(NamedTuple):
    """A network, stock and with mixpool's stem (timm's names), and options of `mixpool train` beside CONFIG's."""

    stock: str
    mixed: str
    options: dict[str, Any]


RECIPES = {
    "full": Recipe("resnet18", "mixpool_resnet18", {"val_interval": 5}),
    # the first runs, before the configuration's batch was doubled
    "batch_128": Recipe(
        "resnet18",
        "mixpool_resnet18",
        {"batch_size": 128, "lr": 0.1, "warmup_lr": 0.01, "channels_last": False},
    ),
    # half as many channels behind the stem, which has all of its 64: 5 times faster, for comparing many
    "half": Recipe(
        "resnet18",
        "mixpool_resnet18",
        {
            "model_kwargs": {"channels": [32, 64, 128, 256]},
            "epochs": 12,
            "warmup_epochs": 1,
            "val_interval": 4,
        },
    ),
    "alexnet": Recipe(
        "small_alexnet",
        "mixpool_small_alexnet",
        {
            "img_size": 64,
            "epochs": 20,
            "lr": 0.02,  # it has no norm layers
            "warmup_lr": 0.002,
            "val_interval": 5,
        },
    ),
}


def _last(count: int) -> list[bool]:
    return [channel >= 64 - count for channel in range(64)]


# What a network with mixpool's stem is told; None: the stock network.
STEMS: dict[str, dict[str, Any] | None] = {
    "stock": None,
    "blurpool": {"select": "none", "init": "none", "max_blur": 3},
    "cmod": {"blur": 1},
    "mixpool": {},
    "mixpool_max_blur": {"max_blur": 3},
    # controls: the bank without the modulus, the modulus without a bank
    "stock_wavelet": {"select": "none"},
    "random_24": {"init": "none", "select": _last(24)},
    "random_48_free": {"init": "none", "select": _last(48), "imag": "free"},
    # how many
    **{f"wavelet_{count}": {"num_bank": count} for count in (8, 16, 32, 48, 64)},
    **{f"gabor_{count}": {"init": "gabor", "num_bank": count} for count in (24, 32, 48, 64)},
    # the partner
    "mixpool_free": {"imag": "free"},
    "gabor_32_free": {"init": "gabor", "num_bank": 32, "imag": "free"},
    "wavelet_48_free": {"num_bank": 48, "imag": "free"},
    # blur
    "wavelet_32_max_blur": {"num_bank": 32, "max_blur": 3},
    "wavelet_48_max_blur": {"num_bank": 48, "max_blur": 3},
    "wavelet_48_free_max_blur": {"num_bank": 48, "imag": "free", "max_blur": 3},
    "gabor_48_free_max_blur": {"init": "gabor", "num_bank": 48, "imag": "free", "max_blur": 3},
}
# Networks of another name, with arguments of their own.
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "gated": ("gated_resnet18", {}),
    "wide_blur": ("wide_blur_resnet18", {}),
    "wide_blur_free": ("wide_blur_resnet18", {"imag": "free"}),
    "dense": ("dense_resnet18", {}),
    "dense_aa": ("dense_resnet18", {"aa_layer": "blur"}),
}
# With BlurPool in the strided layers behind the stem; the stem stays.
ANTIALIASED: dict[str, dict[str, Any]] = {
    f"{name}_aa": {"max_blur": 1, **({"select": "none", "init": "none"} if stem is None else stem), "aa_layer": "blur"}
    for name, stem in STEMS.items()
}


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
            arguments = (STEMS | ANTIALIASED)[self.variant]
            model = recipe.stock if arguments is None else recipe.mixed
        arguments = recipe.options.get("model_kwargs", {}) | (arguments or {})
        return recipe.options | {"model": model, "model_kwargs": arguments, "seed": self.seed}


MAIN = ("stock", "blurpool", "cmod", "mixpool", "mixpool_max_blur")
SCREEN = (
    *("stock", "mixpool", "wavelet_48_max_blur", "blurpool", "dense", "stock_aa", "wavelet_48_max_blur_aa"),
    *("gabor_48_free_max_blur", "wide_blur", "wavelet_48_free_max_blur", "gabor_32_free", "blurpool_aa", "cmod"),
    *("mixpool_max_blur", "wide_blur_free", "wavelet_48", "wavelet_64", "random_48_free", "gated", "mixpool_free"),
    *("wavelet_32", "wavelet_16", "wavelet_8", "gabor_24", "random_24", "stock_wavelet", "dense_aa"),
)
# Name -> recipe and networks; the seed of batch_128 is 42.
TABLES: dict[str, tuple[str, tuple[str, ...]]] = {
    "main": ("full", (*MAIN, *(f"{name}_aa" for name in MAIN))),
    "alexnet": ("alexnet", MAIN),
    "screen": ("half", SCREEN),
    "batch_128": ("batch_128", ("stock", "mixpool")),
}


def rows(table: str, seeds: list[int]) -> list[Row]:
    """The runs of a table, all networks with the first seed before any with the next."""
    recipe, variants = TABLES[table]
    return [Row(variant, recipe, seed) for seed in seeds for variant in variants]
