"""Matching of rows of labels, or of another dataset, to samples, by their images.

An identity is a value that a side states of its image. The kinds, strongest first: ``uid``, the SHA-256 of the
downloaded file, the digest of the encoded image, and the URL. Two sides match if one kind agrees and no kind that both
state differs. The key alone joins those of which neither side states anything, and only if the config asks for it. A
digest also differs where a copy was encoded again, so it contradicts only what is weaker: the URL and the key.

A kind of identities after the other, strongest first:

1. The candidates of each sample: a row that was read last, if no other can be of the image, or those with its identity.
2. What these state, in the order of the files, so that each row group is read once.
3. The one that agrees in other kinds too. Where several agree alike, and no SHA-256 or digest shows that they are of
   one image, none is taken.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from reinforce.labels.index import DIGEST, INDEXED, KEY, KINDS, Identity, IdentityIndex, hash_text
from reinforce.labels.members import ABSENT, AMBIGUOUS, BROKEN, OTHER_IMAGE, UNCONFIRMED, Wanted
from teachers.published import JOINS

#: Kinds of which equal values are equal images.
PROOFS = ("sha256", DIGEST)
#: Most candidates of a sample that are compared with it.
MAX_CANDIDATES = 16

T = TypeVar("T")
_SEVERAL = "several have its {}, and nothing else that both sides state distinguishes them"
_ROW_BITS = 32
_NO_ROWS = np.empty(0, np.int64)
#: Rows as numbers, which have the number of a row in their lowest bits.
Codes: TypeAlias = "npt.NDArray[np.int64]"


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


class Candidates(ABC):
    """Rows that samples are joined with.

    ``indexed_digests``: their digests are in an index alone. ``one_proof``: of several that are proven to be of one
    image, the first is taken, because reading costs much. ``repeated``: kinds of which two rows may state the same
    identity.
    """

    indexed_digests = one_proof = False
    repeated: Collection[str] = INDEXED

    @abstractmethod
    def entries(self, kind: str, texts: Sequence[str]) -> dict[str, Codes]:
        """The distinct rows that may state each of these identities, as sorted codes; none for those without rows."""

    @abstractmethod
    def stated(self, row: RowOf) -> Identity:
        """Identities of a row, with its key."""

    @abstractmethod
    def name(self, row: RowOf) -> str:
        """A row, for people."""

    def near(self, kind: str, values: Sequence[str]) -> Mapping[int, RowOf]:
        """Rows with some of ``values``, by place, that are known without ``entries``."""
        return {}


class IndexedRows(Candidates):
    """The rows of an ``index``. Those of an ``embedded`` dataset state no digests."""

    one_proof = True

    def __init__(self, index: IdentityIndex, embedded: bool) -> None:
        self.index, self.indexed_digests = index, embedded and DIGEST in index.kinds
        self.repeated = [kind for kind, count in index.repeated.items() if count]

    def entries(self, kind: str, texts: Sequence[str]) -> dict[str, Codes]:
        if kind not in self.index.kinds:
            return {}
        hashes = np.array([int(text, 16) if kind == DIGEST else hash_text(text) for text in texts], np.uint64)
        found = self.index.lookup(kind, hashes)
        codes = (found.shards.astype(np.int64) << _ROW_BITS) | found.rows
        order = np.argsort(found.places, kind="stable")
        places, starts = np.unique(found.places[order], return_index=True)
        parts = np.split(codes[order], starts[1:])
        return {texts[place]: np.unique(part) for place, part in zip(places.tolist(), parts, strict=False)}

    def name(self, row: RowOf) -> str:
        return f"{self.index.shards[row.shard]}, row {row.row},"


class Joining:
    """Joins samples that state ``own``, by their numbers, with rows. ``unreadable`` are errors that cost a candidate;
    others end it."""

    def __init__(
        self, rows: Candidates, own: Mapping[int, Identity], unreadable: tuple[type[Exception], ...] = ()
    ) -> None:
        self._rows, self._own, self._unreadable = rows, own, unreadable
        self._digests = self._entries(DIGEST, own) if rows.indexed_digests else None

    def join(self, kinds: Sequence[str]) -> tuple[dict[int, Joined], dict[int, Why]]:
        """The row of each sample that has one, and why others have none."""
        joined: dict[int, Joined] = {}
        why: dict[int, Why] = {}
        for kind in kinds:
            settled = {*joined, *(number for number, one in why.items() if one.what == AMBIGUOUS)}
            numbers = [number for number, one in self._own.items() if kind in one and number not in settled]
            rows = self._find(kind, numbers) if numbers else {}
            stated, broken = self._read(kind, rows) if rows else ({}, {})
            for number, of_sample in rows.items():
                found = self._settle(number, kind, stated[number])
                proven = isinstance(found, RowOf) and proves(self._own[number], stated[number][found])
                if of_sample is None:
                    found = Why(AMBIGUOUS, _SEVERAL.format(kind))
                elif number in broken and not proven:
                    found = Why(BROKEN, broken[number])
                if isinstance(found, RowOf):
                    joined[number] = Joined(*found, kind)
                    why.pop(number, None)
                elif found is not None and (found.what != BROKEN or number not in why):
                    why[number] = found
        for number in self._own.keys() - {*joined, *why}:
            named = ", ".join(kind for kind in self._own[number] if kind in kinds)
            why[number] = Why(ABSENT, f"none with its {named or KEY}")
        return joined, why

    def _find(self, kind: str, numbers: Sequence[int]) -> Rows:
        """The candidates of samples. A copy in the order of the rows needs the index once for each row group."""
        found: Rows = {}
        doubtful: list[int] = []
        missing, probed = numbers, 1
        while missing:
            values = [self._own[number][kind] for number in missing]
            near = self._rows.near(kind, values)
            for at, row in near.items():
                own, theirs = self._own[missing[at]], self._stated(missing[at], row)
                sure = kind not in self._rows.repeated or proves(own, theirs)
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
        return found | self._candidates(kind, doubtful) if doubtful else found

    def _candidates(self, kind: str, numbers: Sequence[int]) -> Rows:
        """The rows with the same identity by the index. Too many are reduced to those that also agree in other kinds,
        strongest first."""
        found = self._entries(kind, numbers)
        many = [number for number, rows in found.items() if len(rows) > MAX_CANDIDATES]
        for other in KINDS if many else ():
            known = self._entries(other, many) if other != kind else {}
            for number in many:
                few, most = sorted((found[number], known.get(number, _NO_ROWS)), key=len)  # both are sorted
                both = few[np.take(most, np.searchsorted(most, few), mode="clip") == few]
                found[number] = both if len(both) else found[number]
        several: Rows = {}
        for number, codes in found.items():
            few = codes[:MAX_CANDIDATES]
            rows = [RowOf(code >> _ROW_BITS, code & (1 << _ROW_BITS) - 1) for code in few.tolist()]
            several[number] = None if len(codes) > MAX_CANDIDATES and kind not in PROOFS else rows
        return several

    def _entries(self, kind: str, numbers: Iterable[int]) -> dict[int, Codes]:
        """The distinct rows with the hash of each sample that has some, as sorted codes."""
        stating = [number for number in numbers if kind in self._own[number]]
        texts = [*dict.fromkeys(self._own[number][kind] for number in stating)]  # one that many state is looked up once
        rows = self._rows.entries(kind, texts) if texts else {}
        return {number: rows[text] for number in stating if (text := self._own[number][kind]) in rows}

    def _read(self, kind: str, rows: Rows) -> tuple[dict[int, dict[RowOf, Identity]], dict[int, str]]:
        """Identities of the candidates of each sample, and why one cannot be read."""
        found: dict[int, dict[RowOf, Identity]] = {number: {} for number in rows}
        broken: dict[int, str] = {}
        proven = self._rows.one_proof and kind in PROOFS
        for row, number in sorted((row, number) for number, some in rows.items() for row in some or ()):
            if proven and found[number] and isinstance(self._settle(number, kind, found[number]), RowOf):
                continue  # the others are of the same image
            try:
                found[number][row] = self._stated(number, row)
            except self._unreadable as error:
                broken[number] = str(error)
        return found, broken

    def _stated(self, number: int, row: RowOf) -> Identity:
        """Identities of a row, to be compared with a sample's."""
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
                differing = f"{self._rows.name(row)} is of another image: {differs}"
            else:
                fitting.append((row, theirs))
        if not fitting:
            return Why(OTHER_IMAGE, differing) if differing else None
        # The one that agrees in the strongest kinds; of several of one image the first.
        for other in KINDS:
            if other in own:
                fitting = [one for one in fitting if one[1].get(other) == own[other]] or fitting
        (first, stated), *others = fitting
        same = any({one.get(kind) for _, one in fitting} == {stated.get(kind, "")} for kind in PROOFS)
        return first if same or not others else Why(AMBIGUOUS, _SEVERAL.format(kind))


class TarRows(Candidates):
    """The samples of a tar, with what they state. ``join`` is the weakest kind that may join: one of KINDS, or KEY."""

    def __init__(self, join: str = "url") -> None:
        self.identities: list[Identity] = []
        self._rows: dict[tuple[str, str], list[int]] = {}
        self._joins = JOINS[: JOINS.index(join) + 1]

    def add(self, key: str, identity: Identity) -> None:
        stated = {**identity, KEY: key}
        for kind_and_value in stated.items():
            self._rows.setdefault(kind_and_value, []).append(len(self.identities))
        self.identities.append(stated)

    def entries(self, kind: str, texts: Sequence[str]) -> dict[str, Codes]:
        return {text: np.array(self._rows[kind, text]) for text in texts if (kind, text) in self._rows}

    def stated(self, row: RowOf) -> Identity:
        return self.identities[row.row]

    def name(self, row: RowOf) -> str:
        return repr(self.stated(row)[KEY])

    def match(self, samples: Sequence[Wanted]) -> list[Joined | Why]:
        """The row of each sample, or why it has none."""
        own = {number: {**one.identity, KEY: one.key} for number, one in enumerate(samples)}
        found, why = Joining(self, own).join(self._joins)
        for number, stated in own.items():
            if number in why and why[number].what == ABSENT:
                why[number] = self._why_none(stated)
        return [found[number] if number in found else why[number] for number in own]

    def _why_none(self, own: Identity) -> Why:
        """Why a sample has no row: one that agrees in what may not join it, its key at last, differs or states less."""
        for kind, text in own.items():
            for row in self._rows.get((kind, text), ())[:MAX_CANDIDATES]:
                if differs := difference(own, self.identities[row], kind):
                    return Why(OTHER_IMAGE, f"{self.identities[row][KEY]!r} is of another image: {differs}")
        if (KEY, own[KEY]) not in self._rows:
            return Why(ABSENT, f"none with its {_listed(own)}")
        theirs, join = self.identities[self._rows[KEY, own[KEY]][0]], self._joins[-1]
        if only_keys(own[KEY], own, theirs):
            return Why(UNCONFIRMED, "only the key agrees, which confirms nothing; `join: key` takes it")
        here, there = (_listed([kind for kind in one if kind != KEY] or ["nothing"]) for one in (own, theirs))
        allowed = "" if join in (KEY, KINDS[-1]) else f", and `join: {join}` takes nothing weaker"
        return Why(UNCONFIRMED, f"only the key agrees: {here} stated here, {there} there{allowed}")


def _listed(names: Iterable[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last


def proves(one: Identity, other: Identity) -> bool:
    """Whether the SHA-256 or the digest of two sides shows that they are of one image."""
    return any(kind in one and one[kind] == other.get(kind) for kind in PROOFS)


def difference(one: Identity, other: Identity, agreed: str = KEY) -> str | None:
    """The strongest kind that two sides both state with different values, with both; or None.

    ``agreed`` is the kind that joins them. A digest contradicts only kinds that are weaker.
    """
    for kind in KINDS:
        if kind == DIGEST and agreed in KINDS and KINDS.index(agreed) <= KINDS.index(DIGEST):
            continue
        if kind in one and kind in other and one[kind] != other[kind]:
            return f"{kind} {one[kind][:100]!r} here, {other[kind][:100]!r} there"
    return None


def only_keys(key: str, one: Identity, other: Identity) -> bool:
    """Whether neither side of a ``key`` states anything else of its image.

    Each image has a digest, which counts where both state it. A uid that repeats the key states nothing else.
    """
    stated = {kind for side in (one, other) for kind, value in side.items() if value != key}
    return not stated - {DIGEST} and not (DIGEST in one and DIGEST in other)
