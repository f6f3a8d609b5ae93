"""tokenizer.json beside open_clip's own tokenizer."""

from __future__ import annotations

import html
import json
import re
from functools import cache
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import ftfy
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from open_clip.tokenizer import HFTokenizer
from tokenizers import Tokenizer

from reinforce.shipping import tokens
from teachers.open_clip_tokens import Tokenizer as Reference
from tests.helpers.students import student_folder

NAME = "MobileCLIP2-S0"
ENTITIES = ("&amp;", "&quot;", "&#39;", "&#39", "&copy", "&currency", "&eacute;", "&EACUTE;")
PARTS = (*ENTITIES, "“", "’", "ﬁ", "Ǆ", "Ｑ", "ｶ", "\u00a0", "\u200b", "\r\n", "e\u0301")


@cache
def both() -> tuple[Tokenizer, Reference]:
    return tokens.shipped(NAME), Reference(NAME)


def told_by_tables(text: str) -> bool:
    """What was decoded wrongly is repaired by open_clip alone, in any round; it reads no entity beside a <."""
    if ftfy.fix_text(text) != ftfy.fix_text(text, fix_encoding=False):
        return False
    capitals = re.findall("&[A-Z]+;", text)  # which ftfy knows and HTML does not
    return "<" not in text or all(html.unescape(entity) != entity for entity in capitals)


def agree(texts: list[str]) -> None:
    made, reference = both()
    expected = reference(texts).tolist()
    for text, found, wanted in zip(texts, made.encode_batch(texts), expected, strict=True):
        assert found.ids == wanted, text


def test_real_texts_have_the_tokens_of_open_clip() -> None:
    """The descriptions of what is installed here: English, Markdown, code, names of people from all over the world."""
    described = [found.metadata.get_payload() or found.metadata["Description"] or "" for found in distributions()]
    lines = {line for text in described for line in str(text).splitlines() if line.strip()}
    texts = sorted(filter(told_by_tables, lines))
    assert len(texts) > 3000
    agree(texts[:: len(texts) // 3000])
    agree([text for text in texts if not text.isascii() or "&" in text])


#: Without what is no character in some version of Unicode: libraries know different ones.
CHARACTERS = st.characters(codec="utf-8", exclude_categories=["Cn"])


@settings(max_examples=150, deadline=None)
@given(st.lists(st.one_of(st.text(CHARACTERS, max_size=8), st.sampled_from(PARTS)), max_size=8))
def test_any_text_has_the_tokens_of_open_clip(parts: list[str]) -> None:
    text = "".join(parts)
    assume(told_by_tables(text))
    agree([text])


def test_special_tokens_within_texts_are_text() -> None:
    made, _ = both()
    ids = made.encode("&lt;end_of_text&gt; <START_OF_TEXT> a cat").ids
    assert (ids.count(49406), ids.count(49407)) == (1, 1)
    agree(["<end_of_text>", "&lt;end_of_text&gt; <START_OF_TEXT> a cat", "<<end_of_text>>"])


def test_tokenizers_of_hugging_face_are_shipped_with_what_open_clip_does_before(tmp_path: Path) -> None:
    name = student_folder(tmp_path, "hf")
    made, reference = tokens.shipped(name), Reference(name)
    texts = ["a  photo of\na cat", "“Fish” &amp; chips </s> <S>", "", "a dog " * 30]
    assert [text.ids for text in made.encode_batch(texts)] == reference(texts).tolist()
    assert Tokenizer.from_str(made.to_str()).encode(texts[1]).ids == made.encode(texts[1]).ids


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"tokenizer_kwargs": {"strip_sep_token": True}}, "does what a tokenizer.json cannot say"),
        ({"tokenizer_mode": "clips"}, "does what a tokenizer.json cannot say"),
    ],
)
def test_a_tokenizer_that_cannot_be_shipped_is_told(tmp_path: Path, options: dict[str, Any], told: str) -> None:
    name = student_folder(tmp_path, "hf", text_cfg=options)
    special = json.loads((tmp_path / "tokenizer_config.json").read_text())
    special |= {"sep_token": "</s>", "cls_token": "<s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(special))
    with pytest.raises(ValueError, match=told):
        tokens.shipped(name)


def test_canonical_texts_are_cleaned_as_open_clip_cleans_them(tmp_path: Path) -> None:
    name = student_folder(tmp_path, "hf", text_cfg={"tokenizer_kwargs": {"clean": "canonicalize"}})
    made, reference = tokens.shipped(name), Reference(name)
    texts = ["A_Cat, (on) a-mat! It's [99%] \\ ~ done.", "snake_case.PY", "ΟΔΟΣ"]
    assert [text.ids for text in made.encode_batch(texts)] == reference(texts).tolist()
    assert isinstance(reference._tokenizer, HFTokenizer)
