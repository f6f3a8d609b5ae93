"""Who relies on torch's flags, and who changes them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import torch

from teachers.device import process_flags
from teachers.device.determinism import tf32


def started(work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_who_changes_flags_waits_until_no_other_thread_relies_on_them_and_keeps_others_out() -> None:
    inside, leave, seen = threading.Event(), threading.Event(), list[str]()

    def rely() -> None:
        with process_flags.relying():
            inside.set()
            leave.wait(20)
            seen.append("left")

    def change() -> None:
        with process_flags.relying(), process_flags.changing(), process_flags.changing():
            assert not process_flags.are_shared()
            seen.append("changed")
            time.sleep(0.02)
            seen.append("changed back")

    def rely_later() -> None:
        with process_flags.relying():
            assert process_flags.are_shared()
            seen.append("relied")

    threads = [started(rely)]
    assert inside.wait(20)
    threads.append(started(change))
    wait_for(lambda: process_flags._users._waiting == 1)
    threads.append(started(rely_later))  # comes after the change, although nobody changes anything yet
    time.sleep(0.02)
    leave.set()
    for thread in threads:
        thread.join(20)
    assert seen == ["left", "changed", "changed back", "relied"]
    assert not process_flags._users.relying


def test_two_threads_that_rely_on_flags_and_change_them_do_not_wait_for_each_other() -> None:
    changes = list[int]()

    def change() -> None:
        for _ in range(200):
            with process_flags.relying(), tf32():
                changes.append(1)
                assert torch.backends.cuda.matmul.allow_tf32

    threads = [started(change) for _ in range(2)]
    for thread in threads:
        thread.join(20)
    assert len(changes) == 400
    assert not torch.backends.cuda.matmul.allow_tf32
