"""Selection of concepts among emoji."""

from __future__ import annotations

from reinforce.demo.concepts import select_concepts


def test_concepts_have_class_names_and_subgroups() -> None:
    (apple,) = select_concepts(["1f34e"])
    assert (apple.name, apple.group, apple.emoji.phrase) == ("red apple", "food-fruit", "a red apple")


def test_flags_letters_families_and_gendered_variants_are_excluded() -> None:
    excluded = ["1f1f5-1f1ea", "1f170", "39-20e3", "1f468-1f469-1f467", "1f468-1f680", "1f3c3-2642", "1f44b-1f3fd"]
    assert select_concepts(excluded) == []
    assert [concept.emoji.key for concept in select_concepts([*excluded, "1f34e", "1f3c3"])] == ["1f34e", "1f3c3"]


def test_unseen_concepts_depend_only_on_the_key() -> None:
    keys = ["1f34e", "1f600", "1f438", "1f6b2"]
    alone = {key: select_concepts([key])[0].unseen for key in keys}
    assert {concept.emoji.key: concept.unseen for concept in select_concepts(keys)} == alone
    assert set(alone.values()) == {True, False}
