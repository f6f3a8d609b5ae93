"""Who comes first: classes for an image, texts for an image, images for a text.

Scores are dot products in float64, rounded to float32, so that equal vectors tie whatever the device and the cut into
blocks. Of equal scores the candidate with the lower index comes first, as in a stable sort. Scores that are not
finite lose: a model that gives NaN is right about nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from reinforce.evaluation.config import RECALLS
from teachers.device import Accelerator

#: Queries and candidates of one block of scores, which takes 8 + 4 bytes for each pair while it is looked at.
BLOCK = 2048

_NEVER = 2**40  # the rank of what has no finite score: also the sum over blocks is an integer


class Choices(NamedTuple):
    """Of each image: ``ranks`` of the true class (0 comes first), ``first`` the class that was chosen (-1: none)."""

    ranks: torch.Tensor
    first: torch.Tensor


def choose(images: torch.Tensor, classes: torch.Tensor, labels: torch.Tensor) -> Choices:
    """[B, D] and [C, D] of unit norm and labels int64 [B], on one device -> int64 [B] each."""
    scores = _scores(images, classes)
    true = scores.gather(1, labels[:, None])
    order = torch.arange(len(classes), device=scores.device)
    first = scores.argmax(1)
    first = torch.where(scores.isnan().any(1), -1, first)
    return Choices(_before(scores, true, labels[:, None], order), first)


def ranks_of_matches(
    queries: torch.Tensor,
    candidates: torch.Tensor,
    matches: tuple[np.ndarray, np.ndarray],
    accelerator: Accelerator,
    block: int = BLOCK,
) -> np.ndarray:
    """How many candidates come before the best true match of each query: int64 [Q].

    ``queries`` [Q, D] and ``candidates`` [C, D] are float32 on the CPU; ``matches`` are the indices of all true pairs,
    sorted by query, each query in at least one. Memory beyond these is bounded by ``block``.
    """
    rows, columns = (torch.from_numpy(np.ascontiguousarray(side)) for side in matches)
    bounds = np.searchsorted(matches[0], np.arange(0, len(queries) + block, block))
    ranks = []
    for at, start in enumerate(range(0, len(queries), block)):
        part = accelerator.put(queries[start : start + block]).double()
        pairs = slice(int(bounds[at]), int(bounds[at + 1]))
        here, there = rows[pairs] - start, columns[pairs]
        best, place = _best_matches(part, candidates, here, there, accelerator, block)
        before = torch.zeros(len(part), dtype=torch.int64, device=part.device)
        for left in range(0, len(candidates), block):
            others = accelerator.put(candidates[left : left + block])
            scores = _scores(part, others)
            inside = (there >= left) & (there < left + len(others))
            # what is true itself never stands before the best true match
            scores[here[inside].to(scores.device), (there[inside] - left).to(scores.device)] = -torch.inf
            order = torch.arange(left, left + len(others), device=scores.device)
            before += _before(scores, best[:, None], place[:, None], order)
        ranks.append(before.cpu())
    return torch.cat(ranks).numpy()


def recalls(images: torch.Tensor, texts: torch.Tensor, pairs: np.ndarray, accelerator: Accelerator) -> dict[str, float]:
    """``text_to_image/r1`` and so on: how often a true match is among the first k, both ways.

    ``images`` and ``texts`` are float32 [N, D] on the CPU, of unit norm; ``pairs`` int64 [2, P] are the indices of all
    true pairs, sorted by image.
    """
    by_text = pairs[:, np.argsort(pairs[1], kind="stable")]
    ranks = {
        "text_to_image": ranks_of_matches(texts, images, (by_text[1], by_text[0]), accelerator),
        "image_to_text": ranks_of_matches(images, texts, (pairs[0], pairs[1]), accelerator),
    }
    return {f"{way}/r{k}": float((rank < k).mean()) for way, rank in ranks.items() for k in RECALLS}


def accuracies(
    ranks: np.ndarray, labels: np.ndarray, first: np.ndarray, groups: Sequence[str | None] | None
) -> dict[str, float]:
    """Shares of N images, all int64 [N]: ``top1``, ``top5``, ``mean_per_class`` and, with groups, ``group``.

    ``mean_per_class`` is the mean of top1 over the classes that have images. ``group`` counts an image as right if the
    chosen class belongs to the group of its class.
    """
    hits = ranks == 0
    counts = np.bincount(labels)
    per_class = np.bincount(labels, weights=hits)[counts > 0] / counts[counts > 0]
    scores = {"top1": hits.mean(), "top5": (ranks < 5).mean(), "mean_per_class": per_class.mean()}
    if groups is not None:
        numbers: dict[str | None, int] = {name: i for i, name in enumerate(dict.fromkeys(groups)) if name is not None}
        group_of = np.array([*(numbers.get(name, -1) for name in groups), -1])  # the last: no class was chosen
        scores["group"] = ((group_of[first] == group_of[labels]) & (group_of[first] >= 0)).mean()
    return {name: float(score) for name, score in scores.items()}


def _scores(queries: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
    with torch.autocast(queries.device.type, enabled=False):
        return (queries.double() @ candidates.double().T).float()


def _before(scores: torch.Tensor, best: torch.Tensor, place: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """How many of the scores [Q, C] come before ``best`` [Q, 1], which stands at ``place`` [Q, 1] in ``order`` [C]."""
    higher = ~(scores <= best)  # NaN counts against the match
    before = (higher | ((scores == best) & (order < place))).sum(1)
    return torch.where(best[:, 0].isfinite(), before, _NEVER)


def _best_matches(
    queries: torch.Tensor,
    candidates: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor,
    accelerator: Accelerator,
    block: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Highest score among the true matches of each query, and the lowest index of one that has it."""
    scores = []
    for start in range(0, len(rows), block):
        here = rows[start : start + block].to(queries.device)
        there = accelerator.put(candidates[columns[start : start + block]])
        scores.append((queries[here] * there.double()).sum(1).float())
    of_pairs = torch.cat(scores).nan_to_num(nan=-torch.inf)
    here, there = rows.to(queries.device), columns.to(queries.device)
    best = torch.full((len(queries),), -torch.inf, device=queries.device)
    best = best.scatter_reduce(0, here, of_pairs, "amax")
    place = torch.full((len(queries),), len(candidates), device=queries.device)
    return best, place.scatter_reduce(0, here, torch.where(of_pairs == best[here], there, len(candidates)), "amin")
