"""Captions and phrases from Unicode's names, and the selection of concepts."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from reinforce.demo.names import make_phrase, name_emoji, select_concepts
from tests.helpers.demo import read_shards


def test_captions_are_plain_english_of_all_templates(shards: list[Path]) -> None:
    captions = {key: members["txt"].decode() for key, members in read_shards(shards).items()}
    starts = Counter(" ".join(caption.split()[:3]) for caption in captions.values())
    assert all(starts[start] > 100 for start in ("an emoji of", "a picture of", "a small drawing"))
    for key, caption in captions.items():
        assert caption.strip() == caption, key
        assert len(caption) >= 4, key
        assert "_" not in caption, key
        assert not re.search(r"\b[A-Z]{4,}\b", caption), f"{key} has upper-case words: {caption}"
        assert "  " not in caption, key
        assert not re.search(r"\ba (?!one-)[aeio]|\ban [^aeiouAEIOUhSx]", caption), f"{key}: {caption}"


@pytest.mark.parametrize(
    ("name", "short_name", "expected"),
    [
        ("RED APPLE", "apple", "a red apple"),
        ("Western Sahara Flag", "flag-eh", "the flag of Western Sahara"),
        ("Netherlands Flag", "flag-nl", "the flag of the Netherlands"),
        ("WHITE MEDIUM STAR", "star", "a medium star"),
        ("BLACK CAT", "black_cat", "a black cat"),
        ("FAMILY: MAN, WOMAN, GIRL", "man-woman-girl", "a family of a man, a woman and a girl"),
        ("CLOCK FACE ONE OCLOCK", "clock1", "a clock showing one o'clock"),
        ("SQUARED CJK UNIFIED IDEOGRAPH-5272", "u5272", "a square sign with the Japanese character 割"),
        ("NEGATIVE SQUARED AB", "ab", "a square sign that says AB"),
        ("GRAPES", "grapes", "grapes"),
        ("HOURGLASS", "hourglass", "an hourglass"),
        ("UNICORN FACE", "unicorn_face", "a unicorn face"),
    ],
)
def test_unicode_names_become_phrases(name: str, short_name: str, expected: str) -> None:
    assert make_phrase(name, short_name) == expected


def test_skin_tones_flags_letters_families_and_gendered_variants_are_excluded() -> None:
    assert [emoji.key for emoji in name_emoji(["1f44b", "1f44b-1f3fe", "1f3fe", "ffff"])] == ["1f44b"]
    excluded = ["1f1f5-1f1ea", "1f170", "39-20e3", "1f468-1f469-1f467", "1f468-1f680", "1f3c3-2642", "1f44b-1f3fd"]
    assert [concept.emoji.key for concept in select_concepts([*excluded, "1f34e", "1f3c3"])] == ["1f34e", "1f3c3"]


def test_unseen_concepts_depend_only_on_the_key() -> None:
    keys = ["1f34e", "1f600", "1f438", "1f6b2"]
    alone = {key: select_concepts([key])[0].unseen for key in keys}
    assert {concept.emoji.key: concept.unseen for concept in select_concepts(keys)} == alone
    assert set(alone.values()) == {True, False}
