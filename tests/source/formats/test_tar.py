"""Grouping of members into samples, and refusals that tests/hostile/tars.py does not have."""

from __future__ import annotations

import io
import re
import tarfile
import tracemalloc

import pytest

from reinforce.errors import UserError
from reinforce.input_config import Input, Limits
from reinforce.source.formats.tar import read_shard
from reinforce.source.references import read_ranges
from reinforce.source.samples import Refusal
from reinforce.source.tar import DamagedTar
from schemas import Reason
from tests.helpers.tars import LIMITS, TAR, outcomes, read, sample_members, tar_bytes

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


NAMES = [("./a.JPG", "./a", "jpg"), ("v1.0/part.2/a.b.Jpg", "v1.0/part.2/a", "b.jpg"), (".git/a.jpg", ".git/a", "jpg")]


@pytest.mark.parametrize(("name", "key", "extension"), [*NAMES, ("ü/日本.webp", "ü/日本", "webp")])
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
