from __future__ import annotations

import gzip
import io
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reinforce.config import Limits
from reinforce.source import RawSample, Refusal
from reinforce.tar import members
from schemas import Reason
from tests.shards import KEYS, THREE, brief, read, sample_members, tar_bytes, zstd

# --- formats


def test_links_folders_and_devices_are_skipped():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
            info = tarfile.TarInfo("a.jpg")
            info.type, info.linkname = kind, "b.jpg"
            tar.addfile(info)
        info = tarfile.TarInfo("b.jpg")
        info.size = 1
        tar.addfile(info, io.BytesIO(b"B"))
    assert brief(read(buffer.getvalue())) == [("b", "B")]


def test_pax_headers_give_names_and_sizes():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "=\n ="}) as tar:
        info = tarfile.TarInfo("short.jpg")
        info.size, info.pax_headers = 3, {"path": "ü" * 300 + ".jpg", "comment": "7 a=b\n"}
        tar.addfile(info, io.BytesIO(b"abc"))
    data = bytearray(buffer.getvalue())
    assert brief(read(bytes(data))) == [("ü" * 300, "abc")]


def test_base_256_sizes_are_read():
    member = bytearray(tar_bytes([("a.jpg", b"abc")]))
    member[124:136] = b"\x80" + (3).to_bytes(11, "big")
    assert brief(read(checked(member))) == [("a", "abc")]


def test_concatenated_tars_are_read_to_the_end():
    parts = [tar_bytes(sample_members(key, key.encode())) for key in "abc"]
    assert brief(read(b"".join(parts))) == [("a", "a"), ("b", "b"), ("c", "c")]


def test_a_tar_without_zero_blocks_is_whole_and_one_of_zero_blocks_is_empty():
    assert brief(read(tar_bytes(sample_members("a", b"A"), end=False))) == [("a", "A")]
    assert read(tar_bytes([])) == []


NAMES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=120).filter(
    lambda name: not name.endswith("/")  # no file's name; tarfile drops the slash in some formats
)
MEMBERS = st.lists(st.tuples(NAMES, st.binary(max_size=1500)), max_size=8)
FORMATS = st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])


@given(MEMBERS, FORMATS, st.booleans())
@settings(deadline=None)
def test_members_come_back_as_tarfile_wrote_them(written, format, end):
    data = tar_bytes([*written, ("last", b"x")], format, end)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        expected = [(info.name, info.offset_data, info.size) for info in tar if info.isreg()]
    tar = members(io.BytesIO(data))
    found = [(member.name, member.offset, member.size, member.read(10_000)) for member in tar]
    assert [entry[:3] for entry in found] == expected
    assert [data for _, _, _, data in found] == [data[at : at + size] for _, at, size in expected]


@given(st.lists(st.tuples(st.from_regex(r"[a-z]{1,30}(/[a-z]{1,60}){0,3}", fullmatch=True), st.binary(max_size=900))))
@settings(max_examples=50, deadline=None)
def test_samples_survive_every_format(pairs):
    images = dict(pairs)
    written = [(f"{key}.{extension}", data) for key, data in images.items() for extension in ("jpg", "txt")]
    for format in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        rows = read(tar_bytes(written, format), limits=Limits())
        assert [(row.key, row.image, row.sidecars) for row in rows] == [
            (key, data, {"txt": data}) for key, data in images.items()
        ]


# --- damage


def checked(header: bytearray, start: int = 0) -> bytes:
    """The tar with the checksum of the header at ``start`` mended."""
    header[start + 148 : start + 156] = b" " * 8
    header[start + 148 : start + 156] = b"%06o\0 " % sum(header[start : start + 512])
    return bytes(header)


ENDS = [len(THREE) // 3 * (i + 1) for i in range(3)]  # each sample's members are equally long


def test_a_tar_cut_anywhere_gives_all_samples_before_the_cut_and_then_the_damage():
    with tarfile.open(fileobj=io.BytesIO(THREE)) as tar:
        infos = tar.getmembers()
    between_members = {0, *(info.offset_data + info.size + -info.size % 512 for info in infos)}
    whole = [info.offset_data + info.size for info in infos if info.name.endswith(".json")]
    for cut in sorted({*range(1, len(THREE), 61), *range(512, len(THREE), 512), *whole}):
        rows = read(THREE[:cut])
        complete = [row.key for row in rows if isinstance(row, RawSample) and len(row.sidecars) == 2]
        assert complete == KEYS[: sum(end <= cut for end in whole)], cut
        damaged = rows[-1].key is None
        assert damaged == (cut not in between_members), cut


def test_a_damaged_header_is_told_with_its_place_where_tarfile_ends_silently():
    data = bytearray(THREE)
    data[ENDS[1] + 20] ^= 1
    with tarfile.open(fileobj=io.BytesIO(bytes(data))) as tar:
        assert len(tar.getnames()) == 6
    rows = read(bytes(data))
    assert [row.key for row in rows] == ["a", "b", None]
    assert rows[-1].reason is Reason.SHARD_DAMAGED
    assert rows[-1].detail.startswith(f"damaged at byte {ENDS[1]}: ")


def test_the_sample_that_damage_interrupts_is_kept_if_it_has_its_image():
    image_end = ENDS[1] + 512 + 1024
    assert [(row.key, type(row)) for row in read(THREE[: image_end + 100])][2:] == [("c", RawSample), (None, Refusal)]
    rows = read(THREE[: image_end - 600])
    assert brief(rows)[2:] == [("c", "image_broken"), (None, "shard_damaged")]


@pytest.mark.parametrize(
    "size", [b"\x80" + (2**62).to_bytes(11, "big"), b"\xff" * 12, b"-0000000010\0", b"77777777777\0"]
)
def test_negative_and_absurd_sizes_are_damage(size):
    data = bytearray(THREE)
    data[ENDS[1] + 124 : ENDS[1] + 136] = size
    rows = read(checked(data, ENDS[1]))
    assert [row.key for row in rows if isinstance(row, RawSample)] == ["a", "b"]
    assert rows[-1].reason is Reason.SHARD_DAMAGED


def pax(records: bytes, after: bytes) -> bytes:
    header = bytearray(tar_bytes([("x", records)], end=False))
    header[156:157] = b"x"
    return checked(header) + after


@pytest.mark.parametrize(
    "records",
    [
        b"9 size=-1\n",
        b"27 size=99999999999999999999\n"[:27],
        b"99 path=a\n",
        b"junk",
        b"5 a=b\n",
        b"0 a=b\n",
        b"6 a=b\n\xff",
    ],
)
def test_malformed_pax_headers_are_damage(records):
    rows = read(THREE[: ENDS[0]] + pax(records, THREE[ENDS[0] :]))
    assert brief(rows)[1:] == [(None, "shard_damaged")]


def test_an_extended_header_that_nothing_follows_is_damage():
    lone = pax(b"10 path=z\n", b"")
    for data in (THREE + lone, THREE + lone + bytes(1024) + THREE):
        assert read(data)[-1].detail == f"damaged at byte {len(THREE + lone)}: nothing follows an extended header"


def test_sparse_members_are_told_not_misread():
    data = bytearray(THREE)
    data[ENDS[1] + 156 : ENDS[1] + 157] = b"S"
    assert "sparse" in read(checked(data, ENDS[1]))[-1].detail


def test_junk_behind_the_end_and_holes_of_zeros_are_damage():
    assert brief(read(THREE + bytes(1024) + b"junk" * 128))[3:] == [(None, "shard_damaged")]
    assert brief(read(THREE + bytes(5 * 2**20)))[3:] == [(None, "shard_damaged")]
    assert len(read(THREE + bytes(2**20))) == 3


MUTATIONS = st.lists(st.tuples(st.integers(0, len(THREE) - 1), st.integers(0, 255)), min_size=1, max_size=4)


@given(MUTATIONS, st.integers(1, len(THREE)), st.sampled_from(["x.tar", "x.tar.gz", "x.tar.zst"]))
@settings(max_examples=300, deadline=None)
def test_no_bytes_make_reading_raise(mutations, cut, name):
    data = bytearray({"x.tar": THREE, "x.tar.gz": gzip.compress(THREE), "x.tar.zst": zstd(THREE)}[name])
    for at, value in mutations:
        data[at % len(data)] = value
    for row in read(bytes(data[:cut]), name):
        row_text = f"{row.key} {row.detail if isinstance(row, Refusal) else row.sidecars}"
        row_text.encode("utf-8")
