"""What records of version 0.1 call by other names: arguments of `convert` and of the models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_PRESENT = {
    ("blur", 1): {"pooling": "cmod"},
    ("blur", 3): {"pooling": "modulus"},
    ("max_blur", 1): {"rest": "max"},
    ("max_blur", 3): {"rest": "blurpool"},
    ("imag", "tied"): {},
}


def in_present_words(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The same arguments by the names that they have now; one that is gone (`imag="free"`) stays as it is."""
    found: dict[str, Any] = {}
    for name, value in arguments.items():
        is_old = name in ("blur", "max_blur", "imag")
        found |= _PRESENT.get((name, value), {name: value}) if is_old else {name: value}
    return found
