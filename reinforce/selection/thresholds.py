"""The n-th largest of very many numbers of each group, exactly, from counts that shards add up.

A number is an unsigned integer whose order is its own. Each pass over the shards counts the numbers by 16 of its bits,
from the highest ones, among those whose higher bits are already known; so two passes find a float32. Where few numbers
are left, a pass counts them by all of their bits.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

_BITS = 16
_FEW = 2**16  # numbers that are counted by all bits that are left
HASH_BITS = 48

Ordered = npt.NDArray[np.uint64]
Integers = npt.NDArray[np.int64]


def _none() -> Ordered:
    return np.empty(0, np.uint64)


def ordered(values: npt.NDArray[Any]) -> Ordered:
    """Numbers of float32, float64, int64 or uint64 as integers of as many bits in the same order.

    -0.0 and 0.0 are equal.
    """
    size = 8 * values.dtype.itemsize
    unsigned, sign = np.dtype(f"u{size // 8}"), 2 ** (size - 1)
    if values.dtype.kind in "iu":
        return values.view(unsigned) ^ unsigned.type(sign if values.dtype.kind == "i" else 0)
    bits = (values + values.dtype.type(0)).view(unsigned)
    return np.where(bits >= sign, ~bits, bits | unsigned.type(sign)).astype(np.uint64)


def number(value: int, dtype: str) -> int | float:
    """The number of an integer of ``ordered``, which was made of numbers of this type."""
    kind, size = np.dtype(dtype).kind, 8 * np.dtype(dtype).itemsize
    sign, every = 2 ** (size - 1), 2**size - 1
    if kind in "iu":
        return value - (sign if kind == "i" else 0)
    found = value & (sign - 1) if value & sign else ~value & every
    return float(np.array(found, f"u{size // 8}").view(dtype))


class Counts(NamedTuple):
    """Counts of each pair of a group and ``bits`` [pairs], in ascending order of both."""

    groups: Ordered
    bits: Ordered
    counts: Integers

    @staticmethod
    def sum(parts: Iterable[Counts]) -> Counts:
        """Counts of all parts; they are added up whenever as many have come as there are in the sum."""
        waiting = [Counts(_none(), _none(), np.empty(0, np.int64))]
        for part in parts:
            waiting.append(part)
            if sum(len(one.bits) for one in waiting[1:]) > len(waiting[0].bits):
                waiting = [Counts.of(*map(np.concatenate, zip(*waiting, strict=True)))]
        return Counts.of(*map(np.concatenate, zip(*waiting, strict=True)))

    @staticmethod
    def of(groups: Ordered, bits: Ordered, counts: Integers) -> Counts:
        """The sums of counts in any order."""
        order = np.lexsort((bits, groups))
        groups, bits = groups[order], bits[order]
        first = np.ones(len(order), np.bool_)
        first[1:] = (groups[1:] != groups[:-1]) | (bits[1:] != bits[:-1])
        starts = np.flatnonzero(first)
        return Counts(groups[starts], bits[starts], np.add.reduceat(counts[order], starts) if len(starts) else counts)


@dataclass(frozen=True)
class Search:
    """The bits known of the number ``wanted`` of each group: those above the lowest ``left``, as ``prefix`` [groups].

    ``wanted`` counts from the largest number. Before the first pass nothing is known of the groups. ``few`` is whether
    few numbers may be the wanted ones.
    """

    left: int
    groups: Ordered = field(default_factory=_none)
    prefix: Ordered = field(default_factory=_none)
    wanted: Integers = field(default_factory=lambda: np.empty(0, np.int64))
    few: bool = False

    @property
    def step(self) -> int:
        """By how many bits the next pass counts."""
        return self.left if self.few else _BITS

    def counts(self, groups: Ordered, values: Ordered) -> Counts:
        """Counts of the candidate values of each group by their next bits."""
        if len(self.groups):
            prefix = self.prefix[np.searchsorted(self.groups, groups)]
            possible = values >> np.uint64(self.left) == prefix
            groups, values = groups[possible], values[possible]
        bits = values >> np.uint64(self.left - self.step) & np.uint64(2**self.step - 1)
        return Counts.of(groups, bits, np.ones(len(bits), np.int64))

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
        prefix = (prefix << np.uint64(self.step)) + counts.bits[first]
        few = int(counts.counts[first].sum()) <= _FEW
        return Search(self.left - self.step, groups, prefix, wanted - above[first], few)

    def reached(self, groups: Ordered, values: Ordered) -> npt.NDArray[np.bool_]:
        """Which values are at least the number of their group, once it is known."""
        if not len(self.groups):
            return np.zeros(len(values), np.bool_)
        places = np.minimum(np.searchsorted(self.groups, groups), len(self.groups) - 1)
        return np.asarray((self.groups[places] == groups) & (values >= self.prefix[places]))
