"""Labels and captions of samples."""

from __future__ import annotations

import json

import pytest

from reinforce.config import Limits
from reinforce.evaluation.fields import is_json_field, read_captions, read_json_field, read_label


@pytest.mark.parametrize(
    ("sidecars", "field", "label"),
    [
        ({"cls": b"7\n"}, "cls", 7),
        ({"cls": b"red"}, "cls", "red"),
        ({"cls": b" "}, "cls", None),
        ({}, "cls", None),
        ({"json": b'{"class": 7}'}, "json:class", 7),
        ({"json": b'{"class": "7"}'}, "json:class", "7"),
        ({"json": b'{"class": true}'}, "json:class", None),
        ({"json": b'{"class": 7.0}'}, "json:class", None),
        ({"json": b'{"other": 7}'}, "json:class", None),
        ({"json": b"[7]"}, "json:class", None),
    ],
)
def test_label_is_an_index_or_a_name(sidecars: dict[str, bytes], field: str, label: int | str | None) -> None:
    assert read_label(sidecars, field) == label


@pytest.mark.parametrize(
    ("fields", "captions"),
    [
        (["txt"], ("a dog a cat  a dog",)),
        (["lines:txt"], ("a dog", "a cat")),
        (["json:texts"], ("one", "two")),
        (["json:text"], ("three",)),
        (["json:number", "absent", "lines:absent", "json:text"], ("three",)),
        (["json:number"], ()),
    ],
)
def test_captions_come_from_the_first_field_that_has_any(fields: list[str], captions: tuple[str, ...]) -> None:
    document = {"texts": ["one", " two\n", "one", "", 3], "text": "three", "number": 4}
    sidecars = {"txt": b"a dog\na cat\n\na dog\n", "json": json.dumps(document).encode()}
    assert read_captions(sidecars, fields, Limits()) == captions


def test_json_fields_are_recognised_and_read() -> None:
    assert is_json_field("json:group")
    assert not any(map(is_json_field, ("groups.json", None, {"json:a": "b"})))
    assert read_json_field({"json": b'{"a": {"b": [1]}}'}, "json:a") == {"b": [1]}
    assert read_json_field({"json": b"no JSON"}, "json:a") is None
