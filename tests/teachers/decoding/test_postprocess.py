"""Cleaning of the captions of an image."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from teachers.decoding.postprocess import COUNTS, clean, first_sentence, is_repetitive, shorten
from teachers.spec import Clean


def cleaned(*captions: str, **rules: Any) -> list[str] | None:
    return clean(captions, Clean(**rules))[0]


def counted(*captions: str, **rules: Any) -> dict[str, int]:
    return dict(+clean(captions, Clean(**rules))[1])


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("A cat sits. It is black.", "A cat sits."),
        ("a cat on a mat . a dog .", "a cat on a mat ."),
        ("Is it a cat? No!", "Is it a cat?"),
        ('He says "stop!" and runs. Then he falls.', 'He says "stop!"'),
        ("Dr. Smith or Mr. J. Doe, e.g. at St. Ives. Then.", "Dr. Smith or Mr. J. Doe, e.g. at St. Ives."),
        ("Version 3.5 costs $2.50. Cheap.", "Version 3.5 costs $2.50."),
        ("Wait... what? Yes.", "Wait..."),
        ("猫が座っている。黒い猫だ。", "猫が座っている。"),
        ("no end at all", "no end at all"),
        ("", ""),
    ],
)
def test_first_sentence_ignores_abbreviations_and_numbers(text: str, first: str) -> None:
    assert first_sentence(text) == first


@pytest.mark.parametrize(
    ("text", "rules", "short"),
    [
        ("one two three four", {"words": 3}, "one two three"),
        ("one, two, three - four", {"words": 4}, "one, two, three"),
        ("one two three", {"words": 3}, "one two three"),
        ("one two three", {"characters": 7}, "one two"),
        ("one two three", {"characters": 8}, "one two"),
        ("one two three", {"characters": 13}, "one two three"),
        ("incomprehensibilities", {"characters": 6}, "incomp"),
        ("One two. Three four five six.", {"first_sentence": True, "words": 2}, "One two."),
    ],
)
def test_captions_are_shortened_between_words(text: str, rules: dict[str, Any], short: str) -> None:
    assert shorten(text, Clean(**rules)) == short


REPETITIVE = [
    "a cat a cat a cat a cat",
    "a photo of a cat cat cat",
    "A cat, a cat. A CAT and more",
    "the man in the red coat and the man in the red coat and the man in the red coat and",
]
OTHERS = ["a cat and a cat and a dog", "New York, New York", "very very big", "a a", "", "the cat the dog the bird"]


def test_phrases_three_times_in_a_row_are_repetitive_and_other_repetitions_are_not() -> None:
    assert [text for text in [*REPETITIVE, *OTHERS] if is_repetitive(text)] == REPETITIVE


def test_dropped_captions_are_replaced_by_the_others_in_turn_and_each_rule_can_be_disabled() -> None:
    assert cleaned("a cat", "b b b b", "a dog", "", "c c c c") == ["a cat", "a cat", "a dog", "a dog", "a cat"]
    assert cleaned("a cat", "A cat.", "a cat", "a dog") == ["a cat", "a cat", "a dog", "a dog"]
    assert cleaned("a a a a", " ") is None
    assert cleaned("b b b b", "a cat", "a cat", drop=["duplicates"]) == ["b b b b", "a cat", "b b b b"]
    assert cleaned("b b b b", "a cat", "a cat", drop=["repetitive"]) == ["a cat", "a cat", "a cat"]
    assert cleaned("a cat", "a cat", "a dog", drop=["repetitive"]) == ["a cat", "a cat", "a dog"]


def test_changes_are_counted() -> None:
    counts = counted("  a\ncat ", "a dog runs far", "x x x", "", "A CAT", words=3)
    assert counts == {"captions": 5, "stripped": 1, "cut": 1, "repetitive": 1, "empty": 1, "duplicate": 1}
    assert counted("", "") == {"captions": 2, "empty": 2, "null_rows": 1}


TEXTS = st.lists(st.text(st.sampled_from("ab AB.!?\n\t,猫。"), max_size=30), min_size=1, max_size=8)
RULES = st.builds(
    Clean,
    first_sentence=st.booleans(),
    words=st.none() | st.integers(1, 5),
    characters=st.none() | st.integers(1, 12),
    drop=st.sets(st.sampled_from(["repetitive", "duplicates"])).map(list),
)


@given(TEXTS, RULES)
def test_cleaned_rows_keep_their_length_and_follow_the_rules(captions: list[str], rules: Clean) -> None:
    kept, counts = clean(captions, rules)
    assert set(counts) <= set(COUNTS)
    dropped = counts["empty"] + counts["repetitive"] + counts["duplicate"]
    if kept is None:
        assert dropped == len(captions)
        return
    assert len(kept) == len(captions)
    said = {shorten(re.sub(r"\s+", " ", text).strip(), rules) for text in captions}
    assert set(kept) <= said
    for text in kept:
        assert text == text.strip() != ""
        assert rules.characters is None or len(text) <= rules.characters
        assert rules.words is None or len(text.split()) <= rules.words
        assert not ("repetitive" in rules.drop and is_repetitive(text))
    if "duplicates" in rules.drop:
        times = [kept.count(text) for text in set(kept)]
        assert max(times) - min(times) <= 1, "all are equally frequent"
        assert len(set(kept)) == len(captions) - dropped
    assert clean(kept, rules)[0] == kept or "duplicates" in rules.drop or rules.first_sentence
