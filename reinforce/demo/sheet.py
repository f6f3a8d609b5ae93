"""The contact sheet: images, their replayed augmentations and their captions, drawn with Pillow."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

_TILE, _GAP, _PAD, _COLUMNS = 148, 8, 14, 2
_MARGIN, _LINE, _HEADER = 28, 21, 58
_PAPER, _CARD, _EDGE = "#f3f4f6", "#ffffff", "#e1e4e8"
_INK, _GREY, _ACCENT = "#1f2328", "#6b7280", "#0b7285"


@dataclass(frozen=True)
class Card:
    """One sample: the RGB image, its augmentations in order, its caption, its synthetic captions."""

    image: Image.Image
    replays: Sequence[Image.Image]
    caption: str
    synthetic: Sequence[str]


def draw_sheet(cards: Sequence[Card]) -> Image.Image:
    """Draw cards in two columns, RGB. All cards have the size that the most augmentations and captions need."""
    tiles = 1 + max(len(card.replays) for card in cards)
    lines = 1 + max(len(card.synthetic) for card in cards)
    width = 2 * _PAD + tiles * _TILE + (tiles - 1) * _GAP
    height = 2 * _PAD + _TILE + _GAP + lines * _LINE + 2
    rows = -(-len(cards) // _COLUMNS)
    columns = min(_COLUMNS, len(cards))
    sheet = Image.new(
        "RGB",
        (2 * _MARGIN + columns * (width + _GAP) - _GAP, _HEADER + _MARGIN + rows * (height + _GAP) - _GAP),
        _PAPER,
    )
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN, 20), "original, then each augmentation replayed", fill=_INK, font=_font(20))
    for i, card in enumerate(cards):
        left = _MARGIN + (i % _COLUMNS) * (width + _GAP)
        top = _HEADER + (i // _COLUMNS) * (height + _GAP)
        draw.rounded_rectangle((left, top, left + width, top + height), radius=10, fill=_CARD, outline=_EDGE)
        _draw_card(sheet, draw, card, (left + _PAD, top + _PAD), width - 2 * _PAD)
    return sheet


def _draw_card(sheet: Image.Image, draw: ImageDraw.ImageDraw, card: Card, origin: tuple[int, int], width: int) -> None:
    left, top = origin
    for k, image in enumerate([card.image, *card.replays]):
        x = left + k * (_TILE + _GAP)
        tile = image.copy() if k else _square(image)
        sheet.paste(tile.resize((_TILE, _TILE), Image.Resampling.LANCZOS), (x, top))
        draw.rectangle((x, top, x + _TILE - 1, top + _TILE - 1), outline=_EDGE if k else _ACCENT, width=1 if k else 2)
    y = top + _TILE + _GAP
    draw.text((left, y), _fit(draw, card.caption, 17, width), fill=_INK, font=_font(17))
    for n, text in enumerate(card.synthetic, start=1):
        draw.text((left, y + 4 + n * _LINE), _fit(draw, text, 14, width), fill=_GREY, font=_font(14))


def _square(image: Image.Image) -> Image.Image:
    """Pad the image to a white square."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), _CARD)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _fit(draw: ImageDraw.ImageDraw, text: str, size: int, width: int) -> str:
    # Pillow's default font is ASCII: accents are removed, other characters become a question mark.
    text = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    text = "".join(c if c.isascii() and c.isprintable() else "?" for c in text)
    if draw.textlength(text, _font(size)) <= width:
        return text
    while text and draw.textlength(text + "...", _font(size)) > width:
        text = text[:-1]
    return text.rstrip() + "..."


def _font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)
