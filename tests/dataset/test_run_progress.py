"""The progress of a run: where it is read, when a run counts as ended, and how it is shown."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from reinforce.dataset.runs.progress import RunProgress, list_runs, read_progress, running
from reinforce.dataset.runs.progress_view import WORKERS, detail_lines, headline, state_line, workers_table
from reinforce.errors import UserError
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


def test_a_file_that_is_no_progress_is_an_error_that_names_it(tmp_path: Path) -> None:
    store = Storage(str(tmp_path))
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


def test_lines_show_speed_failures_and_the_command_of_the_log() -> None:
    run = progress_of(
        samples_per_second=55.4, busy_share=0.8, eta_seconds=65.0, starting_workers=1, quarantined={"image_broken": 2},
        job="raysubmit_1", failing_shards=3, failing=[{"shard": "bad", "failures": 2, "error": "odd\x1b\n thing"}],
        slowest=[{"shard": "slow", "seconds": 12.34, "stage": "decoding"}],
    )  # fmt: skip
    assert headline(run) == (
        "3 of 8 shards  1,234 samples  55 samples/s  accelerator busy 80%  0 workers, 1 starting  ETA 0:01:05  "
        "3 failing shards  quarantine: 0 shards; 2 image_broken"
    )
    assert state_line(run).endswith("is running since 0:02:11; log: ray job logs raysubmit_1 --follow")
    assert "log: in the terminal of pid 1 on here" in state_line(progress_of())
    assert detail_lines(run) == [
        "slowest finished shards, with their longest stage: slow 12.3 s (decoding)",
        "failing: bad, 2 failures: odd\\x1b thing",
        "and 2 more failing shards",
    ]


def test_workers_are_shown_with_their_shards_the_longest_in_a_stage_first() -> None:
    now = time.time()

    def worker(number: int, seconds: float) -> dict[str, Any]:
        lease = {"shard": f"s{number}", "leased": now - seconds - 60, "stage": "decoding", "since": now - seconds}
        waiting = {"shard": f"t{number}", "leased": now - 1}
        return {"worker": number, "host": "n1", "pid": 7, "log": "/tmp/w.err", "shards": [lease, waiting]}

    run = progress_of(
        workers=[*(worker(number, number) for number in range(40)), {"worker": 40, "host": "n", "pid": 9}]
    )
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(workers_table(run))
    lines = [line.split() for line in console.export_text().splitlines()]
    assert lines[0] == ["worker", "on", "shard", "for", "stage", "for", "log"]
    assert lines[1] == ["39", "n1", "pid", "7", "s39", "0:01:39", "decoding", "0:00:39", "/tmp/w.err"]
    assert lines[2] == ["t39", "0:00:01"]
    assert len(lines) == 1 + 2 * WORKERS
    assert detail_lines(run)[-1].startswith("and 11 more workers")
