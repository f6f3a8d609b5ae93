"""The order of samples: every one once per epoch, equal streams, and random access to any position."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reinforce.training.order import BLOCK, Mixture, Order, places, share

groups = st.lists(st.integers(0, 12), min_size=1, max_size=12).filter(any)
streams = st.integers(1, 9)
windows = st.integers(1, 40)


def rows_of(order: Order, stream: int, position: int = 0) -> Iterator[tuple[int, int, int]]:
    """(epoch, row group, row) of a stream's samples, beginning at a position."""
    for window in order.windows(stream, position):
        rows = [(window.epoch, c.group, row) for c in window.chunks for row in range(c.first, c.stop)]
        yield from (rows[i] for i in window.order[window.skip : window.stop])


@given(groups, streams, windows)
@settings(max_examples=50)
def test_every_row_comes_once_per_epoch_and_streams_are_equal(rows: list[int], count: int, window: int) -> None:
    order = Order(rows, 7, "d", count, window)
    epochs = 3
    lengths = [order.before(s, epochs) for s in range(count)]
    assert sum(lengths) == epochs * sum(rows)
    assert max(lengths) - min(lengths) <= 1
    seen = Counter(row for s in range(count) for row in itertools.islice(rows_of(order, s), lengths[s]))
    assert seen == Counter((e, g, row) for e in range(epochs) for g, n in enumerate(rows) for row in range(n))


@given(groups, streams, windows, st.integers(1, 40))
@settings(max_examples=100)
def test_a_batch_has_rows_of_one_epoch_and_no_row_twice(rows: list[int], count: int, window: int, batch: int) -> None:
    order = Order(rows, 7, "d", count, window, batch)
    readers = [rows_of(order, stream) for stream in range(count)]
    seen = Counter[tuple[int, int, int]]()
    for step in range(3 * max(1, sum(rows) // batch)):
        due = [share(batch * (step + 1), count, s) - share(batch * step, count, s) for s in range(count)]
        found = [row for reader, n in zip(readers, due, strict=True) for row in itertools.islice(reader, n)]
        assert len(found) == batch
        if sum(rows) >= batch:
            assert len({*found}) == batch
            assert {epoch for epoch, _, _ in found} == {step // (sum(rows) // batch)}
            seen.update(found)
    assert {*seen.values()} <= {1}


@given(groups, streams, windows, st.integers(0, 150), st.integers(1, 40))
@settings(max_examples=50)
def test_a_stream_can_start_at_any_position(
    rows: list[int], count: int, window: int, position: int, batch: int
) -> None:
    order = Order(rows, 7, "d", count, window, batch)
    stream = position % count
    whole = list(itertools.islice(rows_of(order, stream), position + 20))
    assert list(itertools.islice(rows_of(order, stream, position), 20)) == whole[position:]


@given(groups, streams, windows)
@settings(max_examples=50)
def test_windows_are_whole_chunks_of_about_the_given_rows(rows: list[int], count: int, window: int) -> None:
    order = Order(rows, 7, "d", count, window)
    for found in itertools.islice(order.windows(0), 20):
        before_last = sum(chunk.rows for chunk in found.chunks[:-1])
        assert before_last < window, "a reader with fewer rows than a window in memory may load the next chunk"
        assert sorted(found.order) == list(range(before_last + found.chunks[-1].rows))


def test_epochs_windows_and_seeds_are_shuffled_differently_and_never_change() -> None:
    order, other = Order([50] * 4, 7, "d", 1, 200), Order([50] * 4, 8, "d", 1, 200)
    first, second = itertools.islice(order.windows(0), 2)
    [elsewhere] = itertools.islice(other.windows(0), 1)
    assert len({tuple(w.order) for w in (first, second, elsewhere)}) == 3
    assert len({tuple(c.group for c in next(order.windows(0, 200 * e)).chunks) for e in range(8)}) > 1
    assert sorted(first.order) != list(first.order)
    # Trainings must resume after an upgrade: these numbers are frozen.
    order = Order([3, 4, 5], 1, "dataset 0", 2, 100)
    rows = [(group, row) for _, group, row in itertools.islice(rows_of(order, 1), 6)]
    assert rows == [(2, 0), (2, 3), (2, 4), (2, 2), (1, 3), (2, 1)]
    assert list(itertools.islice(Mixture([1, 3], 0).draws(0, 0), 8)) == [0, 1, 1, 0, 0, 1, 1, 0]
    with pytest.raises(ValueError, match="at least one row"):
        Order([0, 0], 0, "d", 1, 1)


@given(st.lists(st.floats(0.001, 1000), min_size=1, max_size=5), st.integers(0, 25_000))
@settings(max_examples=30)
def test_datasets_are_drawn_by_weight_beginning_at_any_position(weights: list[float], position: int) -> None:
    mixture = Mixture(weights, 3)
    drawn = list(itertools.islice(mixture.draws(1, 0), position + 50))
    assert list(itertools.islice(mixture.draws(1, position), 50)) == drawn[position:]
    assert mixture.before(1, position) == [drawn[:position].count(d) for d in range(len(weights))]
    exact = np.array(weights) / sum(weights) * BLOCK
    assert mixture.quota.sum() == BLOCK
    assert (np.abs(mixture.quota - exact) <= len(weights)).all()


def rows_of_parts(batch: int, step: int, count: int, processes: int) -> list[tuple[int, int]]:
    """(stream, row) of a step's samples, in the order in which so many processes read them."""
    read = [stream for process in range(processes) for stream in range(process, count, processes)]
    ends = [(share(batch * step, count, s), share(batch * (step + 1), count, s)) for s in range(count)]
    return [(stream, row) for stream in read for row in range(*ends[stream])]


@given(st.integers(1, 30), st.integers(0, 1000), st.integers(1, 5), st.integers(1, 5))
def test_rows_of_a_batch_have_one_order_however_many_processes_read_them(
    batch: int, step: int, each: int, processes: int
) -> None:
    """So many processes read ``each`` streams."""
    count = each * processes
    read = rows_of_parts(batch, step, count, processes)
    found = places(batch, step, count, processes)
    ordered = read if found is None else [row for _, row in sorted(zip(found.tolist(), read, strict=True))]
    assert ordered == rows_of_parts(batch, step, count, 1)
