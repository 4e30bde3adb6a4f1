"""What is compared: a name, and what `stabilize` is told; None is stock, "convert" the stem as `convert` has it."""

from __future__ import annotations

from typing import Any

CONVERT = "convert"
Variant = dict[str, Any] | str | None

BLUR = {"repair": None}
# Of all beds. `images`: how many of the bed's; None for synthetic pictures.
COMMON: dict[str, Variant] = {
    "stock": None,
    "convert": CONVERT,
    "stem alone": {"later": None, "repair": None},
    "stem alone, repaired": {"later": None},
    "no repair": BLUR,
    "default": {},
    "all": {"repair": "all"},
    "fidelity 0": {"fidelity": 0.0},
    "fidelity 0.25": {"fidelity": 0.25},
    "fidelity 0.75": {"fidelity": 0.75},
    "fidelity 1": {"fidelity": 1.0},
    "stem dense": {"stem": "dense"},
    "stem dense, all": {"stem": "dense", "repair": "all"},
    "stem dense, fidelity 1": {"stem": "dense", "fidelity": 1.0},
    "stem modulus": {"stem": "modulus"},
    "stem energy": {"stem": "energy"},
    "stem stock": {"stem": "max"},
    "32 images": {"images": 32},
    "100 images": {"images": 100},
    "synthetic": {"images": None},
}
# Where norm layers and strided convolutions are.
WITH_NORMS: dict[str, Variant] = {
    "stem alone, statistics": {"later": None, "repair": "statistics"},
    "everywhere, statistics": {"depth": "all", "repair": "statistics"},
    "everywhere": {"depth": "all"},
    "everywhere, all": {"depth": "all", "repair": "all"},
    "behind, no repair": BLUR | {"order": "behind"},
    "everywhere, behind, statistics": {"depth": "all", "order": "behind", "repair": "statistics"},
    "everywhere, behind": {"depth": "all", "order": "behind"},
    "everywhere, behind, all": {"depth": "all", "order": "behind", "repair": "all"},
    "250 images": {"images": 250},
}
