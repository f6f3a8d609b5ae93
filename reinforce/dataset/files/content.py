"""What identifies the content of layer files: digests of their columns and keys, and states that listings show.

A state is a hash of the size and the ETag, or modification time, of a file. Equal states mean equal content; a copy of
a dataset has other states and the same content. Digests are found by opening the files.

Hashes of many keys at once take a fifth of the CPU of one call of hashlib for each. They are not stored, so they may
change; those in the records of runs are ``key_sample.ShardKeys.of``.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from reinforce.dataset.files.layer_file import RefusedFile
from reinforce.dataset.files.listing import list_folders
from reinforce.dataset.files.store import Store
from reinforce.errors import StorageError, UserError

#: The columns of each layer whose content is compared; None for all.
Columns: TypeAlias = "Mapping[str, Sequence[str] | None]"
Errors: TypeAlias = "Callable[[str], AbstractContextManager[None]]"
Hashes = npt.NDArray[np.uint64]


def states_of(store: Store, layers: Iterable[str], shards: Sequence[str]) -> array[int]:
    """The state of the files of some layers together [shards]; 0 where one is missing, or its time is unknown."""
    names = pa.array(shards, pa.string())
    listings = list_folders(store, sorted(layers), states=True)
    known = np.logical_and.reduce([listing.has(names) for listing in listings.values()])
    states = np.stack([listing.sizes_of(names) for listing in listings.values()], axis=1)
    known &= (states != 0).all(axis=1)
    hashes = (hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in states)
    numbers = (int.from_bytes(digest, "little", signed=True) for digest in hashes)
    return array("q", (number if one else 0 for number, one in zip(numbers, known.tolist(), strict=True)))


def content_of(store: Store, columns: Columns, shard: str, errors: Errors | None = None) -> int:
    """Digest of the content of some layers of a shard. Raises as ``Store.open_layer``, and StorageError.

    ``errors`` returns what turns the errors of a layer into others.
    """
    digest = hashlib.blake2b(digest_size=8)
    for layer in sorted(columns):
        named = errors(layer) if errors else store.storage_errors("read", layer, f"{shard}.parquet")
        with named, store.open_layer(layer, shard, whole=False) as file:
            digest.update(f"{layer}\0".encode() + file.content(columns[layer]))
    return int.from_bytes(digest.digest(), "little")


def find_content(store: Store, columns: Columns, shard: str) -> int | None:
    """``content_of`` a shard; None if one of its files is missing or damaged."""
    try:
        return content_of(store, columns, shard)
    except StorageError:
        raise
    except (FileNotFoundError, NotADirectoryError, RefusedFile, UserError):
        return None


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
