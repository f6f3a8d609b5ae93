"""Figures of captions against hand-counted ones and against sacrebleu."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reinforce.captioning.metrics import bleu
from reinforce.report.texts import DEFINITIONS, Texts


def figures(*images: list[str] | None, count: int = 0) -> dict[str, Any]:
    texts = Texts(count or max(len(image or []) for image in images))
    texts.add(images)
    return texts.figures()


def test_every_figure_is_explained() -> None:
    assert figures(["a cat"]).keys() - {"rows", "captions"} == DEFINITIONS.keys()


def test_distinct_ngrams_are_counted_over_all_captions_and_within_an_image() -> None:
    found = figures(["A cat, a cat.", "a dog"], ["a cat", "the bird sings"])
    # Words: a cat a cat a dog | a cat the bird sings; distinct: a cat dog the bird sings.
    assert found["distinct"]["1"] == pytest.approx(6 / 11)
    # Pairs: a-cat cat-a a-cat a-dog | a-cat the-bird bird-sings; none goes over the end of a caption.
    assert found["distinct"]["2"] == pytest.approx(5 / 7)
    assert found["distinct"]["3"] == pytest.approx(3 / 3)
    assert found["distinct_within_image"]["1"] == pytest.approx([(2 / 4 + 2 / 2) / 2, (3 / 6 + 5 / 5) / 2])
    assert found["distinct_within_image"]["2"] == pytest.approx([(2 / 3 + 1) / 2, (3 / 4 + 1) / 2])
    assert found["distinct_within_image"]["3"] == pytest.approx([1, 1])


def test_lengths_are_in_words() -> None:
    found = figures(["A dog's life - in 3 acts.", ""], ["one two", "one"])
    assert found["lengths"] == {"0": 1, "1": 1, "2": 1, "6": 1}
    assert found["words"] == pytest.approx(9 / 4)


def test_duplicates_are_told_within_and_across_images() -> None:
    found = figures(["a cat", "A cat!", "a dog"], ["a dog", "a bird", "a fish"], ["x", "y", "y"])
    assert found["duplicates_within_image"] == pytest.approx(2 / 9)
    assert found["duplicates_across_images"] == pytest.approx(2 / 9), "both captions `a dog`, and no others"


def test_captions_without_an_end_and_those_cut_midway_are_told_apart() -> None:
    found = figures(
        ["a cat.", 'he says "stop!"', "a cat on the", "a cat"], ["猫です。", "it is of", "a cat and", "so?"]
    )
    assert found["no_end_mark"] == pytest.approx(4 / 8)
    assert found["ends_midway"] == pytest.approx(3 / 8)


def test_rows_without_captions_count_as_null_alone() -> None:
    found = figures(None, ["a cat", "a dog"], None, None)
    assert (found["rows"], found["captions"], found["null"]) == (4, 2, 0.75)
    nothing = figures(None, count=2)
    assert (nothing["null"], nothing["words"], nothing["self_bleu"]) == (1.0, None, None)
    assert nothing["distinct"] == {"1": None, "2": None, "3": None}


def test_self_bleu_is_one_where_all_captions_are_the_same_and_none_where_there_is_one() -> None:
    same = "a photo of a cat"
    assert figures([same] * 3, [same + " and a dog"] * 3)["self_bleu"] == pytest.approx(1)
    assert figures([same], ["another one of these"])["self_bleu"] is None
    assert figures([same, "two dogs run on green grass"])["self_bleu"] < 0.1


WORDS = st.lists(st.sampled_from(["a", "cat", "dog", "sits", "on", "the", "mat."]), min_size=1, max_size=9).map(
    " ".join
)


@given(st.lists(st.lists(WORDS, min_size=3, max_size=3), min_size=1, max_size=6), st.integers(0, 6))
def test_figures_of_a_sample_are_those_of_its_parts_together(images: list[list[str]], cut: int) -> None:
    whole, parts = Texts(3), Texts(3)
    whole.add(images)
    parts.add(images[:cut])
    parts.add(images[cut:])
    assert parts.figures() == whole.figures()
    captions = [text for image in images for text in image]
    others = [[text for j, text in enumerate(image) if j != i] for image in images for i in range(3)]
    assert whole.figures()["self_bleu"] == pytest.approx(bleu(captions, others))
