"""tokenizer.json compared with open_clip's own tokenizer."""

from __future__ import annotations

import html
import json
import re
from functools import cache
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import ftfy
import open_clip
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from open_clip.tokenizer import HFTokenizer
from tokenizers import Tokenizer

from reinforce.shipping import tokens
from teachers.open_clip.text import Tokenizer as Reference
from tests.helpers.students import student_folder

NAME = "MobileCLIP2-S0"
ENTITIES = ("&amp;", "&quot;", "&#39;", "&#39", "&copy", "&currency", "&eacute;", "&EACUTE;", "&ast;")
PARTS = (*ENTITIES, "“", "’", "ﬁ", "Ǆ", "Ｑ", "ｶ", "\u00a0", "\u200b", "\r\n", "e\u0301")


@cache
def tokenizers() -> tuple[Tokenizer, Reference]:
    return tokens.convert_tokenizer(NAME), Reference(NAME)


def is_supported(text: str) -> bool:
    """Whether tokens should be equal: not for repaired encodings, rare entities, and entities in texts with a <."""
    if ftfy.fix_text(text) != ftfy.fix_text(text, fix_encoding=False):
        return False
    once = html.unescape(text)  # open_clip unescapes twice
    if any(
        not is_common_number(number) for level in (text, once) for number in re.findall("(?i)&#(x?[0-9a-f]+)", level)
    ):
        return False
    capitals = re.findall("&[A-Z]+;", text)  # known to ftfy and not to HTML
    return "<" not in text or all(html.unescape(entity) != entity for entity in capitals)


def is_common_number(number: str) -> bool:
    """Whether the number of an entity, such as 39 or x27, is converted."""
    digits = re.match("(?i)x[0-9a-f]+|[0-9]*", number)[0].lower()  # type: ignore[index]
    codes = {text for code in tokens._NUMERIC_ENTITIES for text in (f"{code}", f"0{code}", f"x{code:x}", f"x0{code:x}")}
    return digits in codes


def assert_same_tokens(texts: list[str]) -> None:
    converted, reference = tokenizers()
    expected = reference(texts).tolist()
    for text, found, wanted in zip(texts, converted.encode_batch(texts), expected, strict=True):
        assert found.ids == wanted, text


def test_real_texts_have_the_same_tokens_as_in_open_clip() -> None:
    """The texts are descriptions of the installed packages: English, Markdown, code, and names in many languages."""
    described = [found.metadata.get_payload() or found.metadata["Description"] or "" for found in distributions()]
    lines = sorted({line for text in described for line in str(text).splitlines() if line.strip()})
    plain = [line for line in lines if line.isascii() and "&" not in line]
    texts = [*filter(is_supported, [*plain[:: len(plain) // 3500 or 1], *({*lines} - {*plain})])]
    assert len(texts) > 3500
    assert_same_tokens(texts)


#: Without unassigned characters, which depend on each library's version of Unicode.
CHARACTERS = st.characters(codec="utf-8", exclude_categories=["Cn"])


@settings(max_examples=60)
@given(st.lists(st.one_of(st.text(CHARACTERS, max_size=8), st.sampled_from(PARTS)), max_size=8))
def test_random_texts_have_the_same_tokens_as_in_open_clip(parts: list[str]) -> None:
    text = "".join(parts)
    assume(is_supported(text))
    assert_same_tokens([text])


def test_special_tokens_inside_texts_are_plain_text() -> None:
    converted, _ = tokenizers()
    ids = converted.encode("&lt;end_of_text&gt; <START_OF_TEXT> a cat").ids
    assert (ids.count(49406), ids.count(49407)) == (1, 1)
    assert_same_tokens(["<end_of_text>", "&lt;end_of_text&gt; <START_OF_TEXT> a cat", "<<end_of_text>>"])


@pytest.mark.parametrize(
    ("options", "texts"),
    [
        ({}, ["a  photo of\na cat", "“Fish” &amp; chips </s> <S>", "", "a dog " * 30]),
        (
            {"text_cfg": {"tokenizer_kwargs": {"clean": "canonicalize"}}},
            ["A_Cat, (on) a-mat! It's [99%] \\ ~ done.", "snake_case.PY", "ΟΔΟΣ"],
        ),
    ],
)
def test_hugging_face_tokenizers_include_the_cleaning_of_open_clip(
    tmp_path: Path, options: dict[str, Any], texts: list[str]
) -> None:
    name = student_folder(tmp_path, "hf", **options)
    converted, reference = tokens.convert_tokenizer(name), Reference(name)
    assert [text.ids for text in converted.encode_batch(texts)] == reference(texts).tolist()
    assert isinstance(reference._tokenizer, HFTokenizer)
    assert Tokenizer.from_str(converted.to_str()).encode(texts[1]).ids == converted.encode(texts[1]).ids


@pytest.mark.parametrize("options", [{"tokenizer_kwargs": {"strip_sep_token": True}}, {"tokenizer_mode": "clips"}])
def test_tokenizers_that_cannot_be_converted_are_rejected(tmp_path: Path, options: dict[str, Any]) -> None:
    name = student_folder(tmp_path, "hf", text_cfg=options)
    special = json.loads((tmp_path / "tokenizer_config.json").read_text())
    special |= {"sep_token": "</s>", "cls_token": "<s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(special))
    with pytest.raises(ValueError, match=r"cannot be expressed as tokenizer\.json"):
        tokens.convert_tokenizer(name)


@pytest.mark.parametrize("kind", ["vit", "hf"])
def test_texts_in_a_wrong_encoding_are_counted_and_a_literal_special_token_is_refused_unless_it_is_plain_text(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = student_folder(tmp_path, kind)
    converted = tokens.convert_tokenizer(name)
    found = tokens.misread_texts(converted, name)
    assert found is not None
    repaired, own = (Tokenizer.encode(converted, text) for text in ("schön", "schÃ¶n"))
    assert (found.texts, found.different, found.example) == (7, 7, "schÃ¶n")
    assert found.tokens == (sum(repaired.attention_mask), sum(own.attention_mask))
    assert Reference(name)(["schÃ¶n"])[0].tolist() == repaired.ids
    monkeypatch.setattr(tokens, "MISREAD", ("a plain text",))
    assert tokens.misread_texts(converted, name) is None
    monkeypatch.setattr(tokens, "_split_special", lambda special: [])
    if kind == "vit":  # the words of CLIP's vocabulary lack the brackets of other tokenizers
        monkeypatch.setattr(tokens, "Reference", open_clip.get_tokenizer)
    with pytest.raises(ValueError, match=r"cannot be expressed as tokenizer\.json: other tokens for '"):
        tokens.convert_tokenizer(name)
