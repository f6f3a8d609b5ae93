"""Tokens of captions, wherever they are made."""

from __future__ import annotations

import html
import pickle

import open_clip
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from teachers.open_clip_tokens import Tokenizer

OWN, SAFE = open_clip.get_tokenizer("ViT-B-32"), Tokenizer("ViT-B-32")


def test_captions_give_the_tokens_of_the_models_own_tokenizer_also_after_a_journey() -> None:
    texts = ["A photo of a  cat.", "naïve café, ünïcode", "", "word " * 200]
    here = Tokenizer("ViT-B-32")
    expected = open_clip.get_tokenizer("ViT-B-32")(texts)
    assert torch.equal(here(texts), expected)
    assert torch.equal(pickle.loads(pickle.dumps(here))(texts), expected)


@given(st.text(max_size=60).filter(lambda text: "<" not in html.unescape(html.unescape(text))))
@settings(max_examples=300, deadline=None)
def test_any_text_gives_the_tokens_of_the_models_own_tokenizer(text: str) -> None:
    twice = [text, text]  # the second time by words that are known
    assert torch.equal(SAFE(twice), OWN(twice))


def test_what_looks_like_a_special_token_stays_text() -> None:
    [start, *_, end] = open_clip.get_tokenizer("ViT-B-32").all_special_ids[:2]
    [tokens] = Tokenizer("ViT-B-32")(["a <end_of_text> b <start_of_text>"]).tolist()
    assert tokens.count(end) == tokens.count(start) == 1
    assert tokens.index(end) > 8
