"""When signals end a training."""

from __future__ import annotations

import signal

import pytest

import reinforce.training.stop
from reinforce.training.stop import Stopped, StopSignal


def test_the_first_signal_counts_and_its_repetition_by_torchrun_is_ignored() -> None:
    stop = StopSignal()
    stop.request(signal.SIGINT)
    stop.request(signal.SIGTERM)
    assert stop.signum == signal.SIGINT


def test_a_later_second_signal_ends_the_training_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reinforce.training.stop, "_REPEAT_SECONDS", 0.0)
    stop = StopSignal()
    stop.request(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        stop.request(signal.SIGINT)


def test_an_interruptible_block_is_ended_by_a_signal_before_or_within_it() -> None:
    stop = StopSignal()
    with pytest.raises(Stopped), stop.interruptible():
        stop.request(signal.SIGTERM)
    with pytest.raises(Stopped), stop.interruptible():
        raise AssertionError("the block was entered")
