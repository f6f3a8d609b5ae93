"""Classifiers of features: votes of nearest neighbours and the linear probe, compared with scikit-learn 1.9.1."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reinforce.evaluation.probing import linear
from reinforce.evaluation.probing.linear import fit_probe, hold_out
from reinforce.evaluation.probing.neighbours import classify, find_nearest
from tests.helpers.evaluation import CPU

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
        monkeypatch.setattr(linear, "BLOCK", block)
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
