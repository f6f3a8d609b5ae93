"""Sets of a suite side by side: their order, workers that die, and the same results as in one process."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest

from reinforce.errors import UserError
from reinforce.evaluation.suite.results import SuiteReport
from reinforce.evaluation.suite.run import Job, count_workers
from reinforce.parallel.map_workers import Actors
from tests.helpers import forks
from tests.helpers.commands import Command
from tests.helpers.evaluation import colour_samples, find_set, write_classification
from tests.helpers.models import tiny_models
from tests.helpers.waiting import wait_for

KEYS = ["mnist", "imagenet1k", "renderedsst2"]


def test_results_are_reported_in_the_order_of_the_sets_whichever_ends_first() -> None:
    sets = [find_set(key) for key in KEYS]
    lines = {one.key: {"key": one.key, "metrics": {"main_metric": 0.5}, "notes": []} for one in reversed(sets)}
    report = SuiteReport("datacomp", 38, sets, {"model": lines}).as_json()
    assert [line["key"] for line in report["models"]["model"]["results"]] == KEYS


def test_one_accelerator_and_cpus_need_no_ray_unless_workers_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert [count_workers(given, None, "auto") for given in (None, 1, 2)] == [None, None, 2]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    assert [count_workers(None, None, device) for device in ("auto", "cuda", "cuda:1", "cpu")] == [8, 8, None, None]
    assert [count_workers(given, "auto", "auto") for given in (None, 3)] == [0, 3]
    with pytest.raises(UserError, match="--workers 2: each needs an accelerator of its own; --device cuda:1 is one"):
        count_workers(2, None, "cuda:1")


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_workers_of_ray_have_the_results_of_one_process_also_after_one_is_killed(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_models.open_clip_model(tmp_path / "plain")
    for number, key in enumerate(("mnist", "stl10", "cifar10")):
        write_classification(tmp_path / "sets", key, colour_samples(number + 1))
    words = ("evaluate", "plain", "--suite", "datacomp", "--data", "sets", "--sets", "mnist,stl10,cifar10")

    def metrics(out: str) -> dict[str, float]:
        lines = map(json.loads, (tmp_path / out / "plain.jsonl").read_text().splitlines())
        return {line["key"]: line["metrics"] for line in lines}

    killed: list[int] = []
    call = Actors._call

    def call_and_kill(self: Actors, worker: Any, function: Any, job: Job) -> Any:
        begun.append(job.one.key)
        future = call(self, worker, function, job)
        if not killed:
            killed.append(kill_worker())
        return future

    begun: list[str] = []
    assert command(*words, "--out", "alone")[0] == 0
    monkeypatch.setattr(Actors, "_call", call_and_kill)
    status, out, err = command(*words, "--out", "workers", "--workers", "2")
    assert status == 0, out + err
    assert len(killed) == 1
    assert sorted(begun) == ["cifar10", "cifar10", "mnist", "stl10"], "the set of the killed worker is done again"
    assert begun[-1] == "stl10", "the largest begin first"
    assert "3 sets by 2 workers" in out + err
    assert metrics("workers") == metrics("alone")


def kill_worker() -> int:
    """Kill a process of Ray that evaluates sets -> its id."""
    wait_for(workers)
    [worker, *_] = workers()
    os.kill(worker, signal.SIGKILL)
    return worker


def workers() -> list[int]:
    """Processes of this session that evaluate sets. They may be forks of a process that is not below this one."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):  # it has ended
            named = " ".join(process.cmdline()).startswith("ray::_MapActor")
            if named and process.environ().get(forks.ADDRESS) == os.environ[forks.ADDRESS]:
                found.append(process.pid)
    return found
