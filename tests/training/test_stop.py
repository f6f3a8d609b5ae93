"""When a signal ends a training."""

from __future__ import annotations

import signal

import pytest

import reinforce.training.stop
from reinforce.training.stop import Stopped, StopSignal


def test_the_first_signal_is_remembered_and_its_echo_is_not_a_second_one() -> None:
    stop = StopSignal()
    stop.request(signal.SIGINT)
    stop.request(signal.SIGTERM)
    assert stop.signum == signal.SIGINT


def test_a_second_signal_ends_it_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reinforce.training.stop, "_REPEAT_SECONDS", 0.0)
    stop = StopSignal()
    stop.request(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        stop.request(signal.SIGINT)


def test_where_all_is_saved_a_signal_ends_the_work_at_once_before_or_within() -> None:
    stop = StopSignal()
    with pytest.raises(Stopped), stop.interruptible():
        stop.request(signal.SIGTERM)
    with pytest.raises(Stopped), stop.interruptible():
        raise AssertionError("the work began")
