"""Source shards in which some captions are exchanged: as on the web, where many do not describe their picture."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from reinforce.errors import UserError
from reinforce.seeds import permutation
from reinforce.source.urls import expand

#: Share of wrong captions in the demo's noisy shards.
SHARE = 0.4


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
