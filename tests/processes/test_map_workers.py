"""Maps over items in this process, in processes and on Ray: faults cost attempts, and nothing is lost or repeated."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import RayError

from reinforce.errors import StorageError, UserError
from reinforce.processes.parallel import MapWorkers, WorkerLost, _future_of, open_workers
from tests.helpers.waiting import wait_for


def length(folder: str, shard: str) -> int:
    """The length of a name. The first call for ``three`` fails as storage does, for ``dies`` by a kill."""
    first = Path(folder, shard)
    if shard == "bad":
        raise UserError("the dataset is damaged")
    if shard == "killer":
        os.kill(os.getpid(), signal.SIGKILL)
    if shard in ("three", "dies") and not first.exists():
        first.touch()
        if shard == "three":
            raise StorageError("no answer.")
        os.kill(os.getpid(), signal.SIGKILL)
    return len(shard)


@pytest.fixture(params=["here", "processes", "ray"])
def workers(request: pytest.FixtureRequest) -> Iterator[MapWorkers]:
    if request.param == "ray":
        request.getfixturevalue("ray_session")
    with open_workers(use_ray=request.param == "ray", processes=1 if request.param == "here" else 2) as opened:
        yield opened


def test_each_item_has_its_result_and_an_error_of_the_user_ends_the_map(tmp_path: Path, workers: MapWorkers) -> None:
    function = functools.partial(length, str(tmp_path))
    items = ["a", "bc", "three"]
    assert sorted(workers.map(function, items, unit="shard")) == [("a", 1), ("bc", 2), ("three", 5)]
    assert list(workers.map(function, iter(items), ordered=True)) == [("a", 1), ("bc", 2), ("three", 5)]
    with pytest.raises(UserError, match=r"^the dataset is damaged$"):
        list(workers.map(function, ["bad", "bad"]))
    assert list(workers.map(function, [])) == []


def test_storage_that_always_fails_ends_with_the_remedy() -> None:
    def fail(shard: str) -> None:
        raise StorageError("s3 does not answer.")

    with pytest.raises(UserError, match=r"s3 does not answer. Run the same command again to resume"):
        list(MapWorkers().map(fail, ["a"]))


def test_an_item_whose_process_is_killed_is_computed_by_another_and_named_if_it_kills_each(
    tmp_path: Path, ray_session: None, caplog: pytest.LogCaptureFixture
) -> None:
    function = functools.partial(length, str(tmp_path))
    items = ["a", "dies", "bc", "d", "e"]
    for use_ray in (False, True):
        (tmp_path / "dies").unlink(missing_ok=True)
        caplog.clear()
        with open_workers(use_ray=use_ray, processes=2) as workers:
            found = list(workers.map(function, items, ordered=True))
            assert found == [(item, len(item)) for item in items]
            assert [record.getMessage().partition(" failed")[0] for record in caplog.records] == ["dies: attempt 1"]
            with pytest.raises(UserError, match=r"^killer: .*, 3 times. Add memory\.$"):
                list(workers.map(function, ["a", "killer", "bc"], fix="Add memory."))
            named = dict(workers.map(function, ["a", "killer", "bc"], lost=lambda item, reason: reason))
            assert str(named.pop("killer")).startswith("killer: ")
            assert named == {"a": 1, "bc": 2}


class Threads(MapWorkers):
    """Workers that are threads."""

    def __init__(self, count: int) -> None:
        super().__init__(count)
        self.pool = self.enter_context(ThreadPoolExecutor(count))

    def _call(self, worker: Any, function: Callable[[Any], Any], item: Any) -> Future[Any]:
        return self.pool.submit(function, item)


def test_items_begin_in_their_order_side_by_side_and_results_come_as_they_end() -> None:
    both, begun = threading.Barrier(2), []

    def evaluate(item: int) -> int:
        begun.append(item)
        if item < 2:
            both.wait(600)  # passes only if another worker runs at the same time
        if item == 1:
            done.wait(600)
        return item

    done = threading.Event()
    with Threads(2) as workers:
        found = workers.map(evaluate, range(5))
        first = [next(found)[0] for _ in range(4)]
        done.set()
        assert (first, [item for item, _ in found]) == ([0, 2, 3, 4], [1])
    assert begun[2:] == [2, 3, 4]


def test_results_in_order_are_computed_ahead_within_bounds() -> None:
    taken: list[int] = []
    go_on = threading.Event()

    def items() -> Iterator[int]:
        for number in range(100):
            taken.append(number)
            yield number

    def wait_for_first(item: int) -> int:
        return item if item or go_on.wait(600) else -1

    with Threads(3) as workers:
        found = workers.map(wait_for_first, items(), ordered=True)
        threading.Timer(1.0, go_on.set).start()
        assert next(found) == (0, 0)
        assert len(taken) <= 2 * 3
        assert [item for item, _ in found] == [*range(1, 100)]


def test_a_worker_that_is_lost_at_each_attempt_costs_the_item_alone() -> None:
    lost: list[int] = []

    def evaluate(item: int) -> int:
        if item == 2:
            lost.append(item)
            raise WorkerLost("the node was lost", for_good=True)
        return item

    with Threads(2) as workers:
        found = dict(workers.map(evaluate, range(5), name="item {}".format, lost=lambda item, reason: reason))
    assert found == {0: 0, 1: 1, 2: "item 2: the node was lost, 3 times", 3: 3, 4: 4}
    assert workers.limit() == 1, "the last worker is replaced"
    assert lost == [2, 2, 2]


def test_an_error_of_ray_without_a_text_is_a_lost_worker_too() -> None:
    class Ref:
        def future(self) -> Future[Any]:
            future: Future[Any] = Future()
            future.set_exception(RayError())
            return future

    with pytest.raises(WorkerLost, match="RayError"):
        _future_of(Ref()).result(60)


MAIN = """
import signal, time
from reinforce.processes.parallel import open_workers
signal.signal(signal.SIGINT, signal.default_int_handler)  # a program in the background of a shell ignores it
with open_workers(use_ray=False, processes=2) as workers:
    print([found for _, found in workers.map(str.upper, ["a", "b", "c"], ordered=True)], flush=True)
    list(workers.map(time.sleep, [600, 600]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_processes_end_with_their_parent_and_do_not_run_its_program_again(tmp_path: Path, number: int) -> None:
    (tmp_path / "main.py").write_text(MAIN)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    parent = subprocess.Popen(
        [sys.executable, str(tmp_path / "main.py")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    )
    assert parent.stdout is not None
    assert parent.stdout.readline() == b"['A', 'B', 'C']\n"
    time.sleep(0.5)
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
    assert len(children) == 2
    parent.send_signal(number)
    out, _ = parent.communicate(timeout=60)
    wait_for(lambda: not any(Path(f"/proc/{child}").exists() for child in children), seconds=60)
    assert (out, parent.returncode) == (b"", -number)
