"""Keywords of version 0.1: each is refused with its present spelling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Spelling = str | Callable[[Any], str]


def _of_blur(value: Any) -> str:
    return 'pooling="cmod"' if value == 1 else 'pooling="modulus"'


def _of_max_blur(value: Any) -> str:
    return 'rest="blurpool"' if value == 3 else 'rest="max"'


def _of_imag(value: Any) -> str:
    if value == "tied":
        return "nothing: the imaginary filters always follow the real ones"
    return "nothing: free imaginary filters were less accurate in every comparison, and are gone"


SPELLED_NOW: dict[str, Spelling] = {
    "blur": _of_blur,
    "max_blur": _of_max_blur,
    "imag": _of_imag,
    "is_modulus": 'pooling=["max", "modulus", ...], a name for each channel',
    "trainable": "nothing: all filters are trained",
}


def spelled(spelling: Spelling, value: Any) -> str:
    """The present spelling of a value."""
    return spelling(value) if callable(spelling) else spelling


def name_for_each(value: Any) -> str:
    """What `max_blur` is where there is no `rest=`."""
    return f'pooling=["{"blurpool" if value == 3 else "max"}", ...], a name for each channel'


def refuse_old(function: str, keywords: dict[str, Any], **now: Spelling) -> None:
    """Raise TypeError, as Python does for unknown keywords, with the present spelling of all that had another one.

    Args:
        function: whose keywords they are.
        keywords: those that it does not know.
        now: present spellings that hold for this function alone.
    """
    spellings = {**SPELLED_NOW, **now}
    advice = []
    for name, value in keywords.items():
        if name not in spellings:
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")
        advice.append(f"instead of {name}={repr(value)[:60]} write {spelled(spellings[name], value)}")
    if advice:
        names = ", ".join(f"{name}=" for name in keywords)
        raise TypeError(f"{function}() has no {names} any more; {'; '.join(advice)}")
