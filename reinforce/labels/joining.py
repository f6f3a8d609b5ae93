"""Which rows of an index are of the images of samples, for labels and ``reinforce diff``.

``reinforce.datacompdr.matching`` has the rules. A kind of identities after the other, strongest first:

1. The candidates of each sample: a row that was read last, if no other can be of the image, or those of the index.
2. What these state, in the order of the files, so that each row group is read once.
3. The one that agrees most, or why there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from reinforce.datacompdr.matching import (
    ABSENT,
    AMBIGUOUS,
    BROKEN,
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
    proves,
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


class Joined(NamedTuple):
    """A row of an index, and the kind of identity that joined it."""

    shard: int
    row: int
    kind: str


class Why(NamedTuple):
    """Why a sample has no row: the name of a count, and a detail for people."""

    what: str
    detail: str


#: The candidates of samples, by number; None where they are too many.
Rows: TypeAlias = "dict[int, list[RowOf] | None]"


@dataclass(frozen=True)
class IndexedRows:
    """The rows of an ``index``. ``stated`` returns what a row states, ``near`` the rows with some values of a kind, by
    place, that are known without the index. The digests of an ``embedded`` dataset are in its index alone."""

    index: IdentityIndex
    stated: Callable[[RowOf], Identity]
    near: Callable[[IdentityIndex, str, Sequence[str]], Mapping[int, RowOf]]
    embedded: bool


class Joining:
    """Joins samples that state ``own`` with rows. ``unreadable`` are errors that cost a candidate; others end it."""

    def __init__(
        self, rows: IndexedRows, own: Sequence[Identity], unreadable: tuple[type[Exception], ...] = ()
    ) -> None:
        self._rows, self._index, self._own, self._unreadable = rows, rows.index, own, unreadable
        by_index = rows.embedded and DIGEST in rows.index.kinds
        self._digests = self._entries(DIGEST, range(len(own))) if by_index else None

    def join(self, kinds: Sequence[str]) -> tuple[dict[int, Joined], dict[int, Why]]:
        """The row of each sample that has one, and why others have none."""
        joined: dict[int, Joined] = {}
        why: dict[int, Why] = {}
        for kind in kinds:
            settled = {*joined, *(number for number, one in why.items() if one.what == AMBIGUOUS)}
            rows = self._find(kind, [n for n, one in enumerate(self._own) if kind in one and n not in settled])
            stated, broken = self._read(kind, rows)
            for number, of_sample in rows.items():
                found = self._settle(number, kind, stated[number])
                proven = isinstance(found, RowOf) and proves(self._own[number], stated[number][found])
                if of_sample is None:
                    found = Why(AMBIGUOUS, why_ambiguous(kind))
                elif number in broken and not proven:
                    found = Why(BROKEN, broken[number])
                if isinstance(found, RowOf):
                    joined[number] = Joined(*found, kind)
                    why.pop(number, None)
                elif found is not None and (found.what != BROKEN or number not in why):
                    why[number] = found
        for number in {*range(len(self._own))} - {*joined, *why}:
            named = ", ".join(kind for kind in self._own[number] if kind in kinds)
            why[number] = Why(ABSENT, f"none with its {named or KEY}")
        return joined, why

    # -- candidates

    def _find(self, kind: str, numbers: Sequence[int]) -> Rows:
        """The candidates of samples. A copy in the order of the rows needs the index once for each row group."""
        found: Rows = {}
        doubtful: list[int] = []
        missing, probed = numbers, 1
        while missing:
            values = [self._own[number][kind] for number in missing]
            near = {} if kind == KEY else self._rows.near(self._index, kind, values)  # only lone keys join
            for at, row in near.items():
                own, theirs = self._own[missing[at]], self._stated(missing[at], row)
                sure = self._index.is_unique(kind) or proves(own, theirs)
                if sure and not difference(own, theirs, kind):
                    found[missing[at]] = [row]
                else:
                    doubtful.append(missing[at])
            missing = [number for at, number in enumerate(missing) if at not in near]
            part, missing = missing[:probed], missing[probed:]
            indexed = self._candidates(kind, part)
            if missing:
                self._read(kind, indexed)  # so that they are near
            found |= indexed
            probed *= 2
        return found | self._candidates(kind, doubtful)

    def _candidates(self, kind: str, numbers: Sequence[int]) -> Rows:
        """The rows with the same identity by the index. Too many are reduced to those that also agree in other kinds,
        strongest first."""
        found = self._entries(kind, numbers)
        many = [number for number, rows in found.items() if len(rows) > MAX_CANDIDATES]
        for other in KINDS if many else ():
            known = self._entries(other, many) if other != kind else {}
            for number in many:
                both = _common(found[number], known.get(number, _NO_ROWS))
                found[number] = both if len(both) else found[number]
        return {
            number: None if len(rows) > MAX_CANDIDATES and kind not in PROOFS else _rows(rows[:MAX_CANDIDATES])
            for number, rows in found.items()
        }

    def _entries(self, kind: str, numbers: Iterable[int]) -> dict[int, npt.NDArray[np.int64]]:
        """The distinct rows with the hash of each sample that has some, as sorted codes."""
        stating = [number for number in numbers if kind in self._own[number]]
        if kind not in self._index.kinds or not stating:
            return {}
        texts = [*dict.fromkeys(self._own[number][kind] for number in stating)]  # one that many state is looked up once
        hashes = np.array([int(text, 16) if kind == DIGEST else hash_text(text) for text in texts], np.uint64)
        found = self._index.lookup(kind, hashes)
        codes = (found.shards.astype(np.int64) << _ROW_BITS) | found.rows
        order = np.argsort(found.places, kind="stable")
        places, starts = np.unique(found.places[order], return_index=True)
        parts = np.split(codes[order], starts[1:])
        rows = {texts[place]: np.unique(part) for place, part in zip(places.tolist(), parts, strict=False)}
        return {number: rows[text] for number in stating if (text := self._own[number][kind]) in rows}

    # -- rows

    def _read(self, kind: str, rows: Rows) -> tuple[dict[int, dict[RowOf, Identity]], dict[int, str]]:
        """What the candidates of each sample state, and why one cannot be read."""
        found: dict[int, dict[RowOf, Identity]] = {number: {} for number in rows}
        broken: dict[int, str] = {}
        for row, number in sorted((row, number) for number, some in rows.items() for row in some or ()):
            if kind in PROOFS and found[number] and isinstance(self._settle(number, kind, found[number]), RowOf):
                continue  # the others are of the same image
            try:
                found[number][row] = self._stated(number, row)
            except self._unreadable as error:
                broken[number] = str(error)
        return found, broken

    def _stated(self, number: int, row: RowOf) -> Identity:
        """What a row states that is compared with a sample."""
        found = self._rows.stated(row)
        if self._digests is None or DIGEST not in self._own[number]:
            return found
        same = (row.shard << _ROW_BITS | row.row) in self._digests.get(number, _NO_ROWS)
        return {**found, DIGEST: self._own[number][DIGEST] if same else f"another, of {row}"}

    def _settle(self, number: int, kind: str, rows: Mapping[RowOf, Identity]) -> RowOf | Why | None:
        """The row that is of the image of a sample, or why none of several is; None without rows that agree."""
        own, differing, fitting = self._own[number], "", []
        for row, theirs in rows.items():
            if theirs.get(kind) != own[kind] or (kind == KEY and not only_keys(own[KEY], own, theirs)):
                continue  # of a KEY, the row states more; of others, another text has the same hash
            if differs := difference(own, theirs, kind):
                differing = f"{self._index.shards[row.shard]}, row {row.row}, is of another image: {differs}"
            else:
                fitting.append((row, theirs))
        if not fitting:
            return Why(OTHER_IMAGE, differing) if differing else None
        return choose(own, fitting) or Why(AMBIGUOUS, why_ambiguous(kind))


def _common(one: npt.NDArray[np.int64], other: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """What two sorted arrays have in common."""
    few, many = sorted((one, other), key=len)
    return few[np.take(many, np.searchsorted(many, few), mode="clip") == few]


def _rows(codes: npt.NDArray[np.int64]) -> list[RowOf]:
    return [RowOf(code >> _ROW_BITS, code & (1 << _ROW_BITS) - 1) for code in codes.tolist()]
