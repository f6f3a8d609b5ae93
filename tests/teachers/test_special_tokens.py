"""Escaping of special tokens in texts."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from teachers.tokens.special_tokens import special_token_escaper


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(["<s>", "</S>", "<", "s>", "[cls]", "x", " ", "<<s>>"])).map("".join))
def test_every_special_token_is_broken_and_characters_are_kept(text: str) -> None:
    special = ["<s>", "</s>", "[CLS]", "s><", "<"]
    result = special_token_escaper(special)(text)
    assert not any(token.lower() in result.lower() for token in special if len(token) > 1)
    assert result.replace(" ", "") == text.replace(" ", "")
