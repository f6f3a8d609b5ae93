"""Metrics of the suites, as pure functions. Names are those of DataComp's result files.

A class or group without samples does not count. Means of groups follow WILDS, F1 and recall scikit-learn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

TOP = 5


def classification_metrics(
    labels: np.ndarray, ranks: np.ndarray, predicted: np.ndarray, classes: int
) -> dict[str, float | None]:
    """Return ``acc1``, ``acc5`` and ``mean_per_class_recall`` of N samples; the arrays are int64 [N].

    ``ranks`` are those of the true classes, 0 is first; ``predicted`` is -1 where the model predicts nothing. ``acc5``
    is None for fewer than five classes. Classes without samples do not count for ``mean_per_class_recall``.
    """
    return {
        "acc1": float((ranks == 0).mean()),
        "acc5": float((ranks < TOP).mean()) if classes >= TOP else None,
        "mean_per_class_recall": macro_recall(labels, predicted),
    }


def macro_recall(labels: np.ndarray, predicted: np.ndarray) -> float:
    """Mean recall of the classes that occur in ``labels``: balanced accuracy. int64 [N] each."""
    return float(np.mean([(predicted[labels == label] == label).mean() for label in np.unique(labels)]))


def macro_f1(labels: np.ndarray, predicted: np.ndarray) -> float:
    """Mean F1 of the classes that occur in ``labels``, as WILDS has it. int64 [N] each.

    A class that only occurs in ``predicted`` does not count, but its predictions miss their true classes.
    """
    scores = []
    for label in np.unique(labels):
        hits = ((predicted == label) & (labels == label)).sum()
        scores.append(2 * hits / ((predicted == label).sum() + (labels == label).sum()))
    return float(np.mean(scores))


def group_accuracies(hits: np.ndarray, groups: np.ndarray) -> dict[int, tuple[float, int]]:
    """Accuracy and number of samples of each group that has samples. ``hits`` bool [N], ``groups`` int64 [N]."""
    found = {int(group): hits[groups == group] for group in np.unique(groups)}
    return {group: (float(inside.mean()), len(inside)) for group, inside in found.items()}


def retrieval_metrics(recalls: Mapping[str, float]) -> dict[str, float]:
    """Rename the recalls of ``ranking.compute_recalls``, and add the mean of both directions at rank 1."""
    ways = {"text_to_image": "image_retrieval", "image_to_text": "text_retrieval"}
    named = {}
    for name, score in recalls.items():
        way, _, rank = name.partition("/r")
        named[f"{ways[way]}_recall@{rank}"] = score
    named["mean_recall@1"] = (named["image_retrieval_recall@1"] + named["text_retrieval_recall@1"]) / 2
    return named


def jaccard(scores: np.ndarray, associated: np.ndarray) -> float:
    """Jaccard index of the candidates with the highest scores, as many as are ``associated``, and those.

    ``scores`` float [N], ``associated`` bool [N], at least one. Of equal scores, the candidate that comes first counts;
    scores that are not finite are never chosen.
    """
    best = np.argsort(-scores, kind="stable")[: associated.sum()]
    chosen = np.zeros(len(scores), bool)
    chosen[best] = np.isfinite(scores[best])
    return float((chosen & associated).sum() / (chosen | associated).sum())


def association_metrics(scores: Sequence[float], candidates: Sequence[int]) -> dict[str, float]:
    """Mean Jaccard indices of instances, over all and by the number of their candidates.

    ``scores`` are the Jaccard indices, ``candidates`` the numbers of candidates. Numbers that no instance has are left
    out.
    """
    indices, counts = np.array(scores, float), np.array(candidates, int)
    masks = {f"jaccard_score_{count}": counts == count for count in (5, 6, 10, 12)}
    masks |= {"jaccard_score_5-6": counts <= 6, "jaccard_score_10-12": counts >= 10}
    named = {name: float(indices[mask].mean()) for name, mask in masks.items() if mask.any()}
    return {"avg_jaccard_score": float(indices.mean()), **named}
