"""The contact sheet."""

from __future__ import annotations

from PIL import Image

from reinforce.demo.sheet import Card, draw_sheet


def test_sheet_grows_with_cards_augmentations_and_captions() -> None:
    image = Image.new("RGB", (40, 20), "red")
    small = draw_sheet([Card(image, [image], "a red square", ["red"])])
    wide = draw_sheet([Card(image, [image] * 3, "a red square", ["red"])] * 2)
    tall = draw_sheet([Card(image, [image], "ein rötes Viereck " * 20, ["red", "square"])] * 3)
    assert wide.width > 2 * small.width
    assert tall.height > 1.5 * small.height
    assert (255, 0, 0) in {color for _, color in small.getcolors(maxcolors=2**20) or []}
