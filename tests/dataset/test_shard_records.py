"""Records of shards: written by runs, merged over all runs, and safe to read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from reinforce.dataset.runs.key_sample import ShardKeys
from reinforce.dataset.runs.shard_records import RecordWriter, ShardRecord, SourceRecord, read_records
from reinforce.source.identity import SourceState
from reinforce.storage import Storage

SOURCE = SourceRecord("s3://b/1.tar", SourceState(10_240, "ab", 'ETag="x"'))


@pytest.mark.parametrize("url", ["local", "memory://records/out"])
def test_later_runs_replace_records_and_keep_the_source_of_the_samples(tmp_path: Path, url: str) -> None:
    store = Storage(str(tmp_path) if url == "local" else url)
    assert read_records(store).sources == {}
    first, second = RecordWriter(store, "2026-a"), RecordWriter(store, "2026-b")
    first.add(ShardRecord("one", ShardKeys.of("xy"), SOURCE))
    first.add(ShardRecord("one", ShardKeys.of("xy"), None))  # further layers of the same shard
    second.add(ShardRecord("one", ShardKeys.of("xy"), None))
    second.add(ShardRecord("two", ShardKeys.of("yz"), None))
    for writer in (first, second):
        writer.flush()
    found = read_records(store)
    assert found.sources == {"one": SOURCE}
    assert found.keys.repeated().keys == 1


def test_damaged_records_are_left_out(tmp_path: Path) -> None:
    good = ShardRecord("one", ShardKeys.of("xy"), SOURCE).line()
    lines = ["", "{", "[]", "3", good[:-9], good.replace('"keys": "', '"keys": "?'), '{"shard": "x", "limit": 3}']
    wrong_types = [("10240", '"10 KB"'), ("10240", "true"), ('"ab"', "[1]"), ('"s3://b/1.tar"', "{}"), ('"one"', "1")]
    lines += [good.replace(old, new) for old, new in wrong_types]
    assert len({*lines}) == 12
    lines += ["[" * 100_000, good]
    path = tmp_path / "runs" / "r" / "shards.jsonl"
    path.parent.mkdir(parents=True)
    path.write_bytes("\n".join(lines).encode() + b"\n\xff\n")
    found = read_records(Storage(str(tmp_path)))
    assert found.sources == {"one": SOURCE}
    assert found.keys.repeated().shards == 1


def test_what_is_no_file_or_too_large_is_not_read(tmp_path: Path) -> None:
    writer = RecordWriter(Storage(str(tmp_path)), "first")
    writer.add(ShardRecord("one", ShardKeys.of("xy"), SOURCE))
    writer.flush()
    (tmp_path / "runs" / "pipe").mkdir()
    os.mkfifo(tmp_path / "runs" / "pipe" / "shards.jsonl")  # opening it would wait for a writer
    (tmp_path / "runs" / "folder" / "shards.jsonl").mkdir(parents=True)
    large = tmp_path / "runs" / "large" / "shards.jsonl"
    large.parent.mkdir()
    with large.open("wb") as file:
        file.truncate(2**40)  # reading it would need a terabyte
    assert read_records(Storage(str(tmp_path))).sources == {"one": SOURCE}
