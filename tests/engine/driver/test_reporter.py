"""What a driver reports of its workers and of its job."""

from __future__ import annotations

import time

import pytest

from reinforce.engine.driver.pool import Slot
from reinforce.engine.driver.reporter import job_id, worker_progress
from reinforce.engine.messages.pulse import LeasePulse, Pulse
from reinforce.engine.messages.results import WorkerId, WorkerInfo


def test_a_worker_is_shown_with_the_times_of_its_shards_and_stages() -> None:
    now, clock = time.time(), time.monotonic()
    slot = Slot(None, WorkerInfo(WorkerId("n" * 20, 7, "host"), "cpu", {}, log="/tmp/w.err"), index=4)
    slot.leased_at = {"a": clock - 90, "b": clock - 3}
    slot.pulse, slot.pulse_at = Pulse(50, leases=(LeasePulse("a", "decoding", 20.0, "key 'k'"),)), clock - 5
    found = worker_progress(slot)
    assert (found.worker, found.host, found.pid, found.log, found.samples) == (4, "host", 7, "/tmp/w.err", 50)
    a, b = found.shards
    assert (a.shard, a.stage, a.what) == ("a", "decoding", "key 'k'")
    assert a.leased == pytest.approx(now - 90, abs=20)
    assert a.since == pytest.approx(now - 25, abs=20)
    assert (b.shard, b.stage, b.since) == ("b", "", 0.0), "it was leased after the worker's last answer"


def test_the_job_is_that_of_ray_job_submit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert job_id() == ""
    for text, name in (('{"metadata": {"job_submission_id": "raysubmit_x"}}', "raysubmit_x"), ("[]", ""), ("{", "")):
        monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", text)
        assert job_id() == name
