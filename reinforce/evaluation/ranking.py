"""Ranks of classes for images, of texts for images and of images for texts, and the metrics made of them.

Scores are dot products in float64, rounded to float32, so that equal vectors tie on every device and for every block
size. Among equal scores the candidate with the lower index ranks first, as in a stable sort. Scores that are not finite
count against the model: a model that returns NaN has no hits.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from reinforce.evaluation.report import RECALLS
from teachers.runtime.accelerator import Accelerator, device_of_float64, upload

#: Queries and candidates of one block of scores; a block takes 8 + 4 bytes per pair.
BLOCK = 2048

_NO_RANK = 2**40  # rank of a query without a finite score; an integer, so that sums over blocks stay integers


class ClassRanking(NamedTuple):
    """For each image, ``ranks`` of the true class (0 is first) and the ``predicted`` class (-1: none)."""

    ranks: torch.Tensor
    predicted: torch.Tensor


def rank_classes(images: torch.Tensor, classes: torch.Tensor, labels: torch.Tensor) -> ClassRanking:
    """Rank classes for images: unit-norm [B, D] and [C, D], labels int64 [B] -> int64 [B] each."""
    device = device_of_float64(images.device, "ranks of classes")
    images, classes, labels = (values.to(device) for values in (images, classes, labels))
    scores = scores_of(images, classes)
    true = scores.gather(1, labels[:, None])
    indices = torch.arange(len(classes), device=scores.device)
    predicted = scores.argmax(1)
    predicted = torch.where(scores.isnan().any(1), -1, predicted)
    return ClassRanking(_count_before(scores, true, labels[:, None], indices), predicted)


def rank_matches(
    queries: torch.Tensor,
    candidates: torch.Tensor,
    matches: tuple[np.ndarray, np.ndarray],
    accelerator: Accelerator,
    block: int = BLOCK,
) -> np.ndarray:
    """Count the candidates that rank before the best true match of each query: int64 [Q].

    ``queries`` [Q, D] and ``candidates`` [C, D] are float32 on the CPU; ``matches`` are the (query, candidate) indices
    of all true pairs, sorted by query, at least one for each query. Further memory is bounded by ``block``.
    """
    rows, columns = (torch.from_numpy(np.ascontiguousarray(side)) for side in matches)
    device = device_of_float64(accelerator.device, "ranks of matches")
    bounds = np.searchsorted(matches[0], np.arange(0, len(queries) + block, block))
    ranks = []
    for number, start in enumerate(range(0, len(queries), block)):
        part = upload(queries[start : start + block], device).double()
        pairs = slice(int(bounds[number]), int(bounds[number + 1]))
        pair_rows, pair_columns = rows[pairs] - start, columns[pairs]
        best, best_index = _best_matches(part, candidates, pair_rows, pair_columns, block)
        before = torch.zeros(len(part), dtype=torch.int64, device=part.device)
        for left in range(0, len(candidates), block):
            others = upload(candidates[left : left + block], device)
            scores = scores_of(part, others)
            inside = (pair_columns >= left) & (pair_columns < left + len(others))
            # a true match never ranks before the best true match
            masked = pair_rows[inside].to(scores.device), (pair_columns[inside] - left).to(scores.device)
            scores[masked] = -torch.inf
            indices = torch.arange(left, left + len(others), device=scores.device)
            before += _count_before(scores, best[:, None], best_index[:, None], indices)
        ranks.append(before.cpu())
    return torch.cat(ranks).numpy()


def compute_recalls(
    images: torch.Tensor, texts: torch.Tensor, pairs: np.ndarray, accelerator: Accelerator
) -> dict[str, float]:
    """Return recall@k, the share of queries with a true match in the top k, as ``text_to_image/r1`` etc.

    ``images`` and ``texts`` are float32 [N, D] on the CPU, of unit norm; ``pairs`` int64 [2, P] are the (image, text)
    indices of all true pairs, sorted by image.
    """
    by_text = pairs[:, np.argsort(pairs[1], kind="stable")]
    ranks = {
        "text_to_image": rank_matches(texts, images, (by_text[1], by_text[0]), accelerator),
        "image_to_text": rank_matches(images, texts, (pairs[0], pairs[1]), accelerator),
    }
    return {f"{way}/r{k}": float((rank < k).mean()) for way, rank in ranks.items() for k in RECALLS}


def scores_of(queries: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
    """Scores of queries [Q, D] and candidates [C, D] on one device -> float32 [Q, C]."""
    with torch.autocast(queries.device.type, enabled=False):
        return (queries.double() @ candidates.double().T).float()


def _count_before(
    scores: torch.Tensor, best: torch.Tensor, best_index: torch.Tensor, indices: torch.Tensor
) -> torch.Tensor:
    """Count the scores [Q, C] that rank before ``best`` [Q, 1] -> int64 [Q].

    ``indices`` [C] are those of the candidates, ``best_index`` [Q, 1] that of the best match.
    """
    higher = ~(scores <= best)  # NaN counts against the match
    before = (higher | ((scores == best) & (indices < best_index))).sum(1)
    return torch.where(best[:, 0].isfinite(), before, _NO_RANK)


def _best_matches(
    queries: torch.Tensor,
    candidates: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor,
    block: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Highest score among the true matches of each query, and the lowest index of a candidate with that score."""
    scores = []
    for start in range(0, len(rows), block):
        part_rows = rows[start : start + block].to(queries.device)
        part = upload(candidates[columns[start : start + block]], queries.device)
        scores.append((queries[part_rows] * part.double()).sum(1).float())
    pair_scores = torch.cat(scores).nan_to_num(nan=-torch.inf)
    rows, columns = rows.to(queries.device), columns.to(queries.device)
    best = torch.full((len(queries),), -torch.inf, device=queries.device)
    best = best.scatter_reduce(0, rows, pair_scores, "amax")
    index = torch.full((len(queries),), len(candidates), device=queries.device)
    return best, index.scatter_reduce(0, rows, torch.where(pair_scores == best[rows], columns, len(candidates)), "amin")
