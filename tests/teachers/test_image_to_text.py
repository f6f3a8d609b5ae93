"""Image-to-text models and their start and end tokens."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from teachers.transformers.image_to_text import end_tokens_of
from tests.helpers.tiny_captioners import Captioners, captioned


def test_each_of_several_end_tokens_ends_a_caption(
    build_captioner: Captioners, captioner_folder: Callable[[str], Path]
) -> None:
    captioner = build_captioner("llava", captions=8, min_length=0, max_length=40, temperature=3.0)
    lengths = [len(text) for row in captioned(captioner) for text in row]
    config = json.loads((captioner_folder("llava") / "generation_config.json").read_text())
    try:
        more = {**config, "eos_token_id": [2, *range(100, 250)], "do_sample": True, "temperature": 0.3}
        (captioner_folder("llava") / "generation_config.json").write_text(json.dumps(more))
        with_more = build_captioner("llava", captions=8, min_length=0, max_length=40, temperature=3.0)
        assert with_more._model.ends[:2] == (2, 100)
        shorter = [len(text) for row in captioned(with_more) for text in row]
    finally:
        (captioner_folder("llava") / "generation_config.json").write_text(json.dumps(config))
    assert sum(shorter) < sum(lengths) / 2


def test_end_tokens_come_from_the_first_config_that_has_any() -> None:
    first, second, none = SimpleNamespace(eos_token_id=None), SimpleNamespace(eos_token_id=[3, 4]), SimpleNamespace()
    assert end_tokens_of(first, second) == (3, 4)
    assert end_tokens_of(SimpleNamespace(eos_token_id=0), second) == (0,)
    with pytest.raises(ValueError, match="config has no eos_token_id: it cannot caption"):
        end_tokens_of(first, none)


@pytest.mark.parametrize(
    ("kind", "start", "ends"), [("blip", 3, (2,)), ("git", 1, (2,)), ("vision-encoder-decoder", 2, (2,))]
)
def test_start_end_and_context_are_those_of_the_model(
    build_captioner: Captioners, kind: str, start: int, ends: tuple[int, ...]
) -> None:
    model = build_captioner(kind)._model
    assert (model.start, model.ends, model.max_length) == (start, ends, 64)
