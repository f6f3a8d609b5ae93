from __future__ import annotations

import bz2
import gzip
import io
import lzma
import random
import re
import tarfile
import tracemalloc

import fsspec
import pyarrow as pa
import pytest
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st

from reinforce.config import Limits
from reinforce.errors import UserError
from reinforce.source import RawSample, Refusal, read_ranges, read_shard
from reinforce.tar import DamagedTar, members
from reinforce.urls import expand
from schemas import Reason
from tests.shards import sample_members, tar_bytes

LIMITS = Limits(image_bytes=5_000, sidecar_bytes=300)


def read(data: bytes, name: str = "x.tar", limits: Limits = LIMITS) -> list[RawSample | Refusal]:
    fsspec.filesystem("memory").pipe(f"/source/{name}", data)
    return list(read_shard(f"memory://source/{name}", limits))


def brief(rows: list[RawSample | Refusal]) -> list[tuple[str | None, str]]:
    """(key, image or reason) of each row."""
    return [(row.key, row.image.decode() if isinstance(row, RawSample) else row.reason.value) for row in rows]


# --- grouping


def test_members_of_one_key_are_one_sample():
    data = tar_bytes(sample_members("a", b"A") + sample_members("b", b"B"))
    first, second = read(data)
    assert isinstance(first, RawSample)
    assert (first.key, first.image) == ("a", b"A")
    assert first.sidecars == {"txt": b"photo a", "json": b'{"uid": 1}'}
    assert data[first.offset : first.offset + first.length] == b"A"
    assert isinstance(second, RawSample)
    assert second.key == "b"


@pytest.mark.parametrize(
    ("name", "key", "extension"),
    [
        ("a.jpg", "a", "jpg"),
        ("./a.JPG", "./a", "jpg"),
        ("v1.0/part.2/a.b.Jpg", "v1.0/part.2/a", "b.jpg"),
        (".git/a.jpg", ".git/a", "jpg"),
        ("ü/日本.webp", "ü/日本", "webp"),
    ],
)
def test_the_key_goes_up_to_the_first_dot_of_the_file_name(name, key, extension):
    (sample,) = read(tar_bytes([(name, b"A"), (f"{key}.{extension}.TXT", b"t")]))
    assert (sample.key, sample.sidecars) == (key, {f"{extension}.txt": b"t"})


HIDDEN = ["README", "a/README", ".hidden.jpg", "a/.hidden.jpg", "a/._b.jpg"]
META = ["__MACOSX/a.jpg", "x/__MACOSX/a.jpg", "__index__", "__meta__/a.jpg", "__a.b__"]


@pytest.mark.parametrize("name", HIDDEN + META)
def test_members_that_belong_to_no_sample_are_passed_over(name):
    assert brief(read(tar_bytes([("b.jpg", b"B"), (name, b"x"), ("b.txt", b"t"), ("c.jpg", b"C")]))) == [
        ("b", "B"),
        ("c", "C"),
    ]


def test_the_first_image_wins_but_a_plain_extension_goes_before_a_compound_one():
    assert brief(read(tar_bytes([("a.jpg", b"1"), ("a.png", b"2")]))) == [("a", "1")]
    assert brief(read(tar_bytes([("a.depth.png", b"1"), ("a.jpg", b"2"), ("a.left.jpg", b"3")]))) == [("a", "2")]
    assert brief(read(tar_bytes([("a.0.jpg", b"1"), ("a.1.jpg", b"2")]))) == [("a", "1")]


def test_a_key_without_an_image_is_refused():
    (refusal,) = read(tar_bytes([("a.txt", b"t"), ("a.json", b"{}")]))
    assert refusal == Refusal("a", Reason.NO_IMAGE, "no image among: txt, json")


def test_a_key_that_came_before_is_refused_and_the_first_stays():
    rows = read(tar_bytes([("a.jpg", b"1"), ("b.jpg", b"2"), ("a.jpg", b"3"), ("a.txt", b"t"), ("c.jpg", b"4")]))
    assert brief(rows) == [("a", "1"), ("b", "2"), ("a", "duplicate_key"), ("c", "4")]


def test_a_member_that_comes_twice_in_a_row_is_refused_and_the_first_stays():
    rows = read(tar_bytes([("a.jpg", b"1"), ("a.txt", b"t"), ("a.jpg", b"2"), ("a.txt", b"u")]))
    assert brief(rows) == [("a", "1"), ("a", "duplicate_key")]
    assert rows[0].sidecars == {"txt": b"t"}


def test_limits_refuse_a_large_image_and_drop_a_large_sidecar():
    big, fits = bytes(5_001), b"x" * 5_000
    rows = read(
        tar_bytes([("a.jpg", big), ("b.jpg", fits), ("b.txt", bytes(301)), ("b.json", bytes(300)), ("c.jpg", b"C")])
    )
    assert brief(rows) == [("a", "image_bytes"), ("b", fits.decode()), ("c", "C")]
    assert rows[1].sidecars == {"json": bytes(300)}


def test_names_that_are_not_utf8_give_different_valid_keys():
    names = [b"caf\xe9.jpg".decode("utf-8", "surrogateescape"), b"caf\xe8.jpg".decode("utf-8", "surrogateescape")]
    for format in (tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT):
        assert brief(read(tar_bytes([(name, b"A") for name in names], format))) == [("caf%E9", "A"), ("caf%E8", "A")]


# --- tar formats


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


KEYS = ["a", "b", "c"]
THREE = tar_bytes([member for key in KEYS for member in sample_members(key, key.encode() * 700)], end=False)
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


# --- shards as a whole


def test_a_missing_shard_is_one_refusal(tmp_path):
    for url in (f"{tmp_path}/x.tar", f"file://{tmp_path}/no/x.tar", "memory://source/no.tar"):
        assert [(row.key, row.reason) for row in read_shard(url, LIMITS)] == [(None, Reason.SHARD_MISSING)]


@pytest.mark.parametrize("data", [b"", b"<html>404</html>", b"x" * 5000, gzip.compress(THREE)])
def test_what_is_no_tar_is_unreadable(data):
    assert brief(read(data)) == [(None, "shard_unreadable")]


@pytest.mark.parametrize("name", ["x.tar.gz", "x.tar.xz", "x.tar.bz2", "x.tar.zst"])
def test_what_is_not_compressed_as_its_name_says_is_unreadable(name):
    for data in (THREE, b""):
        assert brief(read(data, name)) == [(None, "shard_unreadable")]


def test_compressed_data_under_a_plain_name_says_the_name_it_wants():
    assert ".tar.gz" in read(gzip.compress(THREE))[0].detail


def test_a_folder_is_unreadable(tmp_path):
    assert [row.reason for row in read_shard(str(tmp_path), LIMITS)] == [Reason.SHARD_UNREADABLE]


def zstd(data: bytes) -> bytes:
    return pa.compress(data, "zstd", asbytes=True)


COMPRESS = {"gz": gzip.compress, "xz": lzma.compress, "bz2": bz2.compress, "zst": zstd}


@pytest.mark.parametrize("ending", COMPRESS)
def test_compressed_tars_read_as_plain_ones_and_cut_short_are_damage(ending):
    noise = random.Random(0)
    plain = tar_bytes([member for i in range(250) for member in sample_members(f"{i}", noise.randbytes(4_800))])
    data = COMPRESS[ending](plain)
    rows = read(plain)
    assert len(rows) == 250
    assert read(data, f"x.tar.{ending}") == rows
    cut = read(data[:-20], f"x.tar.{ending}")
    assert cut[-1].reason is Reason.SHARD_DAMAGED
    assert cut[:100] == rows[:100]  # bzip2 loses the most, a block of 900 kB


class Unsteady(AbstractFileSystem):
    """A store of one content: it counts its requests, and fails beyond a byte with the error it is given."""

    protocol = "unsteady"
    cachable = False
    content = b""
    fails_at = 2**62
    error: Exception = TimeoutError("no answer")
    requests = 0

    def info(self, path, **_):
        return {"name": path, "size": len(self.content), "type": "file"}

    def _open(self, path, mode="rb", block_size=None, **options):
        return _UnsteadyFile(self, path, mode, block_size, **options)


class _UnsteadyFile(AbstractBufferedFile):
    def _fetch_range(self, start, end):
        Unsteady.requests += 1
        if end > Unsteady.fails_at:
            raise Unsteady.error
        return Unsteady.content[start:end]


@pytest.fixture
def unsteady(monkeypatch):
    fsspec.register_implementation("unsteady", Unsteady, clobber=True)
    for name in ("content", "fails_at", "error", "requests"):
        monkeypatch.setattr(Unsteady, name, getattr(Unsteady, name))
    return Unsteady


@pytest.mark.parametrize("error", [TimeoutError("no answer"), ConnectionResetError("gone"), OSError("try again")])
@pytest.mark.parametrize("name", ["x.tar", "x.tar.gz"])
def test_storage_errors_that_may_pass_are_raised_after_the_samples_before_them(unsteady, name, error):
    images = [random.Random(i).randbytes(2**20) for i in range(12)]
    plain = tar_bytes([(f"{i}.jpg", image) for i, image in enumerate(images)])
    unsteady.content = plain if name == "x.tar" else gzip.compress(plain, 1)
    unsteady.fails_at, unsteady.error = 9 * 2**20, error
    rows = read_shard(f"unsteady://{name}", Limits())
    assert [next(rows).key for _ in range(5)] == ["0", "1", "2", "3", "4"]
    with pytest.raises(type(error), match=str(error)):
        list(rows)


@pytest.mark.parametrize("ending", COMPRESS)
def test_storage_errors_are_told_from_broken_compression(unsteady, ending):
    unsteady.content, unsteady.fails_at = COMPRESS[ending](THREE), 100
    with pytest.raises(TimeoutError, match="no answer"):
        list(read_shard(f"unsteady://x.tar.{ending}", LIMITS))


def test_a_shard_without_permission_is_unreadable(unsteady):
    unsteady.content, unsteady.fails_at, unsteady.error = THREE, 0, PermissionError("Forbidden")
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


def test_ranges_beyond_the_file_and_in_compressed_tars_are_errors(tmp_path):
    (tmp_path / "x.tar").write_bytes(b"0123456789")
    ranges = read_ranges(f"{tmp_path}/x.tar", [(2, 3), (8, 5)])
    assert next(ranges) == b"234"
    with pytest.raises(DamagedTar, match="the file ends"):
        next(ranges)
    with pytest.raises(UserError, match=re.escape("from a compressed tar")):
        next(read_ranges("s3://b/x.tar.gz", [(0, 1)]))


# --- S3


@pytest.fixture(scope="module")
def s3():
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        fs = fsspec.filesystem("s3", skip_instance_cache=True)
        fs.mkdir("shards")
        yield fs
    server.stop()


def test_shards_are_read_from_s3(s3):
    s3.pipe({"shards/x/1.tar": THREE, "shards/x/2.tar.gz": gzip.compress(THREE), "shards/x/3.tar": THREE[:-600]})
    assert [row.key for row in read_shard("s3://shards/x/1.tar", LIMITS)] == KEYS
    assert list(read_shard("s3://shards/x/2.tar.gz", LIMITS)) == read(THREE)
    assert list(read_shard("s3://shards/x/3.tar", LIMITS))[-1].reason is Reason.SHARD_DAMAGED
    for missing in ("s3://shards/x/4.tar", "s3://nobucket/x.tar"):
        assert [row.reason for row in read_shard(missing, LIMITS)] == [Reason.SHARD_MISSING]
    assert [row.reason for row in read_shard("s3://shards/x", LIMITS)] == [Reason.SHARD_UNREADABLE]
    assert expand("s3://shards/x/[12].tar*") == ["s3://shards/x/1.tar", "s3://shards/x/2.tar.gz"]
    sample = next(read_shard("s3://shards/x/1.tar", LIMITS))
    assert list(read_ranges("s3://shards/x/1.tar", [(sample.offset, sample.length)])) == [sample.image]
