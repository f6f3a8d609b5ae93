"""Shards with the defects of storage and of tar writers, and the expected outcome of a run for each."""

from __future__ import annotations

import gzip
import io
import lzma
import os
import tarfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.helpers.data import picture
from tests.helpers.tars import Member, tar_bytes

SHARD_SAMPLES = 60  # limits.shard_samples of the run
KEY_CHARS = 200  # limits.key_chars of the run
KEYS = ("a", "b", "c", "d")


@dataclass(frozen=True)
class TarCase:
    """A file in place of a shard, and the expected outcome.

    ``keys`` are the keys of its samples, ``rows`` those that become rows, ``refused`` the reasons by key, and ``shard``
    the reasons for the shard as a whole, which cover the remaining keys.
    """

    defect: str
    write: Callable[[Path], None]
    keys: Sequence[str] = KEYS
    rows: Sequence[str] = ()
    refused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    shard: tuple[str, ...] = ()
    note: str = ""
    ending: str = ".tar"

    @property
    def outcome(self) -> str:
        reasons = list(dict.fromkeys([*self.shard, *(r for reasons in self.refused.values() for r in reasons)]))
        text = ", ".join(f"`{reason}`" for reason in reasons) or "read"
        return f"{text}: {self.note}" if self.note else text


def sample(key: str) -> list[Member]:
    seed = sum(key.encode("utf-8", "surrogateescape")) % 1000
    image = picture(seed, 24, 18)
    return [
        (f"{key}.png", image),
        (f"{key}.txt", f"thing {key[:20]}".encode("utf-8", "replace")),
        (f"{key}.json", b"{}"),
    ]


def samples(keys: Sequence[str]) -> list[Member]:
    return [member for key in keys for member in sample(key)]


GOOD = tar_bytes(samples(KEYS))
with tarfile.open(fileobj=io.BytesIO(GOOD)) as _tar:
    #: Offset of the header and of the data, and size, of each member.
    PLACES = {info.name: (info.offset, info.offset_data, info.size) for info in _tar}
    END = PLACES["d.json"][1] + 512  # of the last member


def data(content: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(content) and None


def members(*listed: Member, format_: int = tarfile.GNU_FORMAT) -> Callable[[Path], None]:
    return data(tar_bytes(listed, format_))


def changed(name: str, at: int, value: bytes, checksum: bool = True) -> Callable[[Path], None]:
    """The good tar with bytes of a member's header replaced, and its checksum updated."""
    tar = bytearray(GOOD)
    start = PLACES[name][0]
    tar[start + at : start + at + len(value)] = value
    if checksum:
        tar[start + 148 : start + 156] = b" " * 8
        tar[start + 148 : start + 156] = b"%06o\0 " % sum(tar[start : start + 512])
    return data(bytes(tar))


def size_of_b(value: bytes) -> Callable[[Path], None]:
    return changed("b.png", 124, value)


def with_links() -> Callable[[Path], None]:
    """A tar with two images that are links: a symbolic link out of the tar, and a hard link to another member."""
    targets = {"b.png": (tarfile.SYMTYPE, "/etc/passwd"), "c.png": (tarfile.LNKTYPE, "a.png")}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in samples("abc"):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = targets.get(name, (tarfile.REGTYPE, ""))
            info.size = 0 if name in targets else len(content)
            tar.addfile(info, io.BytesIO(content))
    return data(buffer.getvalue())


def pipe(path: Path) -> None:
    os.mkfifo(path)


OUTSIDE = ("/etc/x", "../../x", "a")
B_LOST = {"b": ("no_image",)}  # its image is damaged; caption and json are read
_B = PLACES["b.png"]
_C = PLACES["c.png"]

TARS = [
    TarCase("cut between samples", data(GOOD[: _C[0]]), rows="ab", shard=("shard_damaged",),
            note="detected by the missing end mark; the rows are kept"),
    TarCase("cut between members", data(GOOD[: PLACES["b.txt"][0]]), rows="ab", shard=("shard_damaged",),
            note="the last sample has its image and is kept"),
    TarCase("cut inside a header", data(GOOD[: _C[0] + 300]), rows="ab", shard=("shard_damaged",)),
    TarCase("cut inside an image", data(GOOD[: _C[1] + 100]), rows="ab", refused={"c": ("image_broken",)},
            shard=("shard_damaged",)),
    TarCase("cut inside a caption", data(GOOD[: PLACES["c.txt"][1] + 3]), rows="abc", refused={"c": ("no_text",)},
            shard=("shard_damaged",)),
    TarCase("wrong checksum in a header", changed("b.png", 10, b"x", checksum=False), rows="acd", refused=B_LOST,
            shard=("shard_damaged",), note="reported with its offset; the rest is read"),
    TarCase("junk over a header and the data after it", data(GOOD[: _B[0]] + b"\xaa" * 1_500 + GOOD[_B[0] + 1_500 :]),
            rows="acd", refused=B_LOST, shard=("shard_damaged",)),
    TarCase("zeroed blocks over a header", data(GOOD[: _B[0]] + bytes(512) + GOOD[_B[1] :]), rows="acd", refused=B_LOST,
            shard=("shard_damaged",)),
    TarCase("zeroed blocks over whole samples", data(GOOD[: _B[0]] + bytes(_C[0] - _B[0]) + GOOD[_C[0] :]),
            rows="acd", shard=("shard_damaged",),
            note="detected by their length; zeros of two blocks, or up to the end of a record, are the end of a tar"),
    TarCase("zeroed blocks in an image", data(GOOD[: _B[1] + 64] + bytes(512) + GOOD[_B[1] + 576 :]), rows="acd",
            refused={"b": ("image_broken",)}),
    TarCase("missing bytes", data(GOOD[: _B[1] + 50] + GOOD[_B[1] + 217 :]), rows="acd",
            refused={"b": ("image_broken",)}, shard=("shard_damaged",), note="reading resumes at the next header"),
    TarCase("concatenated tars", data(tar_bytes(samples("ab")) + tar_bytes(samples("cd"))), rows="abcd"),
    TarCase("a size of 2^62", size_of_b(b"\x80" + (2**62).to_bytes(11, "big")), rows="acd", refused=B_LOST,
            shard=("shard_damaged",), note="webdataset hangs on it"),
    TarCase("a negative size", size_of_b(b"\xff" * 12), rows="acd", refused=B_LOST, shard=("shard_damaged",)),
    TarCase("a size of 8 GB", size_of_b(b"\x80" + (2**33).to_bytes(11, "big")), rows="acd",
            refused={"b": ("image_broken",)}, shard=("shard_damaged",), note="more than the file has"),
    TarCase("pax long names", members(*samples(["n" * 150, "ü" * 60]), format_=tarfile.PAX_FORMAT),
            keys=("n" * 150, "ü" * 60), rows=("n" * 150, "ü" * 60)),
    TarCase("GNU long names", members(*samples(["n" * 150])), keys=("n" * 150,), rows=("n" * 150,)),
    TarCase("a key above limits.key_chars", members(*samples(["a", "k" * (KEY_CHARS + 1)])),
            keys=("a", "k" * (KEY_CHARS + 1)), rows="a", refused={"k" * 100: ("key_chars",)}),
    TarCase("names that are not UTF-8", members(*samples([b"caf\xe9".decode("utf-8", "surrogateescape")])),
            keys=("caf%E9",), rows=("caf%E9",), note="their bytes are written as %XX"),
    TarCase("terminal codes and markup in keys", members(*samples(["\x1b[31m[red]x"])), keys=("\x1b[31m[red]x",),
            rows=("\x1b[31m[red]x",), note="stored unchanged, escaped in messages"),
    TarCase("absolute and ../ members", members(*samples(OUTSIDE)), keys=OUTSIDE, rows=OUTSIDE,
            note="a key is never used as a path; nothing is unpacked"),
    TarCase("slashes and dots in keys",
            members(*samples(["v1.0/x"]), ("v1.0/y.a.png", picture(1)), ("v1.0/y.txt", b"t")),
            keys=("v1.0/x", "v1.0/y"), rows=("v1.0/x", "v1.0/y"), note="the key ends at the first dot of a name"),
    TarCase("an image and a caption named x.v1.png and x.v1.txt",
            members(("x.v1.png", picture(1)), ("x.v1.txt", b"t"), ("y.v1.2.png", picture(2)), ("y.v1.txt", b"t")),
            keys="xy", rows="xy", refused={"y": ("no_text",)},
            note="the caption has the extension of its image up to the last part, or is `txt` alone"),
    TarCase("several images of one key, as of photos named `Mr. A 1.png` and `Mr. A 2.png`",
            members(("x. a 1.png", picture(1)), ("x. a 2.png", picture(2)), ("x. a 2.txt", b"t"), *sample("y")),
            keys="xy", rows="xy", refused={"x": ("no_text", "stray_members")},
            note="one is read; the detail names the others and their captions"),
    TarCase("symbolic and hard links", with_links(), keys="abc", rows="a",
            refused={"b": ("no_image",), "c": ("no_image",)}, note="not followed"),
    TarCase("folders and hidden files",
            members(("x/", b""), *samples("a"), ("._b.png", b"x"), ("__MACOSX/a.png", b"x")),
            keys="a", rows="a", note="not samples, as in webdataset"),
    TarCase("a key twice, next to each other", members(*sample("a"), *sample("a"), *sample("b")), keys="ab", rows="ab",
            refused={"a": ("duplicate_key",)}, note="the first is kept"),
    TarCase("a key twice, apart", members(*samples("aba")), keys="ab", rows="ab",
            refused={"a": ("duplicate_key",)}, note="the first is kept"),
    TarCase("the same key in two shards", members(*samples("ab")), keys="ab", rows="ab",
            note="kept in both; keys are unique within a shard"),
    TarCase("a caption that is not next to its image", members(("a.png", picture(1)), *samples("bcd"), ("a.txt", b"t")),
            rows="abcd", refused={"a": ("split_key",)}, note="the image is a row without a caption"),
    TarCase("all images first, then all captions",
            members(*[(f"{k}.png", picture(1)) for k in KEYS], *[(f"{k}.txt", b"t") for k in KEYS]),
            refused=dict.fromkeys(KEYS, ("split_key",)), shard=("shard_unsorted",),
            note="refused as a whole, instead of rows without captions; repack it with `tar --sort=name`"),
    TarCase("a caption without an image", members(("a.txt", b"t"), *samples("b")), keys="ab", rows="b",
            refused={"a": ("no_image",)}),
    TarCase("more samples than limits.shard_samples",
            members(*[(f"{i:03d}.png", picture(1, 8, 8)) for i in range(SHARD_SAMPLES + 3)]),
            keys=[f"{i:03d}" for i in range(SHARD_SAMPLES + 3)], rows=[f"{i:03d}" for i in range(SHARD_SAMPLES)],
            shard=("shard_samples",), note="the first ones are kept"),
    TarCase("gzip named .tar", data(gzip.compress(GOOD)), shard=("shard_unreadable",),
            note="the detail names the right ending"),
    TarCase("xz named .tar", data(lzma.compress(GOOD)), shard=("shard_unreadable",),
            note="the detail names the right ending"),
    TarCase("a tar named .tar.gz", data(GOOD), shard=("shard_unreadable",), ending=".tar.gz"),
    TarCase("gzip cut short", data(gzip.compress(GOOD)[:-500]), rows="abc",
            refused={"d": ("image_broken",)}, shard=("shard_damaged",), ending=".tar.gz"),
    TarCase("an empty tar", data(tar_bytes([])), keys=(), note="no rows and no refusals"),
    TarCase("an empty file", data(b""), keys=(), shard=("shard_unreadable",)),
    TarCase("a text file", data(b"<html>404</html>\n" * 400), keys=(), shard=("shard_unreadable",)),
    TarCase("a folder", Path.mkdir, keys=(), shard=("shard_unreadable",)),
    TarCase("a named pipe", pipe, keys=(), shard=("shard_unreadable",), note="opening it would block"),
    TarCase("a link to nowhere", lambda path: path.symlink_to("nowhere"), keys=(), shard=("shard_missing",)),
    TarCase("no file", lambda path: None, keys=(), shard=("shard_missing",)),
]  # fmt: skip
