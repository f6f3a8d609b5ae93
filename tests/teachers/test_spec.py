"""Validation of model specs."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from teachers.registry import captioner_spec
from teachers.spec import CaptionerSpec, Clean


def make_spec(strategy: str = "nucleus", **options) -> CaptionerSpec:
    return captioner_spec(**{"model": "any", "captions": 3, "strategy": strategy, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "beams", "top_k": 5}, "`top_k` is not used by strategy beams: .* `strategy` to top_k"),
        ({"top_k": 5}, "`top_k` is not used by strategy nucleus"),
        ({"strategy": "top_k", "top_p": 0.5}, "`top_p` is not used by strategy top_k: .* nucleus"),
        ({"strategy": "greedy", "captions": 1, "temperature": 0.5}, "to nucleus or top_k"),
        ({"strategy": "beams", "groups": 2}, "`groups` is not used by strategy beams: .* diverse_beams"),
        ({"strategy": "greedy"}, "one caption per image: set `captions: 1`"),
        ({"strategy": "beams", "captions": 8}, "`captions: 8` exceeds `beams: 6`: set `beams` to 8"),
        ({"strategy": "diverse_beams", "beams": 8}, "8 beams cannot be divided among 3 groups"),
    ],
)
def test_incompatible_fields_are_rejected_with_the_fix(options, message):
    with pytest.raises(ValueError, match=message):
        captioner_spec(**{"model": "any", **options})


def test_decoding_includes_later_options_only_if_they_are_used():
    lengths = {"min_length": 5, "max_length": 30}
    assert make_spec(captions=5).decoding() == {"captions": 5, "temperature": 1.0, "top_p": 0.9, **lengths}
    assert make_spec("greedy", captions=1, repetition_penalty=1.2, compile=True).decoding() == {
        "captions": 1,
        "strategy": "greedy",
        "repetition_penalty": 1.2,
        **lengths,
    }
    beams = {"strategy": "beams", "captions": 3, "beams": 6, "length_penalty": 1.0}
    assert make_spec("beams").decoding() == {**beams, **lengths}


def test_invalid_cleaning_rules_are_rejected() -> None:
    for wrong in ({"words": 0}, {"sentences": 1}, {"characters": "9"}):
        with pytest.raises(ValidationError):
            Clean.model_validate(wrong)
