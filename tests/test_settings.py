"""Configs in general: errors name the key, however deeply its section is nested."""

from __future__ import annotations

from typing import Annotated

import pytest
from pydantic import BeforeValidator, Field

from reinforce import settings
from reinforce.errors import UserError
from reinforce.settings import Section, flatten


class Leaf(Section):
    size: int = 1
    lambda_: float = Field(1.0, alias="lambda")


class Root(Section):
    name: str
    one: Leaf = Leaf()
    many: list[Leaf] = Field(default_factory=list)
    named: dict[str, Leaf] = Field(default_factory=dict)
    maybe: Leaf | None = None
    either: str | list[str] = "a"
    wrapped: Annotated[list[Leaf], BeforeValidator(lambda v: v if isinstance(v, list) else [v])] = Field(
        default_factory=list
    )


@pytest.mark.parametrize("section", ["one", "maybe"])
def test_a_misspelt_key_is_reported_with_the_known_ones(section: str) -> None:
    with pytest.raises(UserError, match=f"{section}.sise: unknown key; known keys here: size, lambda"):
        settings.parse(Root, {"name": "n", section: {"sise": 2}})


@pytest.mark.parametrize(
    ("data", "place"),
    [
        ({"many": [{}, {"sise": 2}]}, "many.1.sise"),
        ({"named": {"x": {"sise": 2}}}, "named.x.sise"),
        ({"wrapped": {"sise": 2}}, "wrapped.0.sise"),
    ],
)
def test_errors_name_indices_of_lists_and_keys_of_mappings(data: dict[str, object], place: str) -> None:
    with pytest.raises(UserError, match=f"{place}: unknown key; known keys here: size, lambda"):
        settings.parse(Root, {"name": "n", **data})


def test_a_wrong_type_in_a_union_is_reported_at_its_key() -> None:
    with pytest.raises(UserError) as caught:
        settings.parse(Root, {"name": "n", "either": 3})
    assert all(line.strip().startswith("either:") for line in str(caught.value).splitlines()[1:])


def test_an_alias_is_accepted_as_the_key() -> None:
    assert settings.parse(Root, {"name": "n", "one": {"lambda": 0.5}}).one.lambda_ == 0.5


def test_sections_are_immutable() -> None:
    with pytest.raises(ValueError, match="frozen"):
        settings.parse(Root, {"name": "n"}).one.size = 3


def test_flatten_yields_dotted_keys_and_keeps_empty_mappings() -> None:
    assert dict(flatten({"a": {"b": {"c": 1}, "d": [2]}, "e": {}})) == {"a.b.c": 1, "a.d": [2], "e": {}}
