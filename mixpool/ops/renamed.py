"""Keywords of earlier versions: each is refused with its present spelling."""

from __future__ import annotations

from typing import Any

# Keyword -> what to write for a value of it.
SPELLED_NOW = {
    "blur": lambda value: 'pooling="cmod"' if value == 1 else 'pooling="modulus"',
    "max_blur": lambda value: 'rest="blurpool"' if value == 3 else 'rest="max"',
    "imag": lambda value: (
        "nothing: the imaginary filters always follow the real ones"
        if value == "tied"
        else "nothing: free imaginary filters were less accurate in every comparison, and are gone"
    ),
    "is_modulus": lambda value: 'pooling=["max", "modulus", ...], a name for each channel',
    "trainable": lambda value: "nothing: all filters are trained",
}


def refuse_old(function: str, keywords: dict[str, Any], **now: str) -> None:
    """Raise TypeError, as Python does for unknown keywords, with the present spelling where there is one.

    Args:
        function: whose keywords they are.
        keywords: those that it does not know.
        now: present spellings that hold for this function alone.
    """
    for name, value in keywords.items():
        if name in now:
            spelling = now[name]
        elif name in SPELLED_NOW:
            spelling = SPELLED_NOW[name](value)
        else:
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")
        raise TypeError(f"{function}() has no {name}= any more; instead of {name}={value!r} write {spelling}")
