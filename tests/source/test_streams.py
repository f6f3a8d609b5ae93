"""Compressed shards, and errors of the storage while a shard is read."""

from __future__ import annotations

import bz2
import gzip
import lzma
import random

import pytest

from reinforce.input_config import Limits
from reinforce.source.formats.tar import read_shard
from schemas import Reason
from tests.helpers.tars import LIMITS, TAR, outcomes, read, sample_members, tar_bytes, zstd

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
