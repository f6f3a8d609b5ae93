"""Totals, exit status and text of a run, its progress lines, and the speed of its models."""

from __future__ import annotations

import re
import time
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from reinforce.config import parse_config
from reinforce.dataset.manifest import check_run
from reinforce.engine.messages import ShardResult
from reinforce.engine.plan.plan import LayerState, NotInSource, Plan
from reinforce.engine.rates import Stages, add_stages, fuller, rate_lines, with_rates
from reinforce.engine.record import (
    Ending,
    ProgressScreen,
    RunSummary,
    RunTotals,
    Snapshot,
    add_summaries,
    ending_of,
    example_lines,
    not_in_source_lines,
    nothing_to_do,
    summarize,
)
from reinforce.errors import StorageError, TooManyQuarantined, UserError
from reinforce.processes.signals import Terminated
from tests.helpers.driver import shard

RESULT = ShardResult(
    shard="a",
    layers=("samples",),
    samples=10,
    refused={"image_broken": 1},
    seconds=1.0,
    busy=0.5,
    bytes=100,
    cleaned={"c": {"captions": 20, "cut": 1}},
)

DONE = Ending()


def plan(shards: int = 10, quarantined: int = 0, pending: tuple[str, ...] = ("samples",), **failures: Any) -> Plan:
    config = parse_config({"source": "x.tar", "output": "s3://user:secret@bucket/out", "failures": failures})
    states = {"samples": LayerState(shards - quarantined, 0, quarantined, 0)}
    return Plan(config, {}, shards, states, [replace(shard("a"), layers=pending)] if pending else [])


def totals_of(*results: ShardResult) -> RunTotals:
    totals = RunTotals()
    for result in results:
        totals.add(result)
    return totals


def summary_of(
    totals: RunTotals, of: Plan | None = None, quarantined: int = 0, alive: float = 1.0, ending: Ending = DONE
) -> RunSummary:
    return summarize("run", of or plan(), totals, quarantined, 2.0, alive, ending)


def test_a_summary_has_the_share_of_the_workers_time_in_which_accelerators_were_busy() -> None:
    summary = summary_of(totals_of(RESULT), alive=4.0)
    assert (summary.status, summary.message, summary.busy_share) == (0, "done", 0.125)
    assert summary_of(totals_of(RESULT), alive=0.0).busy_share == 0.25


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (UserError("disk is full at TOKEN"), 2, "disk is full at ***"),
        (TooManyQuarantined("stopped: 11 of 20"), 1, "stopped: 11 of 20"),
        (StorageError("no answer"), 1, "no answer"),
        (KeyboardInterrupt(), 130, "stopped"),
        (Terminated(), 143, "stopped"),
        (ValueError("TOKEN"), 1, "stopped by an error: ValueError: ***"),
    ],
)
def test_a_run_that_was_stopped_has_the_exit_status_of_its_command(
    error: BaseException, status: int, message: str
) -> None:
    ending = ending_of(error, lambda text: text.replace("TOKEN", "***"))
    summary = summary_of(RunTotals(), ending=ending)
    assert (summary.status, summary.message) == (status, message)


def test_a_run_that_reads_a_source_and_finds_no_sample_fails_and_says_what_happened_to_its_shards() -> None:
    summary = summary_of(RunTotals())
    assert summary.status == 1
    assert summary.message == "no samples: the source contains no image-text pair. Check `source`."
    later = summary_of(RunTotals(), plan(pending=("embeddings/t/caption",)))
    assert later.status == 0, "a layer that is added to an empty dataset is complete"
    reason = "shard_unreadable"
    totals = totals_of(replace(RESULT, samples=0, refused={reason: 1}, examples={reason: "a folder"}))
    message = summary_of(totals).message
    assert message.endswith("could be read from the source; shard_unreadable: a: a folder")
    totals = RunTotals()
    totals.add_quarantined("a", "samples", "shard_crashed", "its worker died:\n out of memory")
    message = summary_of(totals).message
    assert message.startswith("no samples: the shard a: its worker died: out of memory (shard_crashed). The ")
    assert "workers.batch" in message
    assert "--retry-quarantined" in message
    totals.add_quarantined("b", "samples", "shard_failed", "RuntimeError")
    assert summary_of(totals).message.startswith("no samples: 2 shards, such as a: its worker died")


def test_the_first_example_of_each_reason_is_kept_and_a_bounded_number_shown() -> None:
    totals = totals_of(*(replace(RESULT, shard=name, examples={"image_broken": "7: cut"}) for name in "ab"))
    totals.add_quarantined("b", "embeddings/t/images", "shard_failed", "x" * 5000)
    assert totals.examples["image_broken"] == "a: 7: cut"
    assert totals.examples["shard_failed"].startswith("b in embeddings/t/images: xxx")
    assert len(totals.examples["shard_failed"]) < 400
    text = summary_of(totals, quarantined=1).text("out")
    assert "\n  image_broken, for example a: 7: cut\n  shard_failed, for example b in embeddings/t/images: xxx" in text
    lines = example_lines({f"reason_{i:02d}": "x" for i in range(13)})
    assert (len(lines), lines[-1]) == (11, "  and 3 more reasons")


def test_the_text_lists_quarantined_rows_and_shards_and_hides_credentials() -> None:
    cleaned = {"c": {"captions": 20, "null_rows": 1}}
    summary = RunSummary(
        run="run", shards=2, samples=10, seconds=5.0, busy_share=0.5, refused={"no_text": 3}, quarantined_shards=1,
        refused_samples=1, status=1, message="stopped", cleaned=cleaned,
    )  # fmt: skip
    lines = summary.text("s3://user:secret@bucket/out").splitlines()
    assert lines[0].startswith("2 shards, 10 samples in 5.0 s (2 samples/s, models busy 50%), ")
    assert lines[1:3] == ["captions by c: 20 captions, 1 null rows", "quarantined rows of 1 sample: 3 no_text"]
    assert "--retry-quarantined" in lines[3]
    assert lines[4] == "stopped"
    assert "secret" not in "".join(lines)


def test_samples_are_counted_by_what_joined_them_and_captions_that_could_not_be_decoded_too() -> None:
    counts = {"uid": 8, "key": 1, "other_image": 2, "captions_replaced": 3}
    summary = summary_of(totals_of(*(replace(RESULT, source_counts=counts) for _ in range(2))))
    assert summary.text("out").splitlines()[1:3] == [
        "samples joined with reinforcements: 16 by uid, 2 by key alone (join: key), 4 not (another image)",
        "captions with characters that could not be decoded (U+FFFD): 6; store them as UTF-8",
    ]
    assert add_summaries(summary, summary).source_counts["uid"] == 32


def test_shards_that_are_not_in_the_source_are_reported_with_what_to_do() -> None:
    absent = NotInSource(3, 2, "00000-ab", "samples/00007-cd")
    lines = [
        "not in `source`: 3 finished shards, such as 00000-ab. Such shards stay in the dataset and are read; to remove "
        "one, delete its files NAME.parquet in all layers",
        "not in `source`: 2 quarantined shards, such as samples/00007-cd. Such shards are not retried; to forget "
        "one, delete its file quarantine/LAYER/NAME.parquet",
    ]
    done = nothing_to_do(replace(plan(pending=()), not_in_source=absent))
    assert done.message.splitlines()[1:] == lines
    summary = summary_of(totals_of(RESULT), replace(plan(), not_in_source=absent))
    assert summary.text("out").splitlines()[-2:] == lines
    assert summary.not_in_source["finished"] == 3, "for `reinforce status`"
    assert not_in_source_lines({}) == [], "of a run that has not ended"


def test_nothing_to_do_is_a_failure_where_too_many_shards_are_quarantined() -> None:
    done = nothing_to_do(plan(pending=()))
    assert (done.run, done.status) == (None, 0)
    assert done.message.startswith("nothing to do: 10 shards")
    assert nothing_to_do(plan(quarantined=1, pending=(), allowed_share=0.1)).status == 0
    failed = nothing_to_do(plan(quarantined=2, pending=(), allowed_share=0.1))
    assert failed.status == 1
    assert "except 2 quarantined shards" in failed.message
    assert "failures.allowed_share = 0.1" in failed.message


START = Snapshot(
    shards_done=0, shards=100, samples=0, samples_done=0, busy=0.0, alive=0.0, workers=2,
    quarantined_shards=0, refused_rows=0,
)  # fmt: skip
IMAGES = {"inputs": 100, "seconds": 2.0, "flops": 3e12, "peak_flops": 6e12}
CARD = {"name": "NVIDIA H100 80GB HBM3", "memory_peak": 2**30, "memory_total": 80 * 2**30}


def test_the_line_shows_speed_busy_share_and_remaining_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    progress = ProgressScreen()
    assert "ETA" not in progress.line(replace(START, samples=10))
    assert "ETA" not in progress.line(replace(START, samples=10, samples_done=10)), "of a shard to be continued"
    now[0] = 190.0
    progress.show(START)
    now[0] = 200.0
    line = progress.line(
        replace(START, shards_done=10, samples=1_500, samples_done=1_000, busy=16.0, alive=20.0, refused_rows=3)
    )
    assert "10 of 100 shards" in line
    assert "1,500 samples" in line
    assert "150 samples/s" in line
    assert "models busy 80%" in line
    assert "quarantine: 0 shards, 3 rows" in line
    [eta] = re.findall(r"ETA (\S+)", line)
    assert eta == "0:09:27", "10,000 samples are expected, and 1,500 took 100 s: 8,500 take 567 s"


def test_before_workers_have_started_the_line_shows_their_seconds_and_then_the_time_of_a_single_shard(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    progress = ProgressScreen(expected=400.0)
    now[0] = 130.0
    progress.show(starting := replace(START, shards=1, workers=0, starting=2))
    assert progress.line(starting) == "0 of 1 shard  2 workers loading models for 30 s  0 samples"
    now[0] = 150.0
    working = replace(START, shards=1, workers=1, starting=1, samples=100)
    line = progress.line(working)
    assert line[:59] == line[:59].rstrip(), "80 columns have 59 beside the bar"
    assert line.startswith("0 of 1 shard  ETA 0:01:00  100 samples"), "100 of 400 took 20 s since workers work"
    assert line.endswith("1 worker, 1 starting")
    now[0] = 160.0
    assert "ETA 0:00:50" in progress.line(working), "it falls until the next samples are counted"
    now[0] = 300.0
    assert "ETA" not in progress.line(working), "the rest took longer than expected, and none of it has been counted"
    assert "ETA" not in progress.line(replace(working, samples=500)), "more than expected, and not finished"
    assert "ETA 0:00:00" in progress.line(replace(working, samples=500, samples_done=500, shards_done=1))
    assert "ETA" not in progress.line(replace(working, samples=0))
    progress.show(working)
    now[0] = 312.0
    alone = replace(working, workers=0, starting=2)
    assert progress.line(alone).startswith("0 of 1 shard  2 workers loading models for 12 s  100 samples"), "no ETA"


def test_the_line_names_silent_hosts_and_the_shards_that_wait_for_them() -> None:
    progress = ProgressScreen()
    assert "silent" not in progress.line(START)
    assert progress.line(replace(START, silent={"b": 1})).endswith("  1 shard waits for silent host b")
    assert progress.line(replace(START, silent={"b": 2, "a": 1})).endswith("  3 shards wait for silent hosts a, b")
    many = {str(number): 2 for number in range(5)}
    assert progress.line(replace(START, silent=many)).endswith("  10 shards wait for silent hosts 0, 1, 2 and 2 more")


def test_rates_are_those_of_the_sums_also_over_summaries_and_the_device_is_the_one_with_the_least_free_share() -> None:
    sums: Stages = {}
    for stages in ({"embeddings/t/images": IMAGES}, {"captions/c": {"inputs": 30, "seconds": 3.0}}):
        add_stages(sums, stages)
    add_stages(sums, with_rates({"embeddings/t/images": Counter(IMAGES)}))
    assert with_rates(sums) == {
        "embeddings/t/images": {**{key: 2 * value for key, value in IMAGES.items()}, "per_second": 50.0, "mfu": 0.5},
        "captions/c": {"inputs": 30, "seconds": 3.0, "per_second": 10.0},
    }
    tokens = with_rates({"captions/c": Counter(inputs=30, seconds=3.0, tokens=240)})
    assert rate_lines({"stages": tokens})[1] == "  captions/c: 30 captions, 10 captions/s, 80 tokens/s"
    assert with_rates({"captions/c": Counter(inputs=0, seconds=0.0)})["captions/c"]["inputs"] == 0
    other = {**CARD, "memory_peak": 2**20}
    assert fuller(CARD, other) == fuller(other, CARD) == CARD
    assert fuller({}, other) == other
    assert fuller({}, {}) == {}


def test_lines_name_units_rates_and_memory_and_there_are_none_of_a_version_without_rates() -> None:
    stages = with_rates({"embeddings/t/images": Counter(IMAGES), "captions/c": Counter(inputs=30, seconds=3.0)})
    summary = {"busy_share": 0.634, "stages": stages, "device": CARD}
    check_run(summary, "summary.json")
    assert rate_lines(summary) == [
        "models busy 63%, NVIDIA H100 80GB HBM3: tensors took at most 1.0 GiB of 80.0 GiB",
        "  embeddings/t/images: 100 images, 50 images/s, MFU 50%",
        "  captions/c: 30 captions, 10 captions/s",
    ]
    assert rate_lines({**summary, "device": {}})[0] == "models busy 63%"
    earlier = {"run": "a", "shards": 3, "busy_share": 0.5}
    check_run(earlier, "summary.json")
    assert rate_lines(earlier) == []
