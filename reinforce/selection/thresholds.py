"""The n-th largest of very many numbers, exactly, from counts that shards add up.

A number is an unsigned integer whose order is its own. Each pass over the shards counts the numbers by 16 of its bits,
from the highest ones, among those whose higher bits are already known; so two passes find a float32.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

_BITS = 16
#: Bits of the integers of ``ordered`` and ``hashed``.
FLOAT_BITS, HASH_BITS = 32, 48

Ordered = npt.NDArray[np.uint64]


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
class Search:
    """What is known of the ``wanted``-th largest number: its bits above the lowest ``left``."""

    left: int
    wanted: int = 0
    prefix: int = 0

    def counts(self, values: Ordered) -> npt.NDArray[np.int64]:
        """How many of the values that may be it have each value of its next bits [2 ** 16]."""
        possible = values[values >> np.uint64(self.left) == np.uint64(self.prefix)]
        shift = np.uint64(self.left - _BITS)
        return np.bincount((possible >> shift & np.uint64(2**_BITS - 1)).astype(np.int64), minlength=2**_BITS)

    def narrowed(self, counts: npt.NDArray[np.int64]) -> Search:
        """What is known with the counts of all shards. ``left`` is 0 when ``prefix`` is the number."""
        above = np.cumsum(counts[::-1])[::-1] - counts  # numbers with larger bits
        place = int(np.flatnonzero((above < self.wanted) & (counts > 0))[0])
        prefix = (self.prefix << _BITS) + place
        return replace(self, left=self.left - _BITS, wanted=self.wanted - int(above[place]), prefix=prefix)
