"""Keywords of earlier versions are refused, each with its present spelling."""

from __future__ import annotations

import pytest

from mixpool.ops.renamed import refuse_old


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"blur": 1}, 'f() has no blur= any more; instead of blur=1 write pooling="cmod"'),
        ({"blur": 3}, 'f() has no blur= any more; instead of blur=3 write pooling="modulus"'),
        ({"max_blur": 1}, 'f() has no max_blur= any more; instead of max_blur=1 write rest="max"'),
        ({"max_blur": 3}, 'f() has no max_blur= any more; instead of max_blur=3 write rest="blurpool"'),
        (
            {"imag": "tied"},
            "f() has no imag= any more; instead of imag='tied' write nothing: the imaginary filters always follow the "
            "real ones",
        ),
        (
            {"imag": "free"},
            "f() has no imag= any more; instead of imag='free' write nothing: free imaginary filters were less "
            "accurate in every comparison, and are gone",
        ),
        (
            {"is_modulus": [True]},
            'f() has no is_modulus= any more; instead of is_modulus=[True] write pooling=["max", "modulus", ...], '
            "a name for each channel",
        ),
        (
            {"trainable": False},
            "f() has no trainable= any more; instead of trainable=False write nothing: all filters are trained",
        ),
    ],
    ids=str,
)
def test_old_keywords(keywords: dict, message: str):
    with pytest.raises(TypeError) as caught:
        refuse_old("f", keywords)
    assert str(caught.value) == message


def test_a_function_can_have_a_spelling_of_its_own():
    with pytest.raises(TypeError, match="instead of blur=1 write pooling=names$"):
        refuse_old("f", {"blur": 1}, blur="pooling=names")
    with pytest.raises(TypeError, match="g.. has no select= any more; instead of select='all' write pooling=$"):
        refuse_old("g", {"select": "all"}, select="pooling=")


def test_other_keywords_are_pythons_error():
    with pytest.raises(TypeError) as caught:
        refuse_old("f", {"colour": 1})
    assert str(caught.value) == "f() got an unexpected keyword argument 'colour'"
    with pytest.raises(TypeError) as pythons:
        (lambda: None)(colour=1)
    assert str(pythons.value).partition(" got ")[2] == str(caught.value).partition(" got ")[2]
    assert refuse_old("f", {}) is None
