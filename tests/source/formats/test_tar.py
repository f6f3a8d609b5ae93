"""Grouping of members into samples, and refusals that tests/hostile/tars.py does not have."""

from __future__ import annotations

import gzip
import io
import re
import tarfile
import tracemalloc

import pytest

from reinforce.config import Limits
from reinforce.errors import UserError
from reinforce.source.formats.tar import read_shard
from reinforce.source.references import read_ranges
from reinforce.source.samples import RawSample, Refusal
from reinforce.source.tar import DamagedTar
from reinforce.source.urls import expand
from schemas import Reason
from tests.helpers.tars import KEYS, LIMITS, TAR, outcomes, read, sample_members, tar_bytes

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


def test_sidecars_with_the_compound_extension_of_the_image_belong_to_it():
    members = [("0.v1.png", b"I"), ("0.v1.txt", b"t"), ("0.V1.json", b"{}"), ("0.v2.txt", b"u"), ("0.v1.x.txt", b"x")]
    (sample,) = read(tar_bytes(members))
    assert (sample.key, sample.image) == ("0", b"I")
    assert sample.of_image == {"txt": b"t", "json": b"{}", "x.txt": b"x"}
    assert sample.sidecars.keys() == {"v1.txt", "v1.json", "v2.txt", "v1.x.txt"}
    assert sample.members == ("v1.png", "v1.txt", "v1.json", "v2.txt", "v1.x.txt")
    (plain,) = read(tar_bytes([*members, ("0.txt", b"plain")]))
    assert plain.all_sidecars["txt"] == b"plain", "the caption of a sample that had one stays"
    (large,) = read(tar_bytes([("0.v1.png", b"I"), ("0.v1.txt", bytes(301))]))
    assert large.left_out["txt"].detail.startswith(".v1.txt: 301 bytes")
    (other,) = read(tar_bytes([("0.jpg", b"J"), *members]))
    assert (other.image, other.of_image) == (b"J", {})


HIDDEN = ["README", "a/README", ".hidden.jpg", "a/.hidden.jpg", "a/._b.jpg"]
META = ["__MACOSX/a.jpg", "x/__MACOSX/a.jpg", "__index__", "__meta__/a.jpg", "__a.b__"]


@pytest.mark.parametrize("name", HIDDEN + META)
def test_members_that_belong_to_no_sample_are_skipped(name):
    assert outcomes(read(tar_bytes([("b.jpg", b"B"), (name, b"x"), ("b.txt", b"t"), ("c.jpg", b"C")]))) == [
        ("b", "B"),
        ("c", "C"),
    ]


def test_the_first_image_is_used_and_a_plain_extension_precedes_a_compound_one():
    assert outcomes(read(tar_bytes([("a.jpg", b"1"), ("a.png", b"2")]))) == [("a", "1")]
    assert outcomes(read(tar_bytes([("a.depth.png", b"1"), ("a.jpg", b"2"), ("a.left.jpg", b"3")]))) == [("a", "2")]
    assert outcomes(read(tar_bytes([("a.0.jpg", b"1"), ("a.1.jpg", b"2")]))) == [("a", "1")]


def test_members_that_are_not_next_to_the_others_of_their_key_are_refused():
    rows = read(tar_bytes([("a.jpg", b"1"), ("b.txt", b"t"), ("c.jpg", b"2"), ("a.txt", b"t"), ("b.jpg", b"3")]))
    assert outcomes(rows)[:5] == [("a", "1"), ("b", "no_image"), ("c", "2"), ("a", "split_key"), ("b", "split_key")]
    assert "txt" in rows[3].detail


@pytest.mark.parametrize("order", [("jpg", "txt"), ("txt", "jpg"), ("json", "jpg", "txt")])
def test_a_shard_with_most_samples_split_is_refused_as_a_whole(order):
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


def test_limits_on_members_keys_and_samples_are_refusals():
    members = [("a.jpg", b"A"), *((f"a.{i}", b"x") for i in range(70))]
    rows = read(tar_bytes(members), limits=Limits(members=8))
    assert outcomes(rows) == [("a", "A"), ("a", "members")]
    assert len(rows[0].sidecars) == 7
    assert rows[1].detail == "63 more than limits.members of 8, not read"

    rows = read(tar_bytes([(f"{i}.jpg", b"A") for i in range(5)]), limits=Limits(shard_samples=3))
    assert outcomes(rows) == [("0", "A"), ("1", "A"), ("2", "A"), (None, "shard_samples")]
    assert "from '3' on" in rows[-1].detail


def test_a_repeated_member_is_refused_and_the_first_kept():
    rows = read(tar_bytes([("a.jpg", b"1"), ("a.txt", b"t"), ("a.jpg", b"2"), ("a.txt", b"u")]))
    assert outcomes(rows) == [("a", "1"), ("a", "duplicate_key")]
    assert rows[0].sidecars == {"txt": b"t"}


def test_a_large_image_is_refused_and_a_large_sidecar_left_out():
    big, fits = bytes(5_001), b"x" * 5_000
    rows = read(
        tar_bytes([("a.jpg", big), ("b.jpg", fits), ("b.txt", bytes(301)), ("b.json", bytes(300)), ("c.jpg", b"C")])
    )
    assert outcomes(rows) == [("a", "image_bytes"), ("b", fits.decode()), ("c", "C")]
    assert rows[1].sidecars == {"json": bytes(300)}
    detail = ".txt: 301 bytes, above limits.sidecar_bytes of 300"
    assert rows[1].left_out == {"txt": Refusal("b", Reason.SIDECAR_BYTES, detail)}


def test_names_that_are_not_utf8_become_different_valid_keys():
    names = [b"caf\xe9.jpg".decode("utf-8", "surrogateescape"), b"caf\xe8.jpg".decode("utf-8", "surrogateescape")]
    for format in (tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT):
        assert outcomes(read(tar_bytes([(name, b"A") for name in names], format))) == [("caf%E9", "A"), ("caf%E8", "A")]


# --- shards as a whole


def test_a_missing_shard_is_one_refusal(tmp_path):
    for url in (f"{tmp_path}/x.tar", f"file://{tmp_path}/no/x.tar", "memory://source/no.tar"):
        assert [(row.key, row.reason) for row in read_shard(url, LIMITS)] == [(None, Reason.SHARD_MISSING)]


def test_a_link_is_followed(tmp_path):
    (tmp_path / "x.tar").write_bytes(TAR)
    (tmp_path / "link.tar").symlink_to(tmp_path / "x.tar")
    assert list(read_shard(f"{tmp_path}/link.tar", LIMITS)) == read(TAR)


def test_a_shard_without_permission_is_unreadable(unsteady):
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


def test_shards_are_read_from_s3(s3):
    s3.mkdir("shards")
    s3.pipe({"shards/x/1.tar": TAR, "shards/x/2.tar.gz": gzip.compress(TAR), "shards/x/3.tar": TAR[:-600]})
    assert [row.key for row in read_shard("s3://shards/x/1.tar", LIMITS)] == KEYS
    assert list(read_shard("s3://shards/x/2.tar.gz", LIMITS)) == read(TAR)
    assert list(read_shard("s3://shards/x/3.tar", LIMITS))[-1].reason is Reason.SHARD_DAMAGED
    for missing in ("s3://shards/x/4.tar", "s3://nobucket/x.tar"):
        assert [row.reason for row in read_shard(missing, LIMITS)] == [Reason.SHARD_MISSING]
    [folder] = read_shard("s3://shards/x", LIMITS)
    assert folder.reason is Reason.SHARD_UNREADABLE
    assert folder.detail.startswith("a folder, not a tar: write s3://shards/x/*.tar for the tars in it")
    assert expand("s3://shards/x/[12].tar*") == ["s3://shards/x/1.tar", "s3://shards/x/2.tar.gz"]
    sample = next(read_shard("s3://shards/x/1.tar", LIMITS))
    assert list(read_ranges("s3://shards/x/1.tar", [(sample.offset, sample.length)])) == [sample.image]
