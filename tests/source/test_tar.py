"""Tars: formats, damage and where reading resumes, and the samples of members; beside the cases of tests/hostile."""

from __future__ import annotations

import gzip
import io
import re
import tarfile
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reinforce.errors import UserError
from reinforce.source.config import Input, Limits
from reinforce.source.formats.tar import Member, members, read_shard
from reinforce.source.references import read_ranges
from reinforce.source.samples import DamagedTar, RawSample, Refusal
from schemas import Reason
from tests.helpers.tars import BODY, KEYS, LIMITS, TAR, outcomes, read, sample_members, tar_bytes

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


def test_long_names_of_ustar_any_records_of_pax_and_sizes_of_base_256_are_read():
    long = "/".join(["a" * 60] * 3)
    data = tar_bytes([(f"{long}.jpg", b"abc")], tarfile.USTAR_FORMAT)
    assert outcomes(read(data, limits=Limits())) == [(long, "abc")]
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "=\n ="}) as tar:
        info = tarfile.TarInfo("short.jpg")
        info.size, info.pax_headers = 3, {"path": "ü.jpg", "comment": "7 a=b\n"}
        tar.addfile(info, io.BytesIO(b"abc"))
    assert outcomes(read(buffer.getvalue())) == [("ü", "abc")]
    packed = bytearray(tar_bytes([("a.jpg", b"abc")]))
    packed[124:136] = b"\x80" + (3).to_bytes(11, "big")
    assert outcomes(read(checked(packed))) == [("a", "abc")]


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


# --- grouping


MR = ["Mr. A 1.jpg", "Mr. A 2.JPG", "Mr. A 2.txt", "Mr. A 2.meta.json", "Mr. A.txt", "Mr.txt"]
STRAYS = [
    (["a.jpg", "a.png"], "a.jpg", "2 images, of which .jpg is read, and not .png; a key ends at the first dot of the "),
    (["a.b.png", "a.jpg", "a.c.jpg", "a.c.txt", "a.url.txt"], "a.jpg", "and not .b.png, .c.jpg, .c.txt;"),
    (["a.0.jpg", "a.1.jpg", "a.0.txt", "a.01.txt"], "a.0.jpg", "2 images, of which .0.jpg is read, and not .1.jpg;"),
    (MR, "Mr. A 1.jpg", "of which . a 1.jpg is read, and not . a 2.jpg, . a 2.txt, . a 2.meta.json;"),
    ([f"a.{i}.jpg" for i in range(90)], "a.0.jpg", "64 images, of which .0.jpg is read, and not .1.jpg,"),
]  # fmt: skip


@pytest.mark.parametrize(("names", "image", "detail"), STRAYS)
def test_the_first_image_is_read_a_plain_extension_first_and_the_others_are_named(names, image, detail):
    sample, *others = read(tar_bytes([(name, name.encode()) for name in names]))
    assert sample.image == image.encode()
    refusal = others[-1]
    assert (refusal.key, refusal.reason) == (sample.key, Reason.STRAY_MEMBERS)
    assert detail in refusal.detail
    assert [other.reason for other in others[:-1]] == [Reason.MEMBERS] * (len(names) > 64)
    broken = [(name, bytes(6_000) if name == image else b"x") for name in names]
    assert read(tar_bytes(broken))[-1] == refusal, "also where the image that is read cannot be used"


MEMBER_NAMES = [
    ("./a.JPG", "./a", "jpg"),
    ("v1.0/part.2/a.b.Jpg", "v1.0/part.2/a", "b.jpg"),
    (".git/a.jpg", ".git/a", "jpg"),
]


@pytest.mark.parametrize(("name", "key", "extension"), [*MEMBER_NAMES, ("ü/日本.webp", "ü/日本", "webp")])
def test_the_key_goes_up_to_the_first_dot_of_the_file_name(name, key, extension):
    (sample,) = read(tar_bytes([(name, b"A"), (f"{key}.{extension}.TXT", b"t")]))
    assert (sample.key, sample.sidecars) == (key, {f"{extension}.txt": b"t"})


def test_sidecars_with_the_compound_extension_of_the_image_belong_to_it():
    members = [("0.v1.png", b"I"), ("0.v1.txt", b"t"), ("0.V1.json", b"{}"), ("0.v2.txt", b"u"), ("0.v1.x.txt", b"x")]
    (sample,) = read(tar_bytes(members))
    assert (sample.key, sample.image) == ("0", b"I")
    assert sample.of_image == {"txt": b"t", "json": b"{}", "x.txt": b"x"}
    assert sample.sidecars.keys() == {"v1.txt", "v1.json", "v2.txt", "v1.x.txt"}
    assert sample.members == ("v1.png", "v1.txt", "v1.json", "v2.txt", "v1.x.txt")
    (plain,) = read(tar_bytes([*members, ("0.txt", b"plain")]))
    assert plain.all_sidecars["txt"] == b"plain", "the caption of a sample that had one stays"
    (own,) = read(tar_bytes([("0.v1.png", b"I"), ("0.v1.txt", b"a cat"), ("0.json", b'{"caption": "a dog"}')]))
    assert own.captions(Input()) == ["a dog"], "those of its image come after its own"
    (large,) = read(tar_bytes([("0.v1.png", b"I"), ("0.v1.txt", bytes(301))]))
    assert large.left_out["txt"].detail.startswith(".v1.txt: 301 bytes")
    other, strays = read(tar_bytes([("0.jpg", b"J"), *members]))
    assert (other.image, other.of_image) == (b"J", {})
    assert "and not .v1.png, .v1.txt, .v1.json, .v1.x.txt;" in strays.detail


HIDDEN = ["README", "a/README", ".hidden.jpg", "a/.hidden.jpg", "a/._b.jpg"]
META = ["__MACOSX/a.jpg", "x/__MACOSX/a.jpg", "__index__", "__meta__/a.jpg", "__a.b__"]


@pytest.mark.parametrize("name", HIDDEN + META)
def test_members_that_belong_to_no_sample_are_skipped(name):
    assert outcomes(read(tar_bytes([("b.jpg", b"B"), (name, b"x"), ("b.txt", b"t"), ("c.jpg", b"C")]))) == [
        ("b", "B"),
        ("c", "C"),
    ]


def test_a_shard_with_most_samples_split_is_refused_as_a_whole():
    for order in (("txt", "jpg"), ("json", "jpg", "txt")):
        rows = read(tar_bytes([(f"{i}.{extension}", b"x") for extension in order for i in range(4)]))
        assert {row.key for row in rows} == {*"0123", None}
        assert (rows[-1].key, rows[-1].reason) == (None, Reason.SHARD_UNSORTED)
        assert "tar --sort=name" in rows[-1].detail
    few = read(tar_bytes([("a.jpg", b"1"), ("b.jpg", b"2"), ("a.txt", b"t"), ("b.txt", b"t"), *sample_members("c")]))
    assert few[-1].reason is Reason.SHARD_UNSORTED
    more = [member for key in "cdefg" for member in sample_members(key)]
    assert Reason.SHARD_UNSORTED not in {
        getattr(row, "reason", None)
        for row in read(tar_bytes([("a.jpg", b"1"), ("b.jpg", b"2"), ("a.txt", b"t"), *more]))
    }


def test_limits_are_inclusive_and_their_refusals_count_what_is_not_read():
    members = [("a.jpg", b"A"), *((f"a.{i}", b"x") for i in range(70))]
    rows = read(tar_bytes(members), limits=Limits(members=8))
    assert (rows[1].detail, len(rows[0].sidecars)) == ("63 more than limits.members of 8, not read", 7)
    fits = [("b.jpg", b"x" * 5_000), ("b.txt", bytes(301)), ("b.json", bytes(300))]
    refused, sample, other = read(tar_bytes([("a.jpg", bytes(5_001)), *fits, ("c.jpg", b"C")]))
    assert (refused.reason, sample.length, sample.sidecars, other.key) == (
        Reason.IMAGE_BYTES, 5_000, {"json": bytes(300)}, "c",
    )  # fmt: skip


# --- shards as a whole


def test_a_link_is_followed_and_a_shard_without_permission_is_unreadable(unsteady, tmp_path):
    (tmp_path / "x.tar").write_bytes(TAR)
    (tmp_path / "link.tar").symlink_to(tmp_path / "x.tar")
    assert list(read_shard(f"{tmp_path}/link.tar", LIMITS)) == read(TAR)
    unsteady.content, unsteady.fails_at, unsteady.error = TAR, 0, PermissionError("Forbidden")
    (refusal,) = read_shard("unsteady://x.tar", LIMITS)
    assert (refusal.reason, refusal.detail) == (Reason.SHARD_UNREADABLE, "Forbidden")


# --- memory and requests


def test_memory_does_not_grow_with_the_shard(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for i in range(150):
            info = tarfile.TarInfo(f"{i}.jpg")
            info.size = 2**20
            tar.addfile(info, io.BytesIO(bytes(2**20)))
        info = tarfile.TarInfo("large.jpg")
        info.size = 100 * 2**20
        tar.addfile(info, io.BytesIO(bytes(info.size)))
    limits = Limits(image_bytes=2**20)
    tracemalloc.start()
    try:
        reasons = [row.reason for row in read_shard(f"{tmp_path}/x.tar", limits) if isinstance(row, Refusal)]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert reasons == [Reason.IMAGE_BYTES]
    assert peak < 8 * 2**20


def test_a_remote_shard_is_read_in_large_blocks_and_ranges_share_requests(unsteady):
    unsteady.content = tar_bytes([(f"{i:04d}.jpg", bytes([i % 256]) * 20_000) for i in range(2_000)])
    samples = list(read_shard("unsteady://x.tar", Limits()))
    assert unsteady.requests <= len(unsteady.content) / (8 * 2**20) + 1
    unsteady.requests = 0
    ranges = [(sample.offset, sample.length) for sample in samples]
    assert list(read_ranges("unsteady://x.tar", ranges)) == [sample.image for sample in samples]
    assert unsteady.requests <= len(unsteady.content) / (8 * 2**20) + 1


def test_ranges_beyond_the_file_and_in_compressed_tars_raise(tmp_path):
    (tmp_path / "x.tar").write_bytes(b"0123456789")
    ranges = read_ranges(f"{tmp_path}/x.tar", [(2, 3), (8, 5)])
    assert next(ranges) == b"234"
    with pytest.raises(DamagedTar, match="the file ends"):
        next(ranges)
    with pytest.raises(UserError, match=re.escape("from a compressed tar")):
        next(read_ranges("s3://b/x.tar.gz", [(0, 1)]))


# --- S3


def test_a_folder_of_s3_is_refused_and_the_pattern_of_its_tars_is_named(s3):
    s3.mkdir("shards")
    s3.pipe({"shards/x/1.tar": TAR})
    [folder] = read_shard("s3://shards/x", LIMITS)
    assert folder.reason is Reason.SHARD_UNREADABLE
    assert folder.detail.startswith("a folder, not a tar: write s3://shards/x/*.tar for the tars in it")
