"""Lanes of an accelerator."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from reinforce.engine.inference.lanes import Lanes
from reinforce.engine.inference.models import Models
from teachers.device.accelerator import Accelerator
from tests.helpers.models import ColorTeacher, SeedCaptioner


class Use:
    """Threads in lanes."""

    def __init__(self, lanes: Lanes) -> None:
        self.lanes, self.inside = lanes, list[str]()
        self._leave = threading.Event()
        self._threads: list[threading.Thread] = []

    def enter(self, name: str, context: Callable[[], contextlib.AbstractContextManager[None]]) -> None:
        def run() -> None:
            with context():
                self.inside.append(name)
                self._leave.wait(20)
                self.inside.remove(name)

        self._threads.append(threading.Thread(target=run, daemon=True))
        self._threads[-1].start()

    def settled(self, *names: str) -> bool:
        """Whether just these are in lanes, a moment later, too."""
        deadline = time.monotonic() + 20
        while sorted(self.inside) != sorted(names) and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.02)
        return sorted(self.inside) == sorted(names)

    def leave(self) -> None:
        self._leave.set()
        for thread in self._threads:
            thread.join(20)


@contextlib.contextmanager
def users(lanes: Lanes) -> Iterator[Use]:
    use = Use(lanes)
    try:
        yield use
    finally:
        use.leave()


def test_a_teacher_and_a_captioner_run_at_the_same_time_and_two_of_a_kind_do_not() -> None:
    lanes = Lanes(overlap=True)
    with users(lanes) as use:
        use.enter("captions", lambda: lanes.use(1, captioning=True))
        use.enter("teacher", lambda: lanes.use(2))
        assert use.settled("captions", "teacher")
        use.enter("more captions", lambda: lanes.use(1, captioning=True))
        use.enter("another teacher", lambda: lanes.use(1))
        assert use.settled("captions", "teacher")
        assert lanes.waiting == 2


@pytest.mark.parametrize("ended", [False, True])
def test_without_overlap_and_after_its_end_they_take_turns(ended: bool) -> None:
    lanes = Lanes(overlap=ended)
    assert lanes.end_overlap() is ended
    assert not lanes.end_overlap(), "the first call says so"
    with users(lanes) as use:
        use.enter("captions", lambda: lanes.use(1, captioning=True))
        assert use.settled("captions")
        use.enter("teacher", lambda: lanes.use(2))
        assert use.settled("captions")


def test_captions_that_overlap_when_that_ends_keep_others_from_their_lane() -> None:
    lanes = Lanes(overlap=True)
    with users(lanes) as use:
        use.enter("captions", lambda: lanes.use(1, captioning=True))
        assert use.settled("captions")
        lanes.end_overlap()
        use.enter("more captions", lambda: lanes.use(1, captioning=True))
        use.enter("teacher", lambda: lanes.use(1))
        assert use.settled("captions", "teacher")


def test_who_takes_all_lanes_is_alone() -> None:
    lanes = Lanes(overlap=True)
    with users(lanes) as use:
        use.enter("all", lambda: lanes.use_all(1))
        assert use.settled("all")
        use.enter("captions", lambda: lanes.use(1, captioning=True))
        use.enter("teacher", lambda: lanes.use(1))
        assert use.settled("all")


def test_a_cpu_has_one_lane_also_if_a_config_wants_two() -> None:
    accelerator = Accelerator("cpu")
    device = accelerator.device
    models = Models({"red": ColorTeacher(device)}, {"namer": SeedCaptioner(device)}, accelerator)
    models.overlap()
    assert not models.lanes.two
    assert models.device_time is None
