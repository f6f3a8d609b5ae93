"""The caption policy: captions and metadata of any bytes, beside the defects that tests/hostile/texts.py has."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reinforce.input_config import Input, Limits
from reinforce.source.captions import caption_of, metadata_of, why_no_caption

LIMITS = Limits()
FIELDS = Input().captions


def caption(data: bytes, limits: Limits = LIMITS) -> str | None:
    return caption_of({"txt": data}, ["txt"], limits)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"  a  cat\t\r\n", "a  cat"),
        (b"a\ncat\x00\x1b\x7f on\xc2\x85mats", "a cat    on mats"),
        ("\ufeffein Käse 🧀".encode(), "ein Käse 🧀"),
        (b"\xfe\xff" + "Käse".encode("utf-16-be"), "Käse"),
        ("a\u3000b\u3000".encode(), "a\u3000b"),
        (b"\xef\xbb\xbf", None),
    ],
)
def test_captions_are_cleaned(data, text):
    assert caption(data) == text


def test_long_captions_are_cut_and_trimmed_and_lone_surrogates_replaced():
    assert caption("ä".encode() * 3000) == "ä" * 2000
    assert caption(b"  abc  def", Limits(caption_chars=4)) == "abc"
    data = rb'{"caption": "\ud83d\ude00 \ud83d x"}'
    assert caption_of({"json": data}, FIELDS, LIMITS) == "😀 \ufffd x"


def test_the_first_field_with_text_is_used():
    sidecars = {"txt": b" ", "json": b'{"caption": "from json", "alt": 5}', "en.txt": b"english"}
    assert caption_of(sidecars, FIELDS, LIMITS) == "from json"
    assert caption_of(sidecars | {"txt": b"from txt"}, FIELDS, LIMITS) == "from txt"
    assert caption_of(sidecars, ["json:alt", "json:none", "cls", "en.txt"], LIMITS) == "english"
    assert caption_of({}, FIELDS, LIMITS) is None


def test_json_of_900_levels_is_used_with_every_python():
    deep = {levels: b'{"a":' + b"[" * (levels - 1) + b"]" * (levels - 1) + b"}" for levels in (900, 901)}
    assert metadata_of({"json": deep[900]}, "all") == deep[900].decode()
    assert metadata_of({"json": deep[901]}, "all") is None
    wide = b'{"a":[' + b",".join([b"[]"] * 2000) + b"]}"
    assert metadata_of({"json": wide}, "all") == wide.decode()


def test_metadata_is_compact_json_in_the_original_order():
    data = {"json": '{"b": 1, "a": {"z": [1, 2.50]}, "big": 1180591620717411303424, "ü": "日"}'.encode()}
    assert metadata_of(data, "all") == '{"b":1,"a":{"z":[1,2.5]},"big":1180591620717411303424,"ü":"日"}'
    assert metadata_of(data, ["a", "b", "absent"]) == '{"a":{"z":[1,2.5]},"b":1}'
    assert metadata_of(data, ["absent"]) is None
    assert metadata_of(data, "none") is None
    assert metadata_of({}, "all") is None


TEXTS = st.text(st.characters())  # surrogates included


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=10,
)


@given(st.dictionaries(TEXTS, JSON, max_size=4), st.booleans())
def test_any_json_object_becomes_valid_json_with_the_same_values(document, ascii_only):
    data = json.dumps(document, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    text = metadata_of({"json": data}, "all")
    assert text is not None
    text.encode("utf-8")
    again = json.loads(text, parse_constant=pytest.fail)
    if "\\u" not in json.dumps(document) and not re.search("NaN|Infinity", json.dumps(document)):
        assert again == document


@pytest.mark.parametrize(
    ("sidecars", "members", "expected"),
    [
        ({"json": b"{}"}, ["png", "json"], ".txt, json:caption (no such field); the sample has .json, .png"),
        ({"txt": b" "}, ["png", "txt"], ".txt (empty), json:caption; the sample has .png, .txt"),
        ({"json": b"["}, ["png", "json"], ".txt, json:caption (not a JSON object); the sample has .json, .png"),
        ({"json": b'{"caption": 5}'}, ["json"], ".txt, json:caption (empty, or not a text); the sample has .json"),
        ({}, ["png", "txt"], ".txt (not read), json:caption; the sample has .png, .txt"),
        ({}, ["caption", "png"], ".txt, json:caption; the sample has .caption, .png"),
    ],
)
def test_a_missing_caption_is_explained_by_where_it_was_looked_for_and_what_is_there(sidecars, members, expected):
    assert caption_of(sidecars, FIELDS, LIMITS) is None
    assert why_no_caption(sidecars, FIELDS, members) == f"no caption: looked for {expected}"
