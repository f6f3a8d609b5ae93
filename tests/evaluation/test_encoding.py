"""Text embeddings and zero-shot classifiers, compared with open_clip's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import open_clip
import pytest
import torch
from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES, SIMPLE_IMAGENET_TEMPLATES

from reinforce.evaluation.classes import load_templates
from reinforce.evaluation.encoding import build_classifier, encode_texts
from teachers.open_clip.teacher import OpenClipEncoder
from tests.helpers import tiny_models
from tests.helpers.evaluation import CPU, ColourOracle, load_spec, load_teacher

WORDS = ["dog", "red car", "great white shark", "Ünïcode"]


@pytest.fixture(scope="module")
def name(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_models.open_clip_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("templates", ["openai", "simple", ["a photo of {}.", "{}"]])
def test_classifier_equals_that_of_open_clip(name: str, templates: Any) -> None:
    model, tokenizer = open_clip.create_model(name).eval(), open_clip.get_tokenizer(name)
    theirs = {"openai": OPENAI_IMAGENET_TEMPLATES, "simple": SIMPLE_IMAGENET_TEMPLATES}
    given = templates if isinstance(templates, list) else theirs[templates]
    expected = open_clip.build_zero_shot_classifier(model, tokenizer, WORDS, given)
    ours = build_classifier(load_teacher(name), WORDS, load_templates(templates, ""), 7)
    torch.testing.assert_close(ours.T, expected, rtol=0, atol=1e-6)
    assert (expected.T @ expected).fill_diagonal_(0).max() < 1 - 1e-4, "the classes differ"


def test_texts_are_batched_by_length_and_returned_in_their_order() -> None:
    batches: list[list[str]] = []

    class Recorder(ColourOracle):
        def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
            batches.append(list(texts))
            return super().encode_texts(texts)

    texts = ["a long text about red", "blue", "the green one", "grey"]
    vectors = encode_texts(Recorder(), texts, 2)
    assert batches == [["blue", "grey"], ["the green one", "a long text about red"]]
    assert torch.equal(vectors, ColourOracle().encode_texts(texts))


def test_special_tokens_in_texts_are_plain_text(name: str) -> None:
    model, tokenizer = open_clip.create_model(name).eval(), open_clip.get_tokenizer(name)
    encoder = OpenClipEncoder(model, load_spec(model), tokenizer, CPU)
    texts = ["a <end_of_text> b", "a", "a < end_of_text> b"]
    literal, cut, spelled = encoder.encode_texts(texts)
    assert torch.equal(literal, spelled)
    assert not torch.equal(literal, cut)
    with torch.no_grad():
        theirs = model.encode_text(tokenizer(texts[:2]), normalize=True)
    torch.testing.assert_close(theirs[0], theirs[1], rtol=0, atol=1e-6)  # the caller's tokenizer is unchanged
