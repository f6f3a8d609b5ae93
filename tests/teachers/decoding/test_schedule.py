"""Which images enter a decoder when, by the lengths of their texts alone."""

from __future__ import annotations

import numpy as np
import pytest

from teachers.decoding.schedule import Schedule

NATURAL = 6 + np.random.default_rng(0).poisson(7, (650, 5)).clip(max=21)
SKEWED = 6 + np.random.default_rng(1).geometric(1 / 8, (650, 5)).clip(max=21)


def steps_of(lengths: np.ndarray, rows: int, places: int) -> list[int]:
    """The number of texts in each step of a decoder whose texts have these lengths, [images, captions]."""
    images, captions = lengths.shape
    schedule = Schedule(images, captions, rows, places)
    place_of, left, tokens = np.full(rows, places), np.zeros(rows, int), np.zeros(rows, int)
    active, entered = [], []
    while True:
        if (entry := schedule.enter()) is not None:
            assert (left[entry.rows] == 0).all(), "a text has lost its row"
            assert not {*entry.places} & {*place_of[left > 0]}, "two images share a place"
            place_of = entry.place_of
            left[entry.rows], tokens[entry.rows] = lengths.reshape(-1)[entry.captions], 0
            entered += entry.captions.tolist()
            np.testing.assert_array_equal(place_of[entry.rows], entry.places.repeat(captions))
        active.append(int((left > 0).sum()))
        if not schedule.waiting and not active[-1]:
            break
        assert schedule.longest >= tokens[left > 0].max(initial=0), "attention would not see all of the longest text"
        left, tokens = (left - 1).clip(min=0), tokens + 1
        schedule.advance(left == 0)
    assert entered == [*range(images * captions)], "images enter in their order, each once"
    assert sum(active) == lengths.sum()
    return active[:-1]


@pytest.mark.parametrize("captions", [1, 2, 5])
@pytest.mark.parametrize("images", [1, 3, 40])
def test_each_image_enters_once_in_order_in_rows_and_a_place_that_are_free(images: int, captions: int) -> None:
    lengths = np.random.default_rng(images).integers(1, 9, (images, captions))
    lengths[0] = 1  # ends at the first step
    steps_of(lengths, 16, 16 // captions)
    assert Schedule(0, captions, 16, 16 // captions).enter() is None, "no images take no steps"


@pytest.mark.parametrize("lengths", [NATURAL, SKEWED], ids=["natural", "skewed"])
def test_rows_stay_full_until_the_last_images_so_that_the_tail_costs_under_a_fifth(lengths: np.ndarray) -> None:
    active = np.array(steps_of(lengths, 640, 160))
    alone = sum(int(part.max()) for part in np.split(lengths, range(128, 650, 128)))  # steps of batches of 128 images
    assert len(active) < 0.65 * alone
    tail = active < 640 / 2
    cost = 400 + np.maximum(active, 16)  # a step of few rows costs less than half of one of 640
    assert cost[tail].sum() < 0.2 * cost.sum()
    assert active[~tail].mean() > 0.85 * 640 if lengths is NATURAL else 0.75 * 640
