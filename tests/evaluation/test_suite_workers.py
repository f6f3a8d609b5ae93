"""Sets of a suite side by side: their order, workers that die, and the same results as in one process."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from reinforce.errors import UserError
from reinforce.evaluation.kinds.files import SetFiles
from reinforce.evaluation.report import Outcome
from reinforce.evaluation.suite.results import SuiteReport
from reinforce.evaluation.suite.workers import Job, Worker, WorkerLost, count_workers, schedule
from tests.helpers.commands import Command
from tests.helpers.evaluation import colour_samples, find_set, write_classification
from tests.helpers.models import tiny_models
from tests.soak.kills import processes_below

KEYS = ["mnist", "imagenet1k", "renderedsst2", "vtab/pcam", "stl10"]
JOBS = [Job(find_set(key), SetFiles("", [], ""), ("model",)) for key in KEYS]


def outcome_of(job: Job) -> Outcome:
    return Outcome({"model": {"acc1": 1.0}}, job.one.size, [])


class Workers:
    """Workers that are threads; ``evaluate`` is what each does."""

    def __init__(self, evaluate: Callable[[int, Job], Outcome | str]) -> None:
        self.evaluate, self.started = evaluate, 0
        self.threads = ThreadPoolExecutor(8)

    def start(self) -> Worker:
        number = self.started
        self.started += 1

        def work(job: Job) -> Future[Outcome | str]:
            return self.threads.submit(self.evaluate, number, job)

        return work


def test_results_are_reported_in_the_order_of_the_sets_whichever_ends_first() -> None:
    sets = [find_set(key) for key in KEYS[:3]]
    lines = {one.key: {"key": one.key, "metrics": {"main_metric": 0.5}, "notes": []} for one in reversed(sets)}
    report = SuiteReport("datacomp", 38, sets, {"model": lines}).as_json()
    assert [line["key"] for line in report["models"]["model"]["results"]] == KEYS[:3]


def test_the_largest_sets_begin_first_and_workers_run_side_by_side() -> None:
    both, begun = threading.Barrier(2), []

    def evaluate(number: int, job: Job) -> Outcome:
        begun.append(job.one.key)
        if len(begun) <= 2:
            both.wait(600)  # passes only if another worker runs at the same time
        return outcome_of(job)

    workers = Workers(evaluate)
    found = {job.one.key: outcome for job, outcome in schedule(JOBS, workers.start, 2)}
    assert workers.started == 2
    assert found == {job.one.key: outcome_of(job) for job in JOBS}
    assert set(begun[:2]) == {"imagenet1k", "vtab/pcam"}
    assert begun[-1] == "renderedsst2"
    few = Workers(evaluate)
    assert len(list(schedule(JOBS[:1], few.start, 8))) == few.started == 1


def test_the_set_of_a_worker_that_died_is_done_again_and_named_where_it_dies_twice() -> None:
    deaths = {"imagenet1k": 1, "stl10": 2}

    def evaluate(number: int, job: Job) -> Outcome | str:
        if deaths.get(job.one.key, 0):
            deaths[job.one.key] -= 1
            raise WorkerLost("The actor died unexpectedly before finishing this task.")
        return "MNIST: bad labels" if job.one.key == "mnist" else outcome_of(job)

    workers = Workers(evaluate)
    found = {job.one.key: outcome for job, outcome in schedule(JOBS, workers.start, 2)}
    assert found["stl10"] == "STL-10: its worker died 2 times: The actor died unexpectedly before finishing this task."
    assert found["mnist"] == "MNIST: bad labels"
    assert {key for key, outcome in found.items() if not isinstance(outcome, str)} == {*KEYS} - {"mnist", "stl10"}
    assert workers.started == 2 + 3, "each dead worker is replaced"

    def refuse(number: int, job: Job) -> Outcome:
        raise UserError("runs/s0: folder runs/s0 does not exist")

    with pytest.raises(UserError, match="runs/s0 does not exist"):
        list(schedule(JOBS, Workers(refuse).start, 2))


def test_the_sets_of_a_lost_node_are_done_by_the_workers_that_are_left() -> None:
    def evaluate(number: int, job: Job) -> Outcome:
        if number == 1:
            raise WorkerLost("The actor died because its node has died.", with_node=True)
        return outcome_of(job)

    workers = Workers(evaluate)
    found = {job.one.key: outcome for job, outcome in schedule(JOBS, workers.start, 2)}
    assert found == {job.one.key: outcome_of(job) for job in JOBS}
    assert workers.started == 2, "a worker that no node can hold would wait without end"


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

    def schedule_and_kill(jobs: Sequence[Job], start: Callable[[], Worker], count: int) -> Any:
        def start_mortal() -> Worker:
            worker = start()

            def work(job: Job) -> Future[Outcome | str]:
                future = worker(job)
                if not killed:
                    killed.append(kill_worker())
                return future

            return work

        return schedule(jobs, start_mortal, count)

    assert command(*words, "--out", "alone")[0] == 0
    monkeypatch.setattr("reinforce.evaluation.suite.run.schedule", schedule_and_kill)
    status, out, err = command(*words, "--out", "workers", "--workers", "2")
    assert status == 0, out + err
    assert len(killed) == 1
    assert "3 sets by 2 workers" in out + err
    assert metrics("workers") == metrics("alone")


def kill_worker() -> int:
    """Kill a process of Ray that evaluates sets -> its id."""
    deadline = time.monotonic() + 600
    while not (found := processes_below(os.getpid(), "ray::_SetWorker")):
        assert time.monotonic() < deadline, "no worker has started"
        time.sleep(0.05)
    os.kill(found[0], signal.SIGKILL)
    return found[0]
