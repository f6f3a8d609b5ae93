"""Fuzz targets: shards, members, images and texts up to crops, and published reinforcements up to layers.

Every sample must be a row, refused by its key, or in a shard that is refused as damaged. Samples that no mutation
touches must not change. ``watchdog.bounded`` limits time and memory.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import json
import lzma
import re
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import fsspec
import numpy as np
from hypothesis import strategies as st
from PIL import Image

from reinforce.config import Config, parse_config
from reinforce.engine.worker.decode import PixelLayout
from reinforce.images.backends import sample_augmentation
from reinforce.images.policy import FORMATS, ImageRefused, decode
from reinforce.images.records import replay
from reinforce.source.config import Limits
from reinforce.source.formats.tar import split_name
from reinforce.source.samples import Refusal, as_utf8, caption_of, json_error, metadata_of
from tests.fuzz import datasets, published
from tests.helpers.data import picture
from tests.helpers.decoding import RowPixels, read_source
from tests.helpers.images import encode, noise
from tests.helpers.tars import tar_bytes, zstd
from tests.hostile.images import IMAGES
from tests.hostile.texts import TEXTS

CONFIG: Config = parse_config({"source": "x", "output": "y", "augmentations": {"count": 2, "size": 24}})
LIMITS = Limits()
KEYS = [f"{i}/k{i}" for i in range(5)]
BLOCK = 512


# --- shards with changed bytes


@dataclass(frozen=True)
class Mutation:
    """``count`` bytes at ``at`` become ``value``, which may be longer or shorter."""

    at: int
    count: int
    value: bytes


Span = tuple[int, int]


def _shard() -> tuple[bytes, dict[str, Span], dict[str, list[Span]]]:
    """Return a tar of good samples, the span of each sample, and the spans of its headers."""
    members = []
    for i, key in enumerate(KEYS):
        format_ = ("PNG", "JPEG", "WEBP", "PNG", "JPEG")[i]
        image = picture(i, 40, 30, format_)
        members += [(f"{key}.{format_.lower()}", image), (f"{key}.txt", f"thing {i}".encode()), (f"{key}.json", b"{}")]
    data = tar_bytes(members)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        infos = tar.getmembers()
    spans: dict[str, Span] = {}
    headers: dict[str, list[Span]] = {key: [] for key in KEYS}
    for info in infos:
        key, _ = split_name(info.name)
        end = info.offset_data + info.size + -info.size % BLOCK
        spans[key] = (spans.get(key, (info.offset, 0))[0], end)
        headers[key].append((info.offset, info.offset_data))
    return data, spans, headers


def rows(data: bytes, name: str = "x.tar") -> list[RowPixels | Refusal]:
    """Read a shard to rows, each with its crops."""
    fsspec.filesystem("memory").pipe(f"/fuzz/{name}", data)
    found = read_source(CONFIG, f"memory://fuzz/{name}", PixelLayout((2, 24)))
    assert all(f"{row.key} {row.detail}".encode() for row in found if isinstance(row, Refusal))
    return found


def by_key_of(found: list[RowPixels | Refusal]) -> dict[str, RowPixels]:
    return {row.key: row for row in found if isinstance(row, RowPixels)}


@cache
def good_rows() -> dict[str, RowPixels]:
    """The rows of the good samples. Decoding them starts processes, so it is not done at import."""
    return by_key_of(rows(GOOD))


GOOD, SPANS, HEADERS = _shard()
_PLACES = sorted({at + more for span in SPANS.values() for at in span for more in (0, 124, 156, 257, 512)})
VALUES = st.one_of(
    st.binary(max_size=8),
    st.integers(0, 3 * BLOCK).map(bytes),
    st.integers(0, 3 * BLOCK).map(lambda count: b"\xff" * count),
    st.integers(0, len(GOOD) - 1).flatmap(lambda at: st.integers(0, 2 * BLOCK).map(lambda n: GOOD[at : at + n])),
)
MUTATIONS = st.lists(
    st.builds(
        Mutation,
        st.one_of(st.integers(0, len(GOOD)), st.sampled_from(_PLACES)),
        st.one_of(st.integers(0, 8), st.integers(0, 8 * BLOCK), st.sampled_from([BLOCK, len(GOOD)])),
        VALUES,
    ),
    max_size=3,
)
PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "x.tar.gz": lambda data: gzip.compress(data, 1),
    "x.tar.xz": lambda data: lzma.compress(data, preset=0),
    "x.tar.bz2": bz2.compress,
    "x.tar.zst": zstd,
}


def shard(mutations: list[Mutation]) -> None:
    """A plain tar with bytes replaced, inserted or removed."""
    data, touched = GOOD, []
    for mutation in sorted(mutations, key=lambda m: -m.at):  # from the end, so that earlier positions stay valid
        end = min(mutation.at + mutation.count, len(GOOD))
        if touched and end > touched[-1][0]:
            end = max(mutation.at, touched[-1][0])
        data = data[: mutation.at] + mutation.value + data[end:]
        touched.append((mutation.at, max(end, mutation.at)))
    found = rows(data)
    by_key = by_key_of(found)
    refused = {row.key for row in found if isinstance(row, Refusal)}
    for key, (start, end) in SPANS.items():
        untouched = not any(at < end and to >= start for at, to in touched)
        before = all(at >= end for at, _ in touched)
        copied = key in refused  # a mutation copied its header, and one of the two samples was refused
        if key in by_key and (before or (untouched and not copied)):
            now, then = by_key[key], good_rows()[key]
            assert (now.row.sample.image, now.row.caption) == (then.row.sample.image, then.row.caption)
            assert np.array_equal(now.crops, then.crops)
        if before:
            assert key in by_key, f"{key} is before all changes"
        elif key not in by_key and key not in refused:
            renamed = any(at < end and to >= start for at, to in touched for start, end in HEADERS[key])
            assert renamed or None in refused, f"{key} is lost"
    for sample in (found.row.sample for found in by_key.values()):
        assert data[sample.offset : sample.offset + len(sample.image)] == sample.image


def packed(name: str, mutations: list[Mutation]) -> None:
    """A compressed tar with bytes replaced, inserted or removed."""
    data = PACKED[name]
    for mutation in mutations:
        at = mutation.at * len(data) // (len(GOOD) + 1)
        data = data[:at] + mutation.value + data[at + mutation.count // 4 :]
    found = rows(data, name)
    keys = {row.key for row in found}
    assert keys >= {*KEYS} or None in keys or data == PACKED[name]


PACKED = {name: pack(GOOD) for name, pack in PACKERS.items()}

# --- tars of arbitrary members

NAMES = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=200),
    st.builds(
        "{}{}.{}".format,
        st.sampled_from(["", "./", "../", "/", "a/", "__MACOSX/", "__x__/"]),
        st.sampled_from(["a", "b", "c", "d.e", "._f", "", "k" * 120]),
        st.sampled_from(["jpg", "JPG", "png", "txt", "json", "left.png", "cls", ""]),
    ),
)
CONTENTS = st.one_of(
    st.binary(max_size=700),
    st.sampled_from(
        [b"", b"{}", b"null", b"a cat", picture(1), picture(2, format_="JPEG"), tar_bytes([("x.png", b"x")])]
    ),
)
KINDS = st.sampled_from([tarfile.REGTYPE] * 6 + [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE])
MEMBERS = st.lists(st.tuples(NAMES, KINDS, CONTENTS), max_size=12)
TAR_FORMATS = st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])


def members(listed: list[tuple[str, bytes, bytes]], tar_format: int) -> None:
    """A valid tar of arbitrary files and links: each key, and no other, is a row or refused."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as tar:
        for name, kind, content in listed:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            info.size = len(content) if kind == tarfile.REGTYPE else 0
            tar.addfile(info, io.BytesIO(content))
    with tarfile.open(fileobj=io.BytesIO(buffer.getvalue())) as tar:
        expected = {split_name(i.name)[0] for i in tar if i.isreg() or i.issym() or i.islnk()} - {""}
    found = rows(buffer.getvalue())
    assert {row.key for row in found} - {None} == {as_utf8(key) for key in expected}
    made = [row.key for row in found if isinstance(row, RowPixels)]
    assert len(made) == len({*made}), "each key has at most one row"
    assert {row.reason.value for row in found if isinstance(row, Refusal) and row.key is None} <= {"shard_unsorted"}


# --- images


@cache
def _image_seeds() -> list[bytes]:
    """Good and hostile images. Making them takes a second, so it is not done at import."""
    seeds = [encode(noise(), format_) for format_ in FORMATS]
    seeds += [
        encode(noise(200, 150), "JPEG", progressive=True),
        encode(noise(99, 70), "JPEG", restart_marker_blocks=4),
    ]
    seeds += [encode(noise().convert(mode), "PNG") for mode in ("1", "L", "LA", "P", "RGBA")]
    seeds += [
        encode(noise().convert("CMYK"), "JPEG"),
        encode(noise(), "TIFF", compression="tiff_lzw"),
        encode(noise(), "TIFF", compression="jpeg"),
        encode(Image.fromarray(np.eye(9, dtype=np.float32)), "TIFF"),
    ]
    return [*seeds, *(data for data in (case.data() for case in IMAGES) if len(data) < 20_000)]


IMAGE_BYTES = st.builds(
    lambda seed, changes, cut, more: _changed(seed, changes)[: cut and max(1, len(seed) * cut // 100)] + more,
    st.deferred(lambda: st.sampled_from(_image_seeds())),
    st.lists(
        st.tuples(st.floats(0, 1, exclude_max=True), st.one_of(st.integers(0, 255), st.binary(max_size=6))), max_size=5
    ),
    st.one_of(st.none(), st.integers(1, 99)),
    st.one_of(st.just(b""), st.binary(max_size=20), st.sampled_from([b"\xff\xd9", b"\0\0\0\0IEND\xaeB`\x82"])),
)


def _changed(seed: bytes, changes: list[tuple[float, int | bytes]]) -> bytes:
    data = bytearray(seed)
    for place, value in changes:
        # half of the changes go to the first bytes, because headers matter more than pixels
        at = int((place * 2 % 1) * min(len(data), 120 if place < 0.5 else len(data)))
        written = bytes([value]) if isinstance(value, int) else value
        data[at : at + len(written)] = written
    return bytes(data)


def image(data: bytes) -> None:
    """Any image is decoded to RGB within the limits, also when read from a dataset, or refused in valid text."""
    first = _decoded(data)
    with contextlib.suppress(ImageRefused):
        assert decode(data, LIMITS).mode == "RGB"
    if isinstance(first, ImageRefused):
        assert first.reason.value.startswith("image_")
        assert first.detail.encode()
        return
    assert first.mode == "RGB"
    assert first.width * first.height <= LIMITS.pixels
    assert max(first.size) <= LIMITS.aspect * min(first.size)
    if first.width * first.height < 10**6:
        assert decode(data, LIMITS).tobytes() == first.tobytes()
    for index in range(2):
        record = sample_augmentation(CONFIG.augmentations, 0, "key", index, *first.size)
        assert replay(first, record).size == (24, 24)


def _decoded(data: bytes) -> Image.Image | ImageRefused:
    try:
        return decode(data, LIMITS, strict=True)
    except ImageRefused as refused:
        return refused


# --- texts

TEXT_BYTES = st.one_of(
    st.binary(max_size=300),
    st.text(st.characters(), max_size=300).map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.text(max_size=100).map(lambda text: text.encode("utf-16")),
    datasets.json_values().map(lambda value: json.dumps({"caption": value}).encode()),
    st.builds(
        lambda data, at, inserted: data[:at] + inserted + data[at:],
        st.sampled_from([data for case in TEXTS for _, data in case.members()]),
        st.integers(0, 10**5),
        st.binary(max_size=4),
    ),
)  # fmt: skip


def text(caption: bytes, document: bytes) -> None:
    """Any caption and json member becomes clean text within the limit and valid JSON, or nothing and an error."""
    for sidecars in ({"txt": caption, "json": document}, {"json": caption}, {"txt": document}):
        found = caption_of(sidecars, CONFIG.input.captions, LIMITS)
        if found is not None:
            assert 0 < len(found) <= LIMITS.caption_chars
            assert not re.search(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]", found)
        metadata = metadata_of(sidecars, "all")
        if metadata is not None:
            metadata.encode()
            assert isinstance(json.loads(metadata), dict)
        if "json" in sidecars and json_error(sidecars["json"]) is not None:
            assert metadata is None


TARGETS: dict[str, tuple[Callable[..., None], dict[str, Any]]] = {
    "shard": (shard, {"mutations": MUTATIONS}),
    "packed": (packed, {"name": st.sampled_from([*PACKERS]), "mutations": MUTATIONS}),
    "members": (members, {"listed": MEMBERS, "tar_format": TAR_FORMATS}),
    "image": (image, {"data": IMAGE_BYTES}),
    "text": (text, {"caption": TEXT_BYTES, "document": TEXT_BYTES}),
    "published": (published.published, {"member": published.MEMBERS}),
    **datasets.TARGETS,
}
