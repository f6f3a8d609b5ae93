"""The codecs by their names in configs, and codebooks: ``codebooks/<layer>.safetensors`` beside a dataset's layers.

A codebook is fitted once, and stored. Its digest is part of the fingerprint of its layer, and is in dataset.json and in
the footer of each file of the layer. So a codebook that has changed is refused, and nothing is decoded with it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from reinforce.dataset.codecs.base import Arrays, Codec, Codes, FittedCodec, Floats
from reinforce.dataset.codecs.plain import First, Plain, PrincipalComponents, Standardised
from reinforce.dataset.codecs.quantisers import ProductQuantiser, ResidualQuantiser, divisor
from reinforce.errors import UserError
from reinforce.storage import Storage
from reinforce.terminal import escape

CODECS: tuple[type[Codec], ...] = (Plain, First, PrincipalComponents, ProductQuantiser, ResidualQuantiser)


def find_fitted(name: str) -> FittedCodec:
    """The codec that a codebook names. Raises ValueError if there is none."""
    prefix, _, inner = name.rpartition("-")
    codec = Standardised(find_codec(inner)) if prefix == Standardised.prefix else find_codec(name)
    if not isinstance(codec, FittedCodec):
        raise ValueError(f"codec {name!r} has no codebook")
    return codec


@functools.lru_cache
def find_codec(name: str) -> Codec:
    """The codec of a name. Raises ValueError if there is none."""
    for codec in CODECS:
        if re.fullmatch(codec.pattern, name):
            return codec(name)
    raise ValueError(f"there is no codec {name!r}; there are: {'; '.join(codec.example for codec in CODECS)}")


def codecs_for(dim: int) -> list[str]:
    """Names of codecs of each sort that suit vectors of length ``dim``, for the estimates of a plan."""
    first, components, parts, sums = (max(1, dim // of) for of in (2, 4, 8, 24))
    fitted = [f"pca{components}", f"pq{divisor(dim, parts)}", f"rq{min(32, sums)}"]
    return ["float32", "float16", "int8", f"first{first}", *fitted]


FOLDER = "codebooks"
#: Key of a table's metadata with the codebook of its column of codes.
KEY = b"codebook"
_ENTRY = "codebook"  # of the metadata of a file
_MOST_BYTES = 2**30
_KEPT = 64  # codebooks that a process keeps


@dataclass(frozen=True, eq=False)
class Codebook:
    """A codec with the arrays to which it was fitted."""

    codec: FittedCodec
    arrays: Arrays
    facts: Mapping[str, Any] = field(default_factory=dict)

    def encode(self, values: Floats) -> Codes:
        """The codes [..., width] of vectors [..., D]."""
        rows = values.reshape(-1, values.shape[-1])
        if not len(rows):
            return np.zeros((*values.shape[:-1], self.codec.width(values.shape[-1])), self.codec.numbers)
        return self.codec.encode(rows, self.arrays).reshape(*values.shape[:-1], -1)

    def decode(self, codes: Codes) -> Floats:
        """The vectors [..., D] of codes [..., width]. Raises ValueError if they would need more than 1 GiB, since a
        dataset may be untrusted."""
        rows = codes.reshape(-1, codes.shape[-1])
        dim = self.codec.decode(np.zeros((1, rows.shape[1]), rows.dtype), self.arrays).shape[1]
        if len(rows) * dim * 4 > _MOST_BYTES:
            raise ValueError(f"{len(rows):,} codes of vectors of {dim:,} numbers in a row group")
        return self.codec.decode(rows, self.arrays).reshape(*codes.shape[:-1], dim)


@dataclass(frozen=True)
class Place:
    """Where the codebook of a layer is: in the dataset at ``url``, with a digest."""

    url: str
    layer: str
    digest: str

    def metadata(self) -> dict[bytes, bytes]:
        """The metadata of a table with codes."""
        return {KEY: json.dumps([self.url, self.layer, self.digest]).encode()}


def path_of(layer: str) -> tuple[str, str]:
    """The codebook of a layer, in its dataset."""
    return FOLDER, f"{layer}.safetensors"


def save(store: Storage, layer: str, codec: str, recipe: str, arrays: Arrays, facts: Mapping[str, Any]) -> str:
    """Store a codebook, unless another run has stored one of the same ``recipe`` -> the digest of what is stored.

    ``facts`` are what the file states of the sample. A codebook of another recipe that is not in use is replaced.
    """
    from safetensors.numpy import save as to_bytes

    stated = json.dumps({"codec": codec, "recipe": recipe, **facts})  # one entry: the order of several is random
    contiguous = {name: np.ascontiguousarray(array, np.float32) for name, array in arrays.items()}
    content = to_bytes(contiguous, {_ENTRY: stated})
    if not store.create(content, *path_of(layer)):
        if (found := stored(store, layer, recipe)) is not None:
            return found
        store.write_bytes(content, *path_of(layer))
    return _read(store, layer)[1]


def stored(store: Storage, layer: str, recipe: str | None = None) -> str | None:
    """The digest of a layer's codebook, of a recipe if it is given; None if there is none."""
    try:
        content, digest = _read(store, layer)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return digest if recipe is None or _stated(content).get("recipe") == recipe else None


def copy(source: Storage, target: Storage, layer: str, digest: str) -> None:
    """Copy a codebook to another dataset. Raises UserError if it does not have the digest."""
    content = read(source, layer, digest)
    if not target.create(content, *path_of(layer)) and stored(target, layer) != digest:
        target.write_bytes(content, *path_of(layer))


def codebook_of(metadata: Mapping[bytes, bytes] | None) -> Codebook | None:
    """The codebook of a table, by the metadata of its schema; None if it has none. Raises UserError."""
    place = (metadata or {}).get(KEY)
    return None if place is None else load(Place(*json.loads(place)))


@functools.lru_cache(_KEPT)
def load(place: Place) -> Codebook:
    """Read a codebook. Raises UserError if it was lost, does not have the digest, or is not a codebook."""
    from safetensors import SafetensorError
    from safetensors.numpy import load as from_bytes

    store = Storage(place.url)
    content = read(store, place.layer, place.digest)
    try:
        facts, arrays = _stated(content), from_bytes(content)
        codec = find_fitted(str(facts.get("codec")))
        if not codec.fits(arrays):
            raise ValueError("other arrays than those of its codec")
    except (ValueError, LookupError, TypeError, SafetensorError) as error:
        raise UserError(
            f"{store.path(*path_of(place.layer))} is not a codebook of this version ({escape(str(error)[:200])}). "
            "Upgrade, or restore the file."
        ) from None
    return Codebook(codec, arrays, facts)


def read(store: Storage, layer: str, digest: str) -> bytes:
    """The file of a codebook. Raises UserError if it was lost or does not have the digest."""
    path = store.path(*path_of(layer))
    fix = f"Restore it from a copy of the dataset, or drop {layer} and compute it again."
    try:
        content, found = _read(store, layer)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{path}, the codebook of {layer}, is missing, and its codes cannot be decoded. {fix}"
        ) from None
    if found != digest:
        raise UserError(
            f"{path}, the codebook of {layer}, has the digest {found}, and the layer was made with {escape(digest)}: "
            f"it was changed, and nothing is decoded with it. {fix}"
        )
    return content


def _read(store: Storage, layer: str) -> tuple[bytes, str]:
    """The file of a layer's codebook, and its digest of 32 hex digits. Raises FileNotFoundError."""
    content = store.read_bytes(*path_of(layer), limit=_MOST_BYTES)
    return content, hashlib.blake2b(content, digest_size=16).hexdigest()


def _stated(content: bytes) -> Mapping[str, Any]:
    """What the header of a file states; empty if it has no header."""
    length = int.from_bytes(content[:8], "little")
    try:
        found = json.loads(json.loads(content[8 : 8 + length])["__metadata__"][_ENTRY])
    except (ValueError, LookupError, TypeError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
