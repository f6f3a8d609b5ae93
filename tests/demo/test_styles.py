"""Drawings of Twemoji and OpenMoji."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

from reinforce.demo.data import UNSEEN_PICTURES
from reinforce.demo.styles import PIXELS, credits_text, render_cropped, twemoji
from tests.helpers.demo import read_shards


def test_openmoji_drawings_have_no_margins(tests: Path) -> None:
    for members in read_shards(sorted((tests / UNSEEN_PICTURES).glob("*.tar"))).values():
        left, top, right, bottom = Image.open(io.BytesIO(members["png"])).convert("RGBA").getchannel("A").getbbox()
        assert max(right - left, bottom - top) >= PIXELS - 2


def test_svg_is_cropped_to_what_is_drawn() -> None:
    svg = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 40 40"><path fill="red" d="M10 15h20v10h-20z"/></svg>'
    image = Image.open(io.BytesIO(render_cropped(svg))).convert("RGBA")
    assert image.size == (PIXELS, PIXELS)
    assert image.getchannel("A").getbbox() == (0, PIXELS // 4, PIXELS, 3 * PIXELS // 4)


def test_twemoji_has_no_skin_tones() -> None:
    drawings = twemoji()
    assert "1f34e" in drawings
    assert not any("1f3fd" in key.split("-")[1:] for key in drawings)


def test_credits_name_package_versions_and_licences() -> None:
    assert "CC-BY 4.0" in credits_text("twemoji")
    assert "CC BY-SA 4.0" in credits_text("openmoji")
