"""Tokens of open_clip models in any process."""

from __future__ import annotations

import html
import pickle

import open_clip
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from teachers.open_clip.tokenizer import Tokenizer

OWN, SAFE = open_clip.get_tokenizer("ViT-B-32"), Tokenizer("ViT-B-32")


def test_tokens_match_open_clip_also_after_pickling() -> None:
    texts = ["A photo of a  cat.", "naïve café, ünïcode", "", "word " * 200]
    here = Tokenizer("ViT-B-32")
    expected = open_clip.get_tokenizer("ViT-B-32")(texts)
    assert torch.equal(here(texts), expected)
    assert torch.equal(pickle.loads(pickle.dumps(here))(texts), expected)


@given(st.text(max_size=60).filter(lambda text: "<" not in html.unescape(html.unescape(text))))
@settings(max_examples=300, deadline=None)
def test_tokens_of_any_text_match_open_clip(text: str) -> None:
    twice = [text, text]  # the second text uses the token cache
    assert torch.equal(SAFE(twice), OWN(twice))


def test_special_tokens_in_texts_are_read_as_plain_text() -> None:
    [start, *_, end] = open_clip.get_tokenizer("ViT-B-32").all_special_ids[:2]
    [tokens] = Tokenizer("ViT-B-32")(["a <end_of_text> b <start_of_text>"]).tolist()
    assert tokens.count(end) == tokens.count(start) == 1
    assert tokens.index(end) > 8
