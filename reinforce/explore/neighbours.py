"""Near duplicates and clusters among unit vectors, by faiss.

Vectors are divided among *cells* by k-means. A vector is at home in the cell of the nearest centroid, and visits those
whose border is near: two vectors closer than ``d`` on both sides of a border are at most ``d`` from it together, so one
of them is within ``d / 2``. Each pair that has the home of one of them in common is compared.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from reinforce.dataset import vectors as stored_vectors
from reinforce.explore.parts import Parts
from reinforce.processes.cores import available_cores
from reinforce.processes.imports import require

Floats = npt.NDArray[np.float32]
Halves = npt.NDArray[np.float16]
Mask = npt.NDArray[np.bool_]

#: A vector is in so many cells at most, and visits those whose border is within this part of the distance of near
#: duplicates. With 1/2 and no limit all are found; with these 99.9 %, with two thirds of the copies.
_CELLS, _BORDER = 8, 0.25
_ROUNDS = 10  # of k-means
_TRIES, _CHEAP = 8, 2**24  # of k-means, the best of which counts, where there are so few products of vectors and cells
#: Squared norms of unit vectors in float16 are within the first number of 1, and the cosine of equal ones is within the
#: second one of 1 in float32.
_HALF, _ROUNDING = 2.0**-9, 2.0**-18
_NEXT = 8  # of the nearest vectors that are compared where norms matter
_BLOCK = 256  # rows that are compared at a time
_BRANCH = 4096  # rows whose cells are found at a time
_RESAMPLINGS, _RESAMPLED = 5, 2  # times, and vectors of each centroid
#: A reference with more vectors has lists, of which the nearest are searched.
_SEARCH_ALL, _LISTS_SEARCHED = 2**15, 32


def load_faiss() -> Any:
    """The module. Raises UserError."""
    require("select", "a rule that compares vectors of a teacher", "faiss")
    import faiss

    return faiss


def mean_vectors(table: pa.Table) -> tuple[Halves, Mask]:
    """One vector for each row of a layer of embeddings: the mean over the crops at unit norm [rows, D], and whether a
    row has one [rows]."""
    means = stored_vectors.decode(table).mean(axis=1)
    norms = np.linalg.norm(means, axis=1, keepdims=True)
    valid = np.isfinite(norms[:, 0]) & (norms[:, 0] > 0)
    means[~valid] = 0
    return (means / np.where(valid[:, None], norms, 1)).astype(np.float16), valid


def train(vectors: Halves, cells: int, seed: int) -> Floats:
    """The centroids of k-means [cells, D], of unit norm, by all cores: no other part is computed meanwhile."""
    faiss = load_faiss()
    if cells == 1:
        return vectors[:1].astype(np.float32)
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(available_cores())
    kmeans = faiss.Kmeans(
        vectors.shape[1],
        cells,
        niter=_ROUNDS,
        nredo=_TRIES if len(vectors) * cells <= _CHEAP else 1,
        spherical=True,
        seed=seed,
        min_points_per_centroid=1,
        max_points_per_centroid=len(vectors),
    )
    kmeans.train(vectors.astype(np.float32))
    faiss.omp_set_num_threads(threads)
    centroids: Floats = kmeans.centroids
    return centroids


def spread(vectors: Halves, centroids: Floats, seed: int) -> Floats:
    """Centroids that lie where vectors are, and not only where most of them are [cells, D], as by 2405.15613: those of
    the few nearest vectors of each centroid, found again and again."""
    for _ in range(_RESAMPLINGS):
        cells = nearest(vectors, centroids)
        cosines = np.einsum("nd,nd->n", vectors.astype(np.float32), centroids[cells])
        order = np.lexsort((-cosines, cells))
        rank = np.arange(len(order)) - np.searchsorted(cells[order], cells[order])
        some = np.sort(order[rank < _RESAMPLED])
        if len(some) <= len(centroids):
            break
        centroids = train(vectors[some], len(centroids), seed)
    return centroids


def assign(
    vectors: Halves, centroids: Floats, threshold: float
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], Mask]:
    """The cells of vectors -> row, cell, and whether it is the row's home, of each of their places."""
    index = load_faiss().IndexFlatIP(centroids.shape[1])
    index.add(centroids)
    near = np.sqrt(max(2 - 2 * threshold, 2 * _ROUNDING))
    rows, cells, homes = [np.empty(0, np.int64)], [np.empty(0, np.int64)], [np.empty(0, np.bool_)]
    for start in range(0, len(vectors), _BRANCH):
        cosines, places = index.search(vectors[start : start + _BRANCH].astype(np.float32), min(_CELLS, len(centroids)))
        home = centroids[places[:, 0]]
        between = 2 - 2 * np.einsum("nd,ncd->nc", home, centroids[places])  # squared distances of centroids
        border = (cosines[:, :1] - cosines) / np.sqrt(np.maximum(between, 1e-12))  # distance of the vector from it
        inside = border <= _BORDER * near
        inside[:, 0] = True
        row, column = np.nonzero(inside)
        rows.append(row + start)
        cells.append(places[row, column])
        homes.append(column == 0)
    return np.concatenate(rows), np.concatenate(cells), np.concatenate(homes)


def nearest(vectors: Halves, centroids: Floats) -> npt.NDArray[np.int64]:
    """The centroid of the largest product with each vector [rows]."""
    if not len(vectors):
        return np.empty(0, np.int64)
    faiss = load_faiss()
    _, places = faiss.knn(vectors.astype(np.float32), centroids, 1, metric=faiss.METRIC_INNER_PRODUCT)
    return places[:, 0].astype(np.int64)


def smallest_product(threshold: float, norms: Floats, others: Floats) -> Floats | float:
    """The smallest scalar product of vectors within a threshold; of norms [rows, 1] and [others], or [rows, others].

    Vectors in float16 have norms of about 1, so that near a threshold of 1 products are compared by their norms.
    """
    if threshold <= 1 - _HALF:
        return threshold
    return np.asarray(np.float32(min(threshold, 1 - _ROUNDING)) * norms * others)


def worse_duplicates(
    vectors: Halves, home: Mask, best: npt.NDArray[np.floating[Any]], place: npt.NDArray[np.int64], threshold: float
) -> Mask:
    """Which vectors of a cell [rows] have a near duplicate that is better: of a larger ``best``, or an earlier place.

    Vectors that another cell owns are not compared with each other.
    """
    order = np.lexsort((place, -best, ~home))
    values = vectors[order].astype(np.float32)
    rank = np.empty(len(order), np.int64)
    rank[np.lexsort((place[order], -best[order]))] = np.arange(len(order))
    out = np.zeros(len(order), np.bool_)
    norms, at_home = np.linalg.norm(values, axis=1), int(home.sum())
    for start in range(0, at_home, _BLOCK):
        end = min(start + _BLOCK, at_home)
        smallest = smallest_product(threshold, norms[start:end, None], norms[start:])
        near = values[start:end] @ values[start:].T >= smallest
        some = np.flatnonzero(near.any(axis=0))
        near, row, column = near[:, some], rank[start:end, None], rank[None, start + some]
        out[start + some] |= (near & (column > row)).any(axis=0)
        out[start:end] |= (near & (column < row)).any(axis=1)
    found = np.empty(len(order), np.bool_)
    found[order] = out
    return found


@dataclass(frozen=True)
class Reference:
    """Vectors that samples are compared with, which ``stage`` has."""

    parts: Parts
    stage: str
    threshold: float

    def contains(self, vectors: Halves) -> Mask:
        """Mask of vectors with another within the threshold [rows]."""
        if not len(vectors):
            return np.zeros(0, np.bool_)
        index, others = _index(self.parts, self.stage)
        found = []
        for start in range(0, len(vectors), _BLOCK):
            block = vectors[start : start + _BLOCK].astype(np.float32)
            of_block = np.linalg.norm(block, axis=1, keepdims=True)
            if isinstance(index, np.ndarray):
                products, norms = block @ index.T, others
            else:
                products, places = index.search(block, _NEXT)
                norms = others[places]
            found.append((products >= smallest_product(self.threshold, of_block, norms)).any(axis=1))
        return np.concatenate(found)


@functools.lru_cache(maxsize=2)
def _index(parts: Parts, stage: str) -> tuple[Any, Floats]:
    """What a process searches, made once: all vectors [N, D], or lists of them; and their norms [N]."""
    vectors = parts.load(stage, 0)["vectors"].astype(np.float32)
    norms = np.linalg.norm(vectors, axis=1)
    if len(vectors) <= _SEARCH_ALL:
        return vectors, norms
    faiss, dim = load_faiss(), vectors.shape[1]
    quantizer = faiss.IndexFlatIP(dim)
    index = faiss.IndexIVFFlat(quantizer, dim, 4 * int(np.sqrt(len(vectors))), faiss.METRIC_INNER_PRODUCT)
    index.nprobe = _LISTS_SEARCHED
    index.train(vectors)
    index.add(vectors)
    return index, norms
