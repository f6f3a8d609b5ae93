"""The n-th largest of very many numbers of each group, exactly, from counts that shards add up.

A number is an unsigned integer whose order is its own. Each pass over the shards counts the numbers by 16 of its bits,
from the highest ones, among those whose higher bits are already known; so two passes find a float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

_BITS = 16
#: Bits of the integers of ``ordered`` and of hashes.
FLOAT_BITS, HASH_BITS = 32, 48

#: Attributes of ``Counts``.
COLUMNS = ("groups", "bits", "counts")

Ordered = npt.NDArray[np.uint64]
Integers = npt.NDArray[np.int64]


def _none() -> Ordered:
    return np.empty(0, np.uint64)


def ordered(values: npt.NDArray[np.float32]) -> Ordered:
    """Float32 numbers as integers of ``FLOAT_BITS`` in the same order; -0.0 and 0.0 are equal."""
    bits = (values + np.float32(0)).view(np.uint32)
    negative = bits >> 31 == 1
    return np.where(negative, ~bits, bits | np.uint32(2**31)).astype(np.uint64)


def number(value: int) -> float:
    """The float32 of an integer of ``ordered``."""
    bits = np.uint32(value)
    bits = bits & np.uint32(2**31 - 1) if bits >> 31 else ~bits
    return float(bits.view(np.float32))


@dataclass(frozen=True)
class Counts:
    """How often each pair of a group and ``bits`` occurs [pairs], in ascending order of both."""

    groups: Ordered = field(default_factory=_none)
    bits: Ordered = field(default_factory=_none)
    counts: Integers = field(default_factory=lambda: np.empty(0, np.int64))

    @staticmethod
    def sum(parts: Iterable[Counts]) -> Counts:
        """Counts of all parts; they are added up whenever as many have come as there are in the sum."""
        waiting = [Counts()]
        for part in parts:
            waiting.append(part)
            if sum(len(one.bits) for one in waiting[1:]) > len(waiting[0].bits):
                waiting = [Counts._joined(waiting)]
        return Counts._joined(waiting)

    @staticmethod
    def _joined(parts: Sequence[Counts]) -> Counts:
        groups, bits, counts = (np.concatenate([getattr(one, name) for one in parts]) for name in COLUMNS)
        return Counts._of(groups, bits, counts)

    @staticmethod
    def _of(groups: Ordered, bits: Ordered, counts: Integers) -> Counts:
        order = np.lexsort((bits, groups))
        groups, bits = groups[order], bits[order]
        first = np.ones(len(order), np.bool_)
        first[1:] = (groups[1:] != groups[:-1]) | (bits[1:] != bits[:-1])
        starts = np.flatnonzero(first)
        return Counts(groups[starts], bits[starts], np.add.reduceat(counts[order], starts) if len(starts) else counts)


@dataclass(frozen=True)
class Search:
    """What is known of the number ``wanted`` of each group: its bits above the lowest ``left``, as ``prefix`` [groups].

    ``wanted`` counts from the largest number. Before the first pass nothing is known of the groups.
    """

    left: int
    groups: Ordered = field(default_factory=_none)
    prefix: Ordered = field(default_factory=_none)
    wanted: Integers = field(default_factory=lambda: np.empty(0, np.int64))

    def counts(self, groups: Ordered, values: Ordered) -> Counts:
        """How many of the values that may be the number of their group have each value of its next bits."""
        if len(self.groups):
            prefix = self.prefix[np.searchsorted(self.groups, groups)]
            possible = values >> np.uint64(self.left) == prefix
            groups, values = groups[possible], values[possible]
        bits = values >> np.uint64(self.left - _BITS) & np.uint64(2**_BITS - 1)
        return Counts._of(groups, bits, np.ones(len(bits), np.int64))

    def narrowed(self, counts: Counts, top: int | float) -> Search:
        """What is known with the counts of all shards; ``top`` is the wanted number, or share, of each group.

        ``left`` is 0 when ``prefix`` are the numbers. In a group of no more than ``top`` values it is the smallest.
        """
        groups, starts = np.unique(counts.groups, return_index=True)
        sizes = np.add.reduceat(counts.counts, starts) if len(starts) else self.wanted
        wanted = self.wanted
        if not len(self.groups):
            share = np.rint(top * sizes).astype(np.int64) if isinstance(top, float) else np.full(len(sizes), top)
            wanted = np.minimum(np.maximum(share, 1), sizes)
        place = np.repeat(np.arange(len(groups)), np.diff([*starts, len(counts.bits)]))
        above = np.cumsum(sizes)[place] - np.cumsum(counts.counts)  # numbers of the group with larger bits
        possible = np.flatnonzero(above < wanted[place])
        first = possible[np.unique(place[possible], return_index=True)[1]]
        prefix = self.prefix if len(self.groups) else np.zeros(len(groups), np.uint64)
        prefix = (prefix << np.uint64(_BITS)) + counts.bits[first]
        return Search(self.left - _BITS, groups, prefix, wanted - above[first])

    def reached(self, groups: Ordered, values: Ordered) -> npt.NDArray[np.bool_]:
        """Which values are at least the number of their group, once it is known."""
        if not len(self.groups):
            return np.zeros(len(values), np.bool_)
        places = np.minimum(np.searchsorted(self.groups, groups), len(self.groups) - 1)
        return np.asarray((self.groups[places] == groups) & (values >= self.prefix[places]))
