"""Ranks of classes for images, of texts for images and of images for texts, and classifiers of image features.

Scores are dot products in float64, rounded to float32, so that equal vectors tie on every device and for every block
size. Among equal scores the candidate with the lower index ranks first, as in a stable sort. Scores that are not finite
count against the model: a model that returns NaN has no hits.

Features are classified by votes of the nearest training images, and by a linear probe. Neighbours are weighted as in
DINO: a class gets the sum of exp(cosine / T). Among equal scores the image with the lower index is nearer, and among
equal sums the class with the lower index wins, so that results are the same on every device and for every block size.

The probe is softmax regression on standardised features, by full-batch L-BFGS in float64. It minimises the mean
cross-entropy plus ``l2 / 2`` times the squared norm of the weights, without the bias: of N images, scikit-learn's
LogisticRegression with C = 1 / (l2 N) behind a StandardScaler. Each pass reads the features in blocks, so that memory
on the device does not depend on N. Nothing is random.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from reinforce.evaluation.report import RECALLS
from teachers.runtime.accelerator import Accelerator, device_of_float64, upload

#: Queries and candidates of one block of scores; a block takes 8 + 4 bytes per pair.
BLOCK = 2048

_NO_RANK = 2**40  # rank of a query without a finite score; an integer, so that sums over blocks stay integers
_SIGN, _INDEX = 0x7FFFFFFF, 0xFFFFFFFF
#: Images of one block; a block takes 16 bytes per image and class.
PROBE_BLOCK = 4096
#: Every fifth image of a class is held out to choose ``l2``.
FOLD = 5
_ITERATIONS = 300
_GRADIENT = 1e-6  # largest absolute entry at which a fit ends
_CONSTANT = 1e-7  # standard deviation of a feature of unit-norm vectors that differs by rounding alone


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


def classify(
    train: torch.Tensor,
    labels: torch.Tensor,
    test: torch.Tensor,
    counts: Sequence[int],
    temperature: float,
    accelerator: Accelerator,
    block: int = BLOCK,
) -> dict[int, torch.Tensor]:
    """Predict the classes of ``test`` by each number of neighbours in ``counts`` -> int64 [Q] on the CPU, by number.

    ``train`` [N, D] and ``test`` [Q, D] are float32 of unit norm on the CPU, ``labels`` int64 [N] are at least 0. No
    count is above N. Memory on the device is bounded by ``block`` and the largest count.
    """
    found: dict[int, list[torch.Tensor]] = {count: [] for count in counts}
    classes = int(labels.max()) + 1
    for start in range(0, len(test), block):
        scores, indices = find_nearest(test[start : start + block], train, max(counts), accelerator, block)
        weights = ((scores.double() - scores[:, :1]) / temperature).exp()  # relative to the nearest, as exp overflows
        votes = torch.zeros(len(scores), classes, dtype=torch.float64)
        done = 0
        for count in sorted(found):
            votes.scatter_add_(1, labels[indices[:, done:count]], weights[:, done:count])
            found[count].append(votes.argmax(1))
            done = count
    return {count: torch.cat(parts) for count, parts in found.items()}


def find_nearest(
    queries: torch.Tensor, train: torch.Tensor, count: int, accelerator: Accelerator, block: int = BLOCK
) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``count`` nearest of ``train`` [N, D] for ``queries`` [Q, D], nearest first, on the CPU.

    Returns scores, float32 [Q, count], and indices, int64 [Q, count].
    """
    part = accelerator.put(queries)
    best: torch.Tensor | None = None
    for left in range(0, len(train), block):
        scores = scores_of(part, accelerator.put(train[left : left + block]))
        # distinct keys of the bits of the score and, below, the index: topk alone has no order among equal scores
        bits = _flip((scores + 0.0).view(torch.int32))  # + 0.0 makes -0.0 equal to 0.0
        keys = (bits.long() << 32) | (_INDEX - torch.arange(left, left + scores.shape[1], device=scores.device))
        best = keys if best is None else torch.cat([best, keys], 1)
        best = best.topk(min(count, best.shape[1]), dim=1).values
    assert best is not None
    bits = (best >> 32).to(torch.int32)
    return _flip(bits).view(torch.float32).cpu(), (_INDEX - (best & _INDEX)).cpu()


def find_others(queries: torch.Tensor, index: torch.Tensor, count: int, accelerator: Accelerator) -> torch.Tensor:
    """The ``count`` nearest of the rows of ``index`` [N, D] for ``queries`` [N, D], without the row of the same number.

    Returns their numbers, int64 [N, count] on the CPU, nearest first. ``count`` is below N.
    """
    parts = []
    for start in range(0, len(queries), BLOCK):
        nearest = find_nearest(queries[start : start + BLOCK], index, count + 1, accelerator)[1]
        others = nearest != torch.arange(start, start + len(nearest))[:, None]
        others[others.all(dim=1), -1] = False  # its own row is not among them
        parts.append(nearest[others].view(len(nearest), count))
    return torch.cat(parts)


def shared_neighbours(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The share of ``wanted`` neighbours int64 [N, k] that are among those ``found``, mean over the rows."""
    return float((found[:, :, None] == wanted[:, None, :]).any(dim=1).double().mean())


def _flip(bits: torch.Tensor) -> torch.Tensor:
    """Bits of float32 as int32 in the order of the floats, and back."""
    return torch.where(bits < 0, bits ^ _SIGN, bits)


@dataclass(frozen=True)
class Probe:
    """``weights`` float64 [C, D + 1] of standardised features and a one, on the device, and the chosen ``l2``."""

    mean: torch.Tensor
    scale: torch.Tensor
    weights: torch.Tensor
    l2: float

    def inputs(self, features: torch.Tensor) -> torch.Tensor:
        """Features [B, D] on the device -> float64 [B, D + 1], of which products with ``weights`` are the logits."""
        return _standardise(features, self.mean, self.scale)


def fit_probe(features: torch.Tensor, labels: np.ndarray, l2: Sequence[float], accelerator: Accelerator) -> Probe:
    """Fit a probe to finite features, float32 [N, D] on the CPU, with classes int64 [N], all of 0 to the highest.

    Of several ``l2``, the one with the most hits among the images of ``hold_out`` is chosen, of equal ones the largest;
    then all images are fitted.
    """
    blocks = [features[start : start + PROBE_BLOCK] for start in range(0, len(features), PROBE_BLOCK)]
    sums = [accelerator.put(part).double().sum(0) for part in blocks]
    mean = torch.stack(sums).sum(0) / len(features)
    squares = [(accelerator.put(part).double() - mean).square().sum(0) for part in blocks]
    deviation = (torch.stack(squares).sum(0) / len(features)).sqrt()
    scale = torch.where(deviation > _CONSTANT, deviation, 1.0)
    data = _Data(features, torch.from_numpy(labels), mean, scale, accelerator)
    weights = torch.zeros(int(labels.max()) + 1, features.shape[1] + 1, dtype=torch.float64, device=data.mean.device)
    chosen = l2[0]
    if len(l2) > 1:
        held = hold_out(labels)
        inside, outside = np.flatnonzero(~held), np.flatnonzero(held)
        most, best = -1, weights
        for value in sorted(l2, reverse=True):
            weights = _fit(data, inside, weights, value)  # from the last one's weights, which are near
            hits = sum(int(((x @ weights.T).argmax(1) == classes).sum()) for x, classes in data.blocks(outside))
            if hits > most:
                most, best, chosen = hits, weights, value
        weights = best
    return Probe(data.mean, data.scale, _fit(data, np.arange(len(labels)), weights, chosen), chosen)


def hold_out(labels: np.ndarray) -> np.ndarray:
    """Every fifth image of each class, in their order -> bool [N]; none of a class with fewer than five."""
    held = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        held[np.flatnonzero(labels == label)[FOLD - 1 :: FOLD]] = True
    return held


@dataclass(frozen=True)
class _Data:
    features: torch.Tensor
    labels: torch.Tensor
    mean: torch.Tensor
    scale: torch.Tensor
    accelerator: Accelerator

    def blocks(self, rows: np.ndarray) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Standardised features float64 [B, D + 1] and classes [B] of some rows, on the device."""
        for start in range(0, len(rows), PROBE_BLOCK):
            part = torch.from_numpy(rows[start : start + PROBE_BLOCK])
            x = _standardise(self.accelerator.put(self.features[part]), self.mean, self.scale)
            yield x, self.accelerator.put(self.labels[part])


def _fit(data: _Data, rows: np.ndarray, start: torch.Tensor, l2: float) -> torch.Tensor:
    weights = start.clone()
    optimizer = torch.optim.LBFGS(
        [weights], max_iter=_ITERATIONS, tolerance_grad=_GRADIENT, tolerance_change=0, history_size=10,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> torch.Tensor:
        with torch.no_grad():
            loss, gradient = weights.new_zeros(()), torch.zeros_like(weights)
            for x, classes in data.blocks(rows):
                log_p = torch.log_softmax(x @ weights.T, 1)
                loss -= log_p.gather(1, classes[:, None]).sum()
                p = log_p.exp_()
                p.scatter_add_(1, classes[:, None], -p.new_ones(len(p), 1))
                gradient += p.T @ x
            free = torch.cat([weights[:, :-1], weights.new_zeros(len(weights), 1)], 1)  # without the bias
            weights.grad = gradient / len(rows) + l2 * free
            return loss / len(rows) + l2 / 2 * free.square().sum()

    optimizer.step(closure)
    return weights


def _standardise(features: torch.Tensor, mean: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    x = (features.double() - mean) / scale
    return torch.cat([x, x.new_ones(len(x), 1)], 1)
