"""Loader processes and streams that a config leaves open."""

from __future__ import annotations

from typing import Any

import pytest

from reinforce.student.config import Data
from reinforce.student.data.reading import plan_reading


def plan(
    ranks: int = 1, batch: int = 64, start: int = 0, loaders: int = 8, recorded: int | None = None, **data: Any
) -> tuple[int, int | None, bool]:
    """Loader processes, streams, and whether there is a note."""
    reading = plan_reading(Data.model_validate({"datasets": "d", **data}), ranks, batch, start, loaders, recorded)
    return reading.loaders, reading.streams, reading.note is not None


def test_a_new_training_has_the_processes_that_suit_the_machine_and_a_stream_for_each() -> None:
    assert plan(loaders=1) == (1, 1, False)
    assert plan(ranks=2, loaders=8) == (8, 16, False)
    assert plan(batch=3, loaders=8) == (3, 3, False), "a process needs a sample of each batch"


def test_given_numbers_are_obeyed() -> None:
    assert plan(ranks=2, workers=3) == (3, 6, False)
    assert plan(ranks=2, workers=0) == (0, 2, False)
    assert plan(ranks=2, workers=3, streams=12) == (3, 12, False)
    assert plan(start=5, workers=3) == (3, 3, False), "an old checkpoint, continued as before"


def test_processes_divide_the_streams() -> None:
    assert plan(ranks=2, streams=12, loaders=8) == (6, 12, False)
    assert plan(ranks=2, streams=10, loaders=4) == (1, 10, False)


@pytest.mark.parametrize("loaders", [1, 2, 3, 8])
def test_a_resumed_training_keeps_its_streams_on_another_machine(loaders: int) -> None:
    workers, streams, note = plan(start=5, loaders=loaders, recorded=8)
    assert (streams, note) == (8, False)
    assert 8 % workers == 0
    assert 1 <= workers <= loaders


def test_a_checkpoint_without_a_record_is_continued_with_the_default_of_its_time() -> None:
    assert plan(ranks=2, start=5) == (1, 2, True)
    assert plan(ranks=2, start=5, streams=4) == (2, 4, False)


def test_another_order_after_a_resume_is_reported() -> None:
    assert plan(start=5, recorded=8, workers=4) == (4, 8, False)
    assert plan(start=5, recorded=8, workers=3) == (3, 3, True)
    assert plan(ranks=3, start=5, recorded=8, loaders=2) == (2, 6, True)
