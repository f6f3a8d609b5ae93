"""Compressed shards, errors of a storage while they are read, and answers with fewer bytes than there are."""

from __future__ import annotations

import bz2
import gzip
import itertools
import lzma
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import s3fs

import reinforce
from reinforce.dataset.status import read_status
from reinforce.dataset.store import Store
from reinforce.dataset.validate import validate
from reinforce.errors import StorageError
from reinforce.source.config import Input, Limits
from reinforce.source.formats.base import Shard, read_samples
from reinforce.source.formats.tar import read_shard
from reinforce.source.urls import ShortRead, expand
from schemas import Reason
from tests.helpers.data import config_of, members_of, tree, write_tar
from tests.helpers.reinforced import fresh_dataset
from tests.helpers.s3_proxy import Proxy, Request, shorten
from tests.helpers.tars import LIMITS, TAR, outcomes, read, sample_members, tar_bytes, zstd

SHARES = (0.0, 0.5)  # of the bytes, which are sent


def every_other_read() -> Any:
    """Whether a request is the first, third, ... for an object."""
    seen: Counter[str] = Counter()

    def selects(request: Request) -> bool:
        if not request.is_read:
            return False
        seen[request.key] += 1
        return seen[request.key] % 2 == 1

    return selects


def test_short_answers_change_nothing_of_a_dataset_and_damage_nothing(
    s3: s3fs.S3FileSystem, s3_proxy: Proxy, tmp_path: Path
) -> None:
    faults = itertools.cycle(map(shorten, SHARES))
    for number in range(2):
        path = write_tar(tmp_path / "source" / f"{number}.tar", members_of(number, 5))
        s3.put_file(str(path), f"bucket/short/{number}.tar")
    whole = config_of("s3://bucket/short/{0..1}.tar", tmp_path / "whole", captioners={})
    fresh_dataset(whole)
    config = {**whole, "output": "s3://bucket/short/out"}

    def shortened(*request: Any) -> None:
        next(faults)(*request)

    with s3_proxy.inject(shortened, every_other_read()) as affected:
        fresh_dataset({**config, "teachers": {"red": config["teachers"]["red"]}})
        fresh_dataset(config)
        found = validate(config["output"], ["s3://bucket/short"])
        assert (found.errors, found.changed, found.repeated.keys) == ([], [], 0)
        assert validate(config["output"], quick=True).valid
        assert read_status(config["output"])["damaged"] == []
        assert len({sample.key for sample in reinforce.open(config["output"])}) == 10
    assert len({request.key.rpartition(".")[2] for request in affected}) == 3, "tars, layers and dataset.json"
    s3.invalidate_cache()
    root = "bucket/short/out/"
    files = {path.removeprefix(root): s3.cat_file(path) for path in s3.find(root)}
    assert {name: data for name, data in files.items() if not name.startswith(("runs/", "index/"))} == tree(
        tmp_path / "whole"
    )


@pytest.mark.parametrize("share", SHARES)
def test_a_storage_that_never_sends_all_is_an_error_and_no_damage(
    s3: s3fs.S3FileSystem, s3_proxy: Proxy, tmp_path: Path, share: float
) -> None:
    write_tar(tmp_path / "0.tar", members_of(0, 3))
    s3.put_file(str(tmp_path / "0.tar"), "bucket/never/0.tar")
    store, shard = Store("s3://bucket/never"), Shard("s3://bucket/never/0.tar", "0")
    store.quarantine("samples", "0", [("a", Reason.IMAGE_BROKEN, "b")])
    store.write_json({"a": 1}, "dataset.json")
    store.write_bytes(b"a.tar\nb.tar\n", "list.txt")
    with s3_proxy.inject(shorten(share), lambda request: request.is_read):
        with pytest.raises(ShortRead, match=r"0\.tar: the storage sent \d"):
            list(read_samples(shard, Input()))
        with pytest.raises(StorageError, match=r"quarantine/samples/0\.parquet cannot be read: the storage sent"):
            store.quarantined("samples", "0")
        with pytest.raises(StorageError, match=r"dataset\.json cannot be read: the storage sent"):
            store.read_json("dataset.json")
        with pytest.raises(reinforce.UserError, match=r"cannot read this list of URLs .*the storage sent"):
            expand("s3://bucket/never/list.txt")


COMPRESS = {"gz": gzip.compress, "xz": lzma.compress, "bz2": bz2.compress, "zst": zstd}


def test_compressed_tars_are_read_like_plain_ones_and_truncated_or_plain_ones_under_their_names_refused():
    noise = random.Random(0)
    plain = tar_bytes([member for i in range(180) for member in sample_members(f"{i}", noise.randbytes(4_800))])
    rows = read(plain)
    assert len(rows) == 180
    for ending, compress in COMPRESS.items():
        data = compress(plain)
        assert read(data, f"x.tar.{ending}") == rows, ending
        cut = read(data[:-20], f"x.tar.{ending}")
        assert cut[-1].reason is Reason.SHARD_DAMAGED, ending
        assert cut[:100] == rows[:100], ending  # bzip2 loses the most, a block of 900 kB
        for other in (TAR, b""):
            assert outcomes(read(other, f"x.tar.{ending}")) == [(None, "shard_unreadable")], ending


def test_temporary_storage_errors_are_raised_after_the_samples_before_them(unsteady):
    plain = tar_bytes([(f"{i}.jpg", random.Random(i).randbytes(2**20)) for i in range(12)])
    for name, content in (("x.tar", plain), ("x.tar.gz", gzip.compress(plain, 1))):
        for error in (TimeoutError("no answer"), ConnectionResetError("gone"), OSError("try again")):
            unsteady.content, unsteady.fails_at, unsteady.error = content, 9 * 2**20, error
            rows = read_shard(f"unsteady://{name}", Limits())
            assert [next(rows).key for _ in range(5)] == ["0", "1", "2", "3", "4"]
            with pytest.raises(type(error), match=str(error)):
                list(rows)
    for ending, compress in COMPRESS.items():  # they are not mistaken for broken compression
        unsteady.content, unsteady.fails_at = compress(TAR), 100
        with pytest.raises(OSError, match="try again"):
            list(read_shard(f"unsteady://x.tar.{ending}", LIMITS))
