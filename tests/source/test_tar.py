"""Tar formats and damage that tests/hostile/tars.py does not have: what is lost, and where reading resumes."""

from __future__ import annotations

import gzip
import io
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reinforce.source.samples import RawSample, Refusal
from reinforce.source.tar import DamagedTar, Member, members
from schemas import Reason
from tests.helpers.tars import BODY, KEYS, TAR, outcomes, read, sample_members, tar_bytes

# --- formats


def test_devices_are_skipped_and_links_are_not_followed():
    buffer = io.BytesIO()
    kinds = (tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.REGTYPE)
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, kind in zip(("d.jpg", "d.jpg", "a.jpg", "b.txt", "b.jpg"), kinds, strict=True):
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = kind, "/etc/passwd", 1 if kind == tarfile.REGTYPE else 0
            tar.addfile(info, io.BytesIO(b"B"))
    rows = read(buffer.getvalue())
    assert rows[0] == Refusal("a", Reason.NO_IMAGE, "no image among: jpg (a link)")
    assert outcomes(rows)[1:] == [("b", "B")]
    assert rows[1].left_out["txt"] == Refusal("b", Reason.SIDECAR_BROKEN, ".txt: a link, which is not followed")


def undamaged(item: Member | DamagedTar) -> bool:
    if isinstance(item, DamagedTar):
        raise item
    return True


NAMES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=120).filter(
    lambda name: not name.endswith("/")  # not the name of a file; tarfile drops the slash in some formats
)
MEMBERS = st.lists(st.tuples(NAMES, st.binary(max_size=1500)), max_size=8)
FORMATS = st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])


@given(MEMBERS, FORMATS, st.booleans())
def test_members_are_those_that_tarfile_wrote(written, format, end):
    data = tar_bytes([*written, ("last", b"x")], format, end) + bytes(0 if end else 1024)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        expected = [(info.name, info.offset_data, info.size) for info in tar if info.isreg()]
    tar = members(io.BytesIO(data))
    found = [(member.name, member.offset, member.size, member.read(10_000)) for member in tar if undamaged(member)]
    assert [entry[:3] for entry in found] == expected
    assert [data for _, _, _, data in found] == [data[at : at + size] for _, at, size in expected]


# --- damage


def checked(header: bytearray, start: int = 0) -> bytes:
    """The tar with the checksum of the header at ``start`` updated."""
    header[start + 148 : start + 156] = b" " * 8
    header[start + 148 : start + 156] = b"%06o\0 " % sum(header[start : start + 512])
    return bytes(header)


ENDS = [len(BODY) // 3 * (i + 1) for i in range(3)]  # each sample's members are equally long


@pytest.mark.parametrize("name", ["x.tar", "x.tar.gz"])  # of known and of unknown size
def test_a_truncated_tar_yields_all_samples_before_the_cut_and_is_damaged(name):
    with tarfile.open(fileobj=io.BytesIO(TAR)) as tar:
        infos = tar.getmembers()
    whole = [info.offset_data + info.size for info in infos if info.name.endswith(".json")]
    for cut in sorted({*range(1, len(TAR), 61), *range(512, len(TAR), 512), *whole}):
        rows = read(TAR[:cut] if name == "x.tar" else gzip.compress(TAR[:cut]), name)
        complete = [row.key for row in rows if isinstance(row, RawSample) and len(row.sidecars) == 2]
        assert complete == KEYS[: sum(end <= cut for end in whole)], cut
        assert rows[-1].key is None, cut


def test_zeros_are_padding_of_concatenated_tars_or_damage_if_no_writer_leaves_so_many():
    body = tar_bytes(sample_members("z"), end=False)
    for padding in (1024, 2**20 - len(body)):
        assert [row.key for row in read(body + bytes(padding) + TAR)] == ["z", *KEYS]
    for zeros in (512, 1536, 4096):
        rows = read(TAR[: ENDS[0]] + bytes(zeros) + TAR[ENDS[0] :])
        assert [row.key for row in rows] == [*KEYS, None]
        assert f"{zeros} zero bytes between members" in rows[-1].detail


@pytest.mark.parametrize(
    ("format", "long", "kind"),
    [(tarfile.GNU_FORMAT, "n" * 150, b"L"), (tarfile.PAX_FORMAT, "n" * 150, b"x"), (tarfile.PAX_FORMAT, "é", b"x")],
)
def test_a_member_after_damage_that_may_have_lost_its_name_is_skipped(format, long, kind):
    names = ["a.jpg", f"{long}.jpg", "c.jpg"]
    data = bytearray(tar_bytes([(name, b"pixels") for name in names], format))
    extended = 1024  # after the first member: the header with the name of the second
    assert data[extended + 156 : extended + 157] == kind
    data[extended : extended + 512] = b"?" * 512
    assert [row.key for row in read(bytes(data))] == ["a", "c", None]


def test_at_most_a_hundred_damages_are_reported():
    header = bytearray(BODY[:512])
    header[124:136] = b"77777777777\0"  # 8 GiB, more than there is
    rows = read((checked(header) + bytes(512)) * 300 + TAR)
    assert sum(row.key is None for row in rows) == 101
    assert "the rest is not read" in rows[-1].detail


def test_a_size_beyond_the_end_of_a_compressed_tar_is_damage():
    data = bytearray(TAR)
    data[ENDS[0] + 124 : ENDS[0] + 136] = b"\x80" + (2**33).to_bytes(11, "big")
    rows = read(gzip.compress(checked(data, ENDS[0])), "x.tar.gz")
    assert outcomes(rows)[1:] == [("b", "image_bytes"), (None, "shard_damaged")]


def pax(records: bytes, after: bytes, kind: bytes = b"x") -> bytes:
    header = bytearray(tar_bytes([("x", records)], end=False))
    header[156:157] = kind
    return checked(header) + after


def test_malformed_pax_headers_and_those_without_a_member_are_damage():
    first, _, third = outcomes(read(TAR))
    sizes = (b"11 size=-1\n", b"29 size=99999999999999999999\n")
    for records in (*sizes, b"99 path=a\n", b"junk", b"5 a=b\n", b"0 a=b\n", b"6 a=b\n\xff"):
        rows = read(TAR[: ENDS[0]] + pax(records, TAR[ENDS[0] :]))
        assert outcomes(rows) == [first, ("b", "no_image"), third, (None, "shard_damaged")], records
        assert rows[-1].detail.endswith("the member before it is 'a.json'")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", [b"x", b"L", b"g"])
def test_the_member_after_an_extended_header_that_is_too_long_is_not_read_under_its_short_name(kind, packed):
    name = b"52 path=" + b"folder/" * 5 + b"name.jpg\n"
    records = name + b"1048587 comment=".ljust(1048586, b"n") + b"\n" if kind != b"L" else b"folder/" * 2**18
    others = tar_bytes([("d.jpg", b"D"), ("e.jpg", b"E")])
    data = BODY + pax(records, tar_bytes([("name.jpg", b"N")], end=False) + others, kind)
    rows = read(gzip.compress(data), "x.tar.gz") if packed else read(data)
    found = [row.key for row in rows if isinstance(row, RawSample)]
    assert found == [*KEYS, *(["name"] if kind == b"g" else []), "d", "e"], "a global header names no member"
    assert "an extended header of" in rows[-1].detail
    rows = read(BODY + pax(records, b"?" * 512 + tar_bytes([("d.jpg", b"D"), ("e.jpg", b"E")])))
    assert [row.key for row in rows if isinstance(row, RawSample)] == [*KEYS, "d", "e"]

    lone = pax(b"10 path=z\n", b"")
    for data in (BODY + lone, BODY + lone + TAR[-1024:], BODY + lone + bytes(1024) + tar_bytes([("d.jpg", b"D")])):
        *rows, damage = read(data)
        assert damage.detail.startswith(f"damaged at byte {len(BODY + lone)}: nothing follows an extended header")
        assert [row.key for row in rows] == [*KEYS, "d"][: len(rows)]


def test_sparse_members_junk_after_the_end_and_long_zeros_are_damage():
    data = bytearray(TAR)
    data[ENDS[0] + 156 : ENDS[0] + 157] = b"S"
    rows = read(checked(data, ENDS[0]))
    assert "sparse" in rows[-1].detail
    assert [row.key for row in rows if isinstance(row, RawSample)] == ["a", "c"]
    assert outcomes(read(TAR + bytes(1024) + b"junk" * 128))[3:] == [(None, "shard_damaged")]
    assert outcomes(read(TAR + bytes(5 * 2**20)))[3:] == [(None, "shard_damaged")]
    assert len(read(TAR + bytes(2**20))) == 3
