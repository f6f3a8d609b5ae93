"""Symbols of icon fonts as a test set."""

from __future__ import annotations

import importlib.util
import io

import pytest
from PIL import Image

from reinforce.demo import glyphs
from reinforce.demo.data import shared_concepts
from reinforce.demo.styles import PIXELS
from reinforce.errors import UserError


def test_symbols_are_black_and_have_the_name_of_a_concept() -> None:
    concepts = [concept for concept in shared_concepts() if concept.name in ("anchor", "camera", "mouse", "cat face")]
    found = [(style, concept.name, png) for style, concept, png in glyphs.read_symbols(concepts)]
    assert [(style, name) for style, name, _ in found] == [
        ("material", "anchor"), ("material", "camera"), ("fontawesome", "anchor"), ("fontawesome", "camera"),
    ]  # fmt: skip  # the symbol `mouse` is a computer mouse
    for _, _, png in found:
        with Image.open(io.BytesIO(png)) as image:
            assert (image.size, image.mode) == ((PIXELS, PIXELS), "RGBA")
            assert image.convert("RGB").getextrema() == ((0, 0),) * 3
            left, top, right, bottom = image.getchannel("A").point(lambda alpha: 255 * (alpha > 99)).getbbox() or ()
            assert max(right - left, bottom - top) >= PIXELS - 2  # without margins
    assert "SIL OFL" in glyphs.credits_text()


def test_a_missing_package_is_a_user_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"qtawesome.*pip install -e"):
        next(glyphs.read_symbols([]))
