"""What runs leave behind: progress, records of shards, and samples of their keys."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from reinforce.dataset.runs import (
    ALL,
    SHARD_HASHES,
    WORKERS,
    KeySample,
    RecordWriter,
    RunProgress,
    ShardKeys,
    ShardRecord,
    SourceRecord,
    detail_lines,
    headline,
    list_runs,
    read_progress,
    read_records,
    running,
    state_line,
    workers_table,
)
from reinforce.errors import UserError
from reinforce.source.references import SourceState
from reinforce.storage import Storage


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time stands still."""
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)


def progress_of(**changes: Any) -> RunProgress:
    now = time.time()
    values = {
        "run": "20261126T000000Z-aaaaaa", "time": now, "interval": 2.0, "started": now - 131, "host": "here",
        "pid": 1, "shards": 8, "shards_done": 3, "samples": 1234,
    }  # fmt: skip
    return RunProgress.model_validate({**values, **changes})


def write(store: Storage, run: str, progress: RunProgress) -> None:
    store.write_json(progress.model_dump(mode="json"), "runs", run, "progress.json")


def test_the_latest_run_is_running_until_it_has_a_summary(tmp_path: Path) -> None:
    store = Storage(str(tmp_path))
    assert running(store, list_runs(store)) is None
    write(store, "a", progress_of(run="a"))
    write(store, "b", progress_of(run="b"))
    found = running(store, list_runs(store))
    assert found is not None
    assert found.run == "b"
    store.write_json({"run": "b"}, "runs", "b", "summary.json")
    assert running(store, list_runs(store)) is None, "not an older one, which was killed"
    store.write_json({"run": ["x"]}, "runs", "a", "progress.json")
    with pytest.raises(UserError, match=r"runs/a/progress\.json is not the progress of a run"):
        read_progress(store, "a")


def test_a_run_is_silent_after_three_intervals_or_once_its_process_is_gone() -> None:
    now = time.time()
    assert progress_of(time=now - 25).silent_for() is None
    assert progress_of(time=now - 31).silent_for() == pytest.approx(31, abs=1)
    assert progress_of(time=now - 150, interval=60.0).silent_for() is None
    assert progress_of(host=socket.gethostname(), pid=os.getpid()).silent_for() is None
    assert progress_of(host=socket.gethostname(), pid=2**22 + 1).silent_for() is not None
    assert "was probably killed" in state_line(progress_of(time=now - 40))
    assert "log: in the terminal of pid 1 on here" in state_line(progress_of())


def test_lines_show_speed_failures_and_workers_with_their_shards_the_longest_in_a_stage_first() -> None:
    now = time.time()

    def worker(number: int, seconds: float) -> dict[str, Any]:
        lease = {"shard": f"s{number}", "leased": now - seconds - 60, "stage": "decoding", "since": now - seconds}
        waiting = {"shard": f"t{number}", "leased": now - 1}
        return {"worker": number, "host": "n1", "pid": 7, "log": "/tmp/w.err", "shards": [lease, waiting]}

    run = progress_of(
        samples_per_second=55.4, busy_share=0.8, eta_seconds=65.0, starting_workers=1, quarantined={"image_broken": 2},
        job="raysubmit_1", failing_shards=3, failing=[{"shard": "bad", "failures": 2, "error": "odd\x1b\n thing"}],
        slowest=[{"shard": "slow", "seconds": 12.34, "stage": "decoding"}],
        workers=[*(worker(number, number) for number in range(40)), {"worker": 40, "host": "n", "pid": 9}],
    )  # fmt: skip
    assert headline(run) == (
        "3 of 8 shards  ETA 0:01:05  1,234 samples  55 samples/s  models busy 80%  41 workers, 1 starting  "
        "3 failing shards  quarantine: 0 shards; 2 image_broken"
    )
    assert state_line(run).endswith("is running since 0:02:11; log: ray job logs raysubmit_1 --follow")
    assert detail_lines(run) == [
        "slowest finished shards, with their longest stage: slow 12.3 s (decoding)",
        "failing: bad, 2 failures: odd\\x1b thing",
        "and 2 more failing shards",
        "and 11 more workers, whose shards have changed their stage later; --json has all",
    ]
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(workers_table(run))
    lines = [line.split() for line in console.export_text().splitlines()]
    assert lines[0] == ["worker", "on", "shard", "for", "stage", "for", "log"]
    assert lines[1] == ["39", "n1", "pid", "7", "s39", "0:01:39", "decoding", "0:00:39", "/tmp/w.err"]
    assert lines[2] == ["t39", "0:00:01"]
    assert len(lines) == 1 + 2 * WORKERS


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


def test_damaged_records_and_what_is_no_file_or_too_large_are_left_out(tmp_path: Path) -> None:
    good = ShardRecord("one", ShardKeys.of("xy"), SOURCE).line()
    lines = ["", "{", "[]", "3", good[:-9], good.replace('"keys": "', '"keys": "?'), '{"shard": "x", "limit": 3}']
    wrong_types = [("10240", '"10 KB"'), ("10240", "true"), ('"ab"', "[1]"), ('"s3://b/1.tar"', "{}"), ('"one"', "1")]
    lines += [good.replace(old, new) for old, new in wrong_types]
    assert len({*lines}) == 12
    lines += ["[" * 100_000, good]
    path = tmp_path / "runs" / "r" / "shards.jsonl"
    path.parent.mkdir(parents=True)
    path.write_bytes("\n".join(lines).encode() + b"\n\xff\n")
    (tmp_path / "runs" / "pipe").mkdir()
    os.mkfifo(tmp_path / "runs" / "pipe" / "shards.jsonl")  # opening it would wait for a writer
    (tmp_path / "runs" / "folder" / "shards.jsonl").mkdir(parents=True)
    (tmp_path / "runs" / "large").mkdir()
    with (tmp_path / "runs" / "large" / "shards.jsonl").open("wb") as file:
        file.truncate(2**40)  # reading it would need a terabyte
    found = read_records(Storage(str(tmp_path)))
    assert found.sources == {"one": SOURCE}
    assert found.keys.repeated().shards == 1


shards = st.lists(st.sets(st.text(max_size=2)), max_size=5)


@given(shards)
def test_keys_of_small_datasets_are_counted_exactly(content: list[set[str]]) -> None:
    sample = KeySample()
    for number, keys in enumerate(content):
        sample.add(str(number), ShardKeys.of(keys))
    found = sample.repeated()
    every = [key for keys in content for key in keys]
    repeated = {key for key in every if every.count(key) > 1}
    assert (found.keys, found.exact, found.shards) == (len(repeated), True, len(content))
    if found.pair is not None:
        first, second = (content[int(name)] for name in found.pair)
        assert first & second
    assert (found.pair is None) == (not repeated)


@given(st.lists(st.sets(st.integers(0, 5000).map(str)), max_size=4), st.integers(0, ALL))
def test_parts_of_a_shard_join_to_its_smallest_hashes(parts: list[set[str]], limit: int) -> None:
    keys = ShardKeys.of([])
    for part in parts:
        keys = keys.joined(ShardKeys.of(part), 100)
    whole = ShardKeys.of(key for part in parts for key in part)
    assert keys.hashes.tolist() == whole.below(keys.limit).hashes.tolist()
    assert len(keys.hashes) == min(100, len(whole.hashes))
    assert keys.below(limit).hashes.tolist() == [value for value in keys.hashes.tolist() if value <= limit]


def test_a_sample_of_bounded_size_estimates_the_repeated_keys() -> None:
    sample = KeySample(4000)
    for number in range(100):
        keys = ShardKeys.of(f"{number % 90} {key}" for key in range(2000))
        sample.add(str(number), ShardKeys.of([]).joined(keys))
        assert sum(len(sample[str(shard)].hashes) for shard in range(100)) <= 4000
    found = sample.repeated()
    assert not found.exact
    assert 15_000 < found.keys < 25_000  # truly 20,000
    assert 0.08 < found.share < 0.15  # truly 1/9
    assert len(ShardKeys.of([]).joined(keys).hashes) == SHARD_HASHES


def test_a_shard_that_was_computed_again_does_not_repeat_its_keys() -> None:
    sample = KeySample()
    for _ in range(2):
        sample.add("a", ShardKeys.of("xyz"))
    assert sample.repeated().keys == 0
    sample.add("deleted", ShardKeys.of("xyz"))
    assert sample.repeated({"a"}).lines(1, "out") == []
    assert sample.repeated({"a"}).lines(2, "out") == [
        "keys: 1 of 2 shards were compared, those that runs have recorded; `reinforce validate out` compares all"
    ]
    [line] = sample.repeated().lines(2, "out")
    assert line == "repeated keys: 3 keys, 100.00% of all, in more than one shard, for example in a and deleted"
