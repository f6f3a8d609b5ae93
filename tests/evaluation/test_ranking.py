"""Classifiers, ranks, neighbours, probes and metrics, compared with open_clip's, sorting, and scikit-learn 1.9.1."""

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

from reinforce.evaluation import ranking as probing
from reinforce.evaluation.classes import load_templates
from reinforce.evaluation.encoding import build_classifier, encode_texts
from reinforce.evaluation.kinds.base import own_metrics
from reinforce.evaluation.ranking import (
    classify,
    find_nearest,
    fit_probe,
    hold_out,
    rank_classes,
    rank_matches,
    scores_of,
)
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


CLASSES = 7
#: Hits among 150 test images, and the first 40 predicted classes, of KNeighborsClassifier(k, metric="cosine",
#: algorithm="brute", weights=lambda distances: np.exp((1 - distances) / 0.07)).
NEIGHBOURS = {
    10: (77, "4420450063061243406003424234426205502430"),
    20: (82, "4420450063061243406003424234424205502430"),
    100: (83, "4420450063061243406003424234424245502430"),
    200: (83, "4420450063061243406003424234424245502430"),
}
#: Hits and the first row of probabilities of StandardScaler and LogisticRegression(C=1 / (l2 * 400), tol=1e-10).
REGRESSIONS = {
    0.1: (94, [0.081022, 0.069034, 0.069029, 0.022954, 0.629651, 0.052799, 0.075511]),
    1e-4: (98, [0.003078, 0.001878, 0.000596, 0.000071, 0.992201, 0.000483, 0.001693]),
}


@pytest.fixture(scope="module")
def clusters() -> tuple[np.ndarray, ...]:
    """Unit vectors around one centre for each class: 400 with labels to learn from, 150 with labels to classify."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(CLASSES, 16))
    labels = rng.integers(0, CLASSES, 550)
    vectors = centres[labels] + 2 * rng.normal(size=(550, 16))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    return vectors[:400], labels[:400], vectors[400:], labels[400:]


def tensors(*arrays: np.ndarray) -> list[torch.Tensor]:
    return [*map(torch.from_numpy, arrays)]


def test_neighbours_vote_as_in_scikit_learn(clusters: tuple[np.ndarray, ...]) -> None:
    *arrays, true = clusters
    found = classify(*tensors(*arrays), [*NEIGHBOURS], 0.07, CPU, block=64)
    for count, (hits, first) in NEIGHBOURS.items():
        assert int((found[count].numpy() == true).sum()) == hits
        assert "".join(map(str, found[count][:40].tolist())) == first


def vote(scores: np.ndarray, labels: np.ndarray, count: int, temperature: float) -> list[int]:
    """The definition: the classes with the largest sums of exp(cosine / temperature) over the nearest images."""
    predicted = []
    for row in scores:
        nearest = np.argsort(-row, kind="stable")[:count]
        sums = [np.exp(row[nearest][labels[nearest] == label] / temperature).sum() for label in range(labels.max() + 1)]
        predicted.append(int(np.argmax(sums)))
    return predicted


@given(st.integers(0, 2**32 - 1), st.integers(1, 30), st.integers(1, 12))
def test_among_equal_scores_the_first_image_is_nearer_for_every_block_size(seed: int, images: int, block: int) -> None:
    """Vectors of few values, whose products are exact, tie often, also at zero and below it."""
    rng = np.random.default_rng(seed)
    train, test = (rng.integers(-1, 2, (count, 4)).astype(np.float32) / 2 for count in (images, 5))
    labels, scores = rng.integers(0, 3, images), test @ train.T
    count = int(rng.integers(1, images + 1))
    nearest, indices = find_nearest(*tensors(test, train), count, CPU, block)
    expected = np.argsort(-scores, axis=1, kind="stable")[:, :count]
    assert np.array_equal(indices.numpy(), expected)
    assert np.array_equal(nearest.numpy(), np.take_along_axis(scores, expected, 1))
    sums = classify(*tensors(train, labels, test), [1], 0.07, CPU, block)[1]
    assert sums.tolist() == vote(scores, labels, 1, 0.07)


def test_a_low_temperature_does_not_overflow(clusters: tuple[np.ndarray, ...]) -> None:
    *arrays, _ = clusters
    found = classify(*tensors(*arrays), [1, 50], 1e-5, CPU)
    assert torch.equal(found[1], found[50]), "the nearest image decides alone"


@pytest.mark.parametrize("l2", REGRESSIONS)
def test_a_linear_probe_has_the_probabilities_of_logistic_regression(
    clusters: tuple[np.ndarray, ...], l2: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, labels, test, true = clusters
    hits, expected = REGRESSIONS[l2]
    for block in (4096, 37):
        monkeypatch.setattr(probing, "PROBE_BLOCK", block)
        probe = fit_probe(torch.from_numpy(train), labels, [l2], CPU)
        p = (probe.inputs(torch.from_numpy(test)) @ probe.weights.T).softmax(1).numpy()
        assert p[0] == pytest.approx(np.array(expected), abs=1e-4)
        assert int((p.argmax(1) == true).sum()) == hits


def test_the_best_l2_is_chosen_on_every_fifth_image_of_a_class_and_the_largest_of_equal_ones() -> None:
    labels = np.array([0] * 11 + [1] * 4 + [0, 2, 2, 2, 2, 2])
    assert np.flatnonzero(hold_out(labels)).tolist() == [4, 9, 20]
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 100)
    noisy = torch.from_numpy(rng.normal(size=(100, 80)).astype(np.float32))
    noisy[:, 0] += torch.from_numpy(labels).float() * 3
    grid = [1e-6, 1.0, 1e-3, 0.1]
    held = hold_out(labels)

    def hits(l2: float) -> int:
        # the features of all images are standardised together, which a fit of some of them alone does not see
        mean, scale = noisy.double().mean(0), noisy.double().std(0, correction=0)
        part = fit_probe(((noisy - mean) / scale).float()[~held], labels[~held], [l2], CPU)
        logits = part.inputs(((noisy - mean) / scale).float()[held]) @ part.weights.T
        return int((logits.argmax(1).numpy() == labels[held]).sum())

    probe = fit_probe(noisy, labels, grid, CPU)
    assert hits(probe.l2) >= hits(1e-6)
    assert probe.l2 > 1e-6, "80 features of noise need a penalty"
    apart = torch.eye(2)[torch.from_numpy(labels)]
    assert fit_probe(apart, labels, grid, CPU).l2 == 1.0, "all have the same hits"


def test_equal_features_predict_the_largest_class() -> None:
    labels = np.array([0] * 6 + [1] * 9)
    same = torch.full((15, 3), 3**-0.5)
    probe = fit_probe(same, labels, [1.0, 1e-6], CPU)
    logits = probe.inputs(same) @ probe.weights.T
    assert logits.isfinite().all()
    assert logits.softmax(1)[0, 1].item() == pytest.approx(0.6, abs=1e-4)


def test_scores_are_sums_in_float64() -> None:
    """In float32, 1 is lost beside 2^24 in whatever order three numbers are added, for one of these candidates."""
    large = 2.0**24
    candidates = torch.tensor([[large, 1, -large], [1, large, -large], [large, -large, 1], [-large, 1, large]])
    assert scores_of(torch.ones(2, 3), candidates).tolist() == [[1.0] * 4] * 2
    assert rank_matches(torch.ones(1, 3), candidates, (np.array([0]), np.array([0])), CPU).tolist() == [0]
    assert rank_classes(torch.ones(1, 3), candidates, torch.tensor([0])).ranks.tolist() == [0]


def test_a_candidate_without_a_score_ranks_before_the_match() -> None:
    candidates = torch.tensor([[0.5, 0.0], [float("nan"), 0.0], [0.25, 0.0]])
    match = np.array([0]), np.array([0])
    assert rank_matches(torch.tensor([[1.0, 0.0]]), candidates, match, CPU).tolist() == [1]


def test_neighbours_whose_scores_are_zeros_of_both_signs_are_in_their_order() -> None:
    """A product that is too small for float32 is -0.0 there."""
    train = torch.tensor([[-1e-30], [0.0], [1e-30]])
    scores, indices = find_nearest(torch.tensor([[1e-30]]), train, 3, CPU)
    assert indices.tolist() == [[0, 1, 2]]
    assert scores.tolist() == [[0.0, 0.0, 0.0]]
