"""Ranks and accuracies against sorting in numpy, ties among them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reinforce.evaluation.config import RECALLS
from reinforce.evaluation.ranking import BLOCK, accuracies, choose, ranks_of_matches, recalls
from teachers.device import Accelerator

CPU = Accelerator("cpu")


def vectors(rng: np.random.Generator, count: int, levels: int) -> np.ndarray:
    """Few levels make many ties."""
    return rng.integers(-levels, levels + 1, (count, 3)).astype(np.float32) / 4


def best_places(scores: np.ndarray, matches: np.ndarray) -> np.ndarray:
    """Where the first true match stands when each row is sorted, the best score first, ties in their own order."""
    order = np.argsort(-scores, axis=1, kind="stable")
    return np.take_along_axis(matches, order, axis=1).argmax(axis=1)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    levels=st.integers(0, 3),
    images=st.integers(1, 12),
    classes=st.integers(1, 9),
)
def test_the_rank_of_a_class_is_its_place_in_a_stable_sort(seed: int, levels: int, images: int, classes: int) -> None:
    rng = np.random.default_rng(seed)
    queries, names = vectors(rng, images, levels), vectors(rng, classes, levels)
    labels = rng.integers(0, classes, images)
    scores = queries @ names.T
    choices = choose(*map(torch.from_numpy, (queries, names, labels)))
    assert choices.ranks.tolist() == best_places(scores, np.eye(classes, dtype=bool)[labels]).tolist()
    assert choices.first.tolist() == scores.argmax(axis=1).tolist()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    levels=st.integers(0, 3),
    queries=st.integers(1, 12),
    candidates=st.integers(1, 12),
    block=st.integers(1, 14),
)
def test_the_best_of_several_true_matches_counts_at_any_size_of_block(
    seed: int, levels: int, queries: int, candidates: int, block: int
) -> None:
    rng = np.random.default_rng(seed)
    asked, offered = vectors(rng, queries, levels), vectors(rng, candidates, levels)
    matches = rng.random((queries, candidates)) < 0.3
    matches[np.arange(queries), rng.integers(0, candidates, queries)] = True
    rows, columns = np.nonzero(matches)
    ranks = ranks_of_matches(torch.from_numpy(asked), torch.from_numpy(offered), (rows, columns), CPU, block)
    assert ranks.tolist() == best_places(asked @ offered.T, matches).tolist()


def test_blocks_do_not_change_ranks_of_real_numbers() -> None:
    generator = torch.Generator().manual_seed(0)
    images, texts = (
        torch.nn.functional.normalize(torch.randn(count, 64, generator=generator), dim=-1) for count in (150, 500)
    )
    texts[100:200] = texts[:100]  # equal vectors tie wherever a block cuts
    pairs = np.arange(500) % 150, np.arange(500)
    pairs = tuple(side[np.argsort(pairs[0], kind="stable")] for side in pairs)
    whole = ranks_of_matches(images, texts, pairs, CPU, block=1000)
    assert whole.max() > 10
    for block in (30, 64, 499):
        assert ranks_of_matches(images, texts, pairs, CPU, block).tolist() == whole.tolist()


def test_recall_of_more_texts_than_one_block_holds_is_that_of_sorting_them_all() -> None:
    rng = np.random.default_rng(0)
    images, texts = vectors(rng, 300, 9), vectors(rng, BLOCK + 100, 9)
    matches = np.zeros((len(images), len(texts)), bool)
    matches[np.arange(len(images)), rng.integers(0, len(texts), len(images))] = True
    matches[rng.integers(0, len(images), len(texts)), np.arange(len(texts))] = True
    found = recalls(torch.from_numpy(images), torch.from_numpy(texts), np.stack(np.nonzero(matches)), CPU)
    for way, places in (
        ("image_to_text", best_places(images @ texts.T, matches)),
        ("text_to_image", best_places(texts @ images.T, matches.T)),
    ):
        assert {k: found[f"{way}/r{k}"] for k in RECALLS} == {k: float((places < k).mean()) for k in RECALLS}
    assert 0 < found["text_to_image/r1"] < found["text_to_image/r10"] < 1


def test_what_is_not_a_number_is_never_right() -> None:
    labels = torch.tensor([0, 1])
    names = torch.eye(2)
    nothing = torch.full((2, 2), torch.nan)
    for images, classes in ((nothing, names), (names, nothing)):
        ranks, first = choose(images, classes, labels)
        assert ranks.min() >= 5
        assert accuracies(ranks.numpy(), labels.numpy(), first.numpy(), ["a", "a"]) == {
            "top1": 0, "top5": 0, "mean_per_class": 0, "group": 0,
        }  # fmt: skip
        assert ranks_of_matches(images, classes, (labels.numpy(), labels.numpy()), CPU, 1).min() >= 10
    broken = torch.tensor([[1.0, 0.0], [torch.nan, 0.0]])
    assert choose(names, broken, labels).first.tolist() == [-1, -1], "nothing is chosen among what cannot be compared"


def test_accuracies_are_means_over_images_and_over_classes() -> None:
    labels = np.array([0, 0, 0, 2, 2, 5])
    ranks = np.array([0, 0, 3, 0, 7, 1])
    first = np.array([0, 0, 1, 2, 4, 3])
    found = accuracies(ranks, labels, first, ["a", "a", "b", "c", "b", "c"])
    assert found["top1"] == pytest.approx(3 / 6)
    assert found["top5"] == pytest.approx(5 / 6)
    assert found["mean_per_class"] == pytest.approx((2 / 3 + 1 / 2 + 0) / 3), "classes without images do not count"
    assert found["group"] == pytest.approx(6 / 6), "0 for 1, 2 for 4 and 5 for 3 are of one group"
    assert accuracies(ranks, labels, first, ["a", "a", "b", None, "d", "c"])["group"] == pytest.approx(4 / 6)
    assert "group" not in accuracies(ranks, labels, first, None)
