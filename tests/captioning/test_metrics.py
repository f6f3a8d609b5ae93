from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reinforce.captioning.metrics import bleu, cider

REFERENCES = [
    ["a red apple on a table", "an apple"],
    ["a dog with a hat"],
    ["the face of a small cat", "a cat", "a small cat looks"],
]
CAPTIONS = ["a red apple", "a cat with a hat", "a small cat"]


def test_cider_d_equals_that_of_pycocoevalcap() -> None:
    # value of pycocoevalcap 1.2 for the same words (its Cider is CIDEr-D)
    assert cider(CAPTIONS, REFERENCES) == pytest.approx(3.3992980299586297, rel=1e-12)


def test_perfect_captions_have_the_highest_scores() -> None:
    first = [texts[0] for texts in REFERENCES]
    assert bleu(first, REFERENCES) == pytest.approx(1)
    single = [[text] for text in first]
    assert cider(first, single) == pytest.approx(10)


def test_captions_without_common_words_score_zero() -> None:
    captions = ["x y z w v"] * 3
    assert cider(captions, REFERENCES) == 0
    assert bleu(captions, REFERENCES) < 0.05  # smoothed


def test_cider_ignores_case_and_punctuation() -> None:
    assert cider(["A red, apple!", "a CAT with a hat.", "a small cat"], REFERENCES) == cider(CAPTIONS, REFERENCES)


def test_repetition_lowers_cider() -> None:
    padded = [f"{text} {text} {text} {text}" for text in CAPTIONS]
    assert cider(padded, REFERENCES) < cider(CAPTIONS, REFERENCES)


@given(st.lists(st.tuples(st.text("abc ", max_size=20), st.lists(st.text("abc ", max_size=20), min_size=1, max_size=3))
                , min_size=1, max_size=5))  # fmt: skip
def test_scores_are_in_range_for_any_text(rows: list[tuple[str, list[str]]]) -> None:
    captions, references = [text for text, _ in rows], [texts for _, texts in rows]
    assert 0 <= cider(captions, references) <= 10 + 1e-9
    assert 0 <= bleu(captions, references) <= 1 + 1e-9
