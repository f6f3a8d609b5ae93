"""Hashes of many keys at once, which take a tenth of the CPU of one call of hashlib for each.

They are not stored, so they may change; those in the records of runs are ``key_sample.ShardKeys.of``.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Hashes = npt.NDArray[np.uint64]

_MAX_BYTES = 256  # of a key that is hashed with others; longer ones would make the array of all large
_WORD = 8
# Constants of MurmurHash3.
_FIRST, _SECOND = np.uint64(0x87C37B91114253D5), np.uint64(0x4CF5AD432745937F)
_STEP, _ADDED = np.uint64(5), np.uint64(0x52DCE729)
_FINAL = (np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53))


def hash_keys(keys: pa.ChunkedArray | pa.Array) -> Hashes:
    """A 64-bit hash of each key, uint64 [keys]: MurmurHash3 of its words of 8 bytes, in one lane.

    Keys that differ have different hashes with near certainty, unless somebody has chosen them. A null key has the hash
    of an empty one.
    """
    offsets, data = _flat(keys)
    lengths = np.diff(offsets)
    hashes = np.empty(len(lengths), np.uint64)
    short = lengths <= _MAX_BYTES
    hashes[short] = _hash_short(data, offsets[:-1][short], lengths[short])
    for row in np.flatnonzero(~short).tolist():
        text = data[offsets[row] : offsets[row + 1]]
        hashes[row] = int.from_bytes(hashlib.blake2b(text.tobytes(), digest_size=_WORD).digest(), "little")
    return hashes


def digest_keys(keys: pa.ChunkedArray | pa.Array) -> bytes:
    """A digest of some keys in their order: equal only for equal keys."""
    offsets, data = _flat(keys)
    lengths = np.diff(offsets)
    if keys.null_count:
        lengths[np.asarray(keys.is_null())] = -1
    digest = hashlib.blake2b(lengths.astype("<i8").tobytes(), digest_size=16)
    digest.update(data[offsets[0] : offsets[-1]].tobytes())
    return digest.digest()


def _flat(keys: pa.ChunkedArray | pa.Array) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]]:
    """The keys as offsets [keys + 1] into bytes."""
    array: Any = keys.combine_chunks() if isinstance(keys, pa.ChunkedArray) else keys
    array = array.cast(pa.large_string())
    _, offsets, data = array.buffers()
    if not len(array) or offsets is None:
        return np.zeros(len(array) + 1, np.int64), np.empty(0, np.uint8)
    values = np.empty(0, np.uint8) if data is None else np.frombuffer(data, np.uint8)
    return np.frombuffer(offsets, np.int64)[array.offset : array.offset + len(array) + 1], values


def _hash_short(data: npt.NDArray[np.uint8], starts: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]) -> Hashes:
    """The hashes of keys at ``starts`` in the data."""
    hashes = lengths.astype(np.uint64)
    count = int(-(-lengths.max(initial=0) // _WORD))
    if count:
        columns = np.arange(count * _WORD)
        places = np.minimum(starts[:, None] + columns, len(data) - 1)
        padded = np.where(columns < lengths[:, None], data[places], np.uint8(0))
        words = np.ascontiguousarray(padded).view("<u8")
        for number in range(count):
            word = _rotated(words[:, number] * _FIRST, 31) * _SECOND
            mixed = _rotated(hashes ^ word, 27) * _STEP + _ADDED
            hashes = np.where(number * _WORD < lengths, mixed, hashes)
    for factor in _FINAL:
        hashes = (hashes ^ (hashes >> np.uint64(33))) * factor
    return hashes ^ (hashes >> np.uint64(33))


def _rotated(values: Hashes, bits: int) -> Hashes:
    rotated: Hashes = (values << np.uint64(bits)) | (values >> np.uint64(64 - bits))
    return rotated
