"""Embeddings of texts and images, classifiers, ranks and metrics, compared with open_clip's and with sorting."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES, SIMPLE_IMAGENET_TEMPLATES

from reinforce.evaluation.classes import load_templates
from reinforce.evaluation.encoding import build_classifier, encode_texts
from reinforce.evaluation.kinds.classification import own_metrics
from reinforce.evaluation.ranking import rank_classes, rank_matches
from tests.helpers.evaluation import CPU, ColourOracle, load_teacher
from tests.helpers.models import tiny_models


def vectors(rng: np.random.Generator, count: int, levels: int) -> np.ndarray:
    """Random vectors; few levels give many ties."""
    return rng.integers(-levels, levels + 1, (count, 3)).astype(np.float32) / 4


def sorted_ranks(scores: np.ndarray, matches: np.ndarray) -> np.ndarray:
    """Position of the first true match when each row is sorted by descending score, with a stable sort."""
    order = np.argsort(-scores, axis=1, kind="stable")
    return np.take_along_axis(matches, order, axis=1).argmax(axis=1)


@settings(max_examples=30)
@given(seed=st.integers(0, 10_000), levels=st.integers(0, 3), images=st.integers(1, 12), classes=st.integers(1, 9))
def test_class_rank_is_the_position_in_a_stable_sort(seed: int, levels: int, images: int, classes: int) -> None:
    rng = np.random.default_rng(seed)
    queries, names = vectors(rng, images, levels), vectors(rng, classes, levels)
    labels = rng.integers(0, classes, images)
    scores = queries @ names.T
    ranking = rank_classes(*map(torch.from_numpy, (queries, names, labels)))
    assert ranking.ranks.tolist() == sorted_ranks(scores, np.eye(classes, dtype=bool)[labels]).tolist()
    assert ranking.predicted.tolist() == scores.argmax(axis=1).tolist()


@settings(max_examples=30)
@given(
    seed=st.integers(0, 10_000),
    levels=st.integers(0, 3),
    queries=st.integers(1, 12),
    candidates=st.integers(1, 12),
    block=st.integers(1, 14),
)
def test_the_best_match_counts_in_any_block(seed: int, levels: int, queries: int, candidates: int, block: int) -> None:
    rng = np.random.default_rng(seed)
    left, right = vectors(rng, queries, levels), vectors(rng, candidates, levels)
    matches = rng.random((queries, candidates)) < 0.3
    matches[np.arange(queries), rng.integers(0, candidates, queries)] = True
    rows, columns = np.nonzero(matches)
    ranks = rank_matches(torch.from_numpy(left), torch.from_numpy(right), (rows, columns), CPU, block)
    assert ranks.tolist() == sorted_ranks(left @ right.T, matches).tolist()


def test_nan_scores_are_never_hits() -> None:
    labels = torch.tensor([0, 1])
    names = torch.eye(2)
    nans = torch.full((2, 2), torch.nan)
    for images, classes in ((nans, names), (names, nans)):
        ranks, predicted = rank_classes(images, classes, labels)
        assert ranks.min() >= 5
        assert own_metrics(["a", "a"], [], labels.numpy(), ranks.numpy(), predicted.numpy()) == {
            "top1": 0, "top5": 0, "mean_per_class": 0, "group": 0,
        }  # fmt: skip
        assert rank_matches(images, classes, (labels.numpy(), labels.numpy()), CPU, 1).min() >= 10
    broken = torch.tensor([[1.0, 0.0], [torch.nan, 0.0]])
    assert rank_classes(names, broken, labels).predicted.tolist() == [-1, -1], "NaN scores have no maximum"


def test_accuracies_are_means_over_images_and_classes() -> None:
    labels = np.array([0, 0, 0, 2, 2, 5])
    ranks = np.array([0, 0, 3, 0, 7, 1])
    predicted = np.array([0, 0, 1, 2, 4, 3])
    scores = own_metrics(["a", "a", "b", "c", "b", "c"], [], labels, ranks, predicted)
    assert scores["top1"] == pytest.approx(3 / 6)
    assert scores["top5"] == pytest.approx(5 / 6)
    assert scores["mean_per_class"] == pytest.approx((2 / 3 + 1 / 2 + 0) / 3), "classes without images do not count"
    assert scores["group"] == pytest.approx(6 / 6), "0 for 1, 2 for 4 and 5 for 3 share a group"
    partly = own_metrics(["a", "a", "b", None, "d", "c"], [], labels, ranks, predicted)
    assert partly["group"] == pytest.approx(4 / 6)
    assert "group" not in own_metrics(None, [], labels, ranks, predicted)


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


def test_texts_are_batched_by_length() -> None:
    batches: list[list[str]] = []

    class Recorder(ColourOracle):
        def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
            batches.append(list(texts))
            return super().encode_texts(texts)

    texts = ["a long text about red", "blue", "the green one", "grey"]
    assert torch.equal(encode_texts(Recorder(), texts, 2), ColourOracle().encode_texts(texts)), "in their order"
    assert batches == [["blue", "grey"], ["the green one", "a long text about red"]]
