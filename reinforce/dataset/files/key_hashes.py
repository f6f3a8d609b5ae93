"""Hashes of many keys at once, which take a fifth of the CPU of one call of hashlib for each.

They are not stored, so they may change; those in the records of runs are ``key_sample.ShardKeys.of``.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Hashes = npt.NDArray[np.uint64]


def hash_keys(keys: pa.ChunkedArray | pa.Array) -> Hashes:
    """A 64-bit hash of each key, uint64 [keys].

    Keys that differ have different hashes with near certainty, unless somebody has chosen them. A null key has the hash
    of an empty one.
    """
    from pandas.util import hash_array  # reading, which only digests keys, does not need pandas

    encoded = keys.cast(pa.binary()).fill_null(b"").to_numpy(zero_copy_only=False)
    return np.asarray(hash_array(encoded, categorize=False), np.uint64)


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
