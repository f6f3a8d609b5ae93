"""Rows of an index that may be of the images of samples, and which of several is.

Labels and ``reinforce diff`` join rows in the same way: ``reinforce.datacompdr.matching`` has the rules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from reinforce.datacompdr.matching import (
    AMBIGUOUS,
    DIGEST,
    KEY,
    KINDS,
    MAX_CANDIDATES,
    OTHER_IMAGE,
    PROOFS,
    Identity,
    choose,
    difference,
    only_keys,
    why_ambiguous,
)
from reinforce.labels.identities import hash_text
from reinforce.labels.index import IdentityIndex

_ROW_BITS = 32
_NO_ROWS = np.empty(0, np.int64)


class RowOf(NamedTuple):
    """A row of an index: number of its shard, and row in it."""

    shard: int
    row: int


class Why(NamedTuple):
    """Why a sample has no row: the name of a count, and a detail for people."""

    what: str
    detail: str


class Candidates:
    """Finds the rows of an index that belong to samples, which state ``own``.

    ``stated`` returns what a row states. The digests of an ``embedded`` dataset are in its index alone, so that no
    image is read.
    """

    def __init__(
        self, index: IdentityIndex, own: Sequence[Identity], stated: Callable[[RowOf], Identity], embedded: bool
    ) -> None:
        self._index, self._own, self._stated = index, own, stated
        self._digests = self._entries(DIGEST, range(len(own))) if embedded else None

    def find(self, kind: str, numbers: Iterable[int]) -> dict[int, list[RowOf] | None]:
        """The rows that have the same identity of a kind as some samples by the index, in the order of the files.

        Too many are reduced to those that also agree in other kinds, strongest first. None if too many are left.
        """
        found = self._entries(kind, numbers)
        many = [number for number, rows in found.items() if len(rows) > MAX_CANDIDATES]
        for other in KINDS if many else ():
            if other != kind:
                known = self._entries(other, many)
                for number in many:
                    both = np.intersect1d(found[number], known.get(number, _NO_ROWS), assume_unique=True)
                    found[number] = both if len(both) else found[number]
        return {
            number: None if len(rows) > MAX_CANDIDATES and kind not in PROOFS else _rows(rows[:MAX_CANDIDATES])
            for number, rows in found.items()
        }

    def stated(self, number: int, row: RowOf) -> Identity:
        """What a row states that is compared with a sample."""
        found = self._stated(row)
        if self._digests is None or DIGEST not in self._own[number]:
            return found
        same = _code(row) in self._digests.get(number, _NO_ROWS)
        return {**found, DIGEST: self._own[number][DIGEST] if same else f"another, of {row}"}

    def settle(self, number: int, kind: str, rows: Mapping[RowOf, Identity]) -> RowOf | Why | None:
        """The row that is of the image of a sample, or why none of several is; None without rows that agree."""
        own, differing, fitting = self._own[number], "", []
        for row, theirs in rows.items():
            if theirs.get(kind) != own[kind]:
                continue  # another text with the same hash
            if kind == KEY and not only_keys(own[KEY], own, theirs):
                continue
            if differs := difference(own, theirs, kind):
                differing = f"{self._index.shards[row.shard]}, row {row.row}, is of another image: {differs}"
            else:
                fitting.append((row, theirs))
        if not fitting:
            return Why(OTHER_IMAGE, differing) if differing else None
        return choose(own, fitting) or Why(AMBIGUOUS, why_ambiguous(kind))

    def _entries(self, kind: str, numbers: Iterable[int]) -> dict[int, npt.NDArray[np.int64]]:
        """The distinct rows with the hash of each sample that has some, as sorted codes."""
        stating = [number for number in numbers if kind in self._own[number]]
        if kind not in self._index.kinds or not stating:
            return {}
        texts = [self._own[number][kind] for number in stating]
        hashes = np.array([int(text, 16) if kind == DIGEST else hash_text(text) for text in texts], np.uint64)
        found = self._index.lookup(kind, hashes)
        codes = (found.shards.astype(np.int64) << _ROW_BITS) | found.rows
        order = np.argsort(found.places, kind="stable")
        places, starts = np.unique(found.places[order], return_index=True)
        parts = np.split(codes[order], starts[1:])
        return {stating[place]: np.unique(part) for place, part in zip(places.tolist(), parts, strict=False)}


def _code(row: RowOf) -> int:
    return row.shard << _ROW_BITS | row.row


def _rows(codes: npt.NDArray[np.int64]) -> list[RowOf]:
    return [RowOf(code >> _ROW_BITS, code & (1 << _ROW_BITS) - 1) for code in codes.tolist()]
