"""Progress lines of a run."""

from __future__ import annotations

import re
import time
from dataclasses import replace

import pytest

from reinforce.engine.record.progress import Progress, Snapshot

START = Snapshot(
    shards_done=0, shards=100, samples=0, samples_done=0, busy=0.0, alive=0.0, workers=2,
    quarantined_shards=0, refused_rows=0,
)  # fmt: skip


def test_a_log_gets_a_plain_line_every_few_seconds_and_not_at_every_call(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reinforce.terminal._LOG_SECONDS", 0.2)
    start = time.monotonic()
    with Progress() as progress:
        for samples in range(30):
            progress.show(replace(START, samples=samples))
            time.sleep(0.01)
    out = capsys.readouterr().out
    assert 1 <= len(out.splitlines()) <= 1 + (time.monotonic() - start) / 0.2
    assert "\x1b" not in out


def test_the_line_shows_speed_busy_share_and_remaining_time() -> None:
    progress = Progress()
    progress._start -= 100  # a run that began 100 seconds ago
    progress.show(START)
    moment, first = progress._history[0]
    progress._history[0] = (moment - 10, first)
    now = replace(START, shards_done=10, samples=1_500, samples_done=1_000, busy=16.0, alive=20.0, refused_rows=3)
    line = progress.line(now)
    assert "10 of 100 shards" in line
    assert "1,500 samples" in line
    assert "150 samples/s" in line
    assert "accelerator busy 80%" in line
    assert "quarantine: 0 shards, 3 rows" in line
    [eta] = re.findall(r"ETA 0:(\d\d):(\d\d)", line)
    # 10,000 samples expected, 1,500 in 100 s: 8,500 are 567 s away
    assert abs(int(eta[0]) * 60 + int(eta[1]) - 567) <= 2


def test_no_remaining_time_is_shown_before_the_first_shard_is_finished() -> None:
    assert "ETA" not in Progress().line(replace(START, samples=10))
    assert "ETA" not in Progress().line(replace(START, samples=10, samples_done=10)), "of a shard to be continued"
