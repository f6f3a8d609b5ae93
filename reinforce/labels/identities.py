"""Identities of the images of a samples layer, by kind, and their hashes.

Published labels have a column for each kind. Of other datasets, ``uid``, ``sha256`` and ``url`` are in the metadata of
a sample, and the digest is that of the encoded image.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TypeAlias
from urllib.parse import quote, urlsplit

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from reinforce.source.captions import parse_json
from reinforce.source.references import image_digest
from schemas import IDENTITIES, IMAGE_DIGEST

#: Digest of the encoded image, in 16 hex digits.
DIGEST = "digest"
#: Kinds of identities, strongest first.
KINDS = ("uid", "sha256", DIGEST, "url")
#: The key of a sample, which is no identity of its image.
KEY = "key"
#: What a side states of an image: values by kind.
Identity: TypeAlias = "Mapping[str, str]"
#: The column of each kind in the samples of published labels.
COLUMNS = dict(zip(KINDS, IDENTITIES, strict=True))
#: Kinds that an index has: also the keys of rows of which nothing else is stated but a digest.
INDEXED = (*COLUMNS, KEY)

Hashes = npt.NDArray[np.uint64]

_DEFAULT_PORTS = {("http", "80"), ("https", "443")}
_NORMAL_URL = re.compile(r"https?://[a-z0-9.-]+/[\w%/:?@!$&'()*+,;=~.-]*", re.ASCII)  # as most are
_KEPT = "%/:?#[]@!$&'()*+,;=~"  # characters of a URL that are not percent-encoded


def identity_of(sidecars: Mapping[str, bytes]) -> Identity:
    """The identity in a sample's members: ``uid``, ``sha256`` and ``url`` of ``json``, and ``url.txt``."""
    document = parse_json(sidecars["json"]) if "json" in sidecars else None
    stated = (kind for kind in KINDS if kind != DIGEST)
    found = {kind: document.get(kind) for kind in stated} if isinstance(document, dict) else {}
    if "url.txt" in sidecars:
        found["url"] = sidecars["url.txt"].decode(errors="replace")
    values = {kind: value.strip() for kind, value in found.items() if isinstance(value, str) and value.strip()}
    return {kind: _NORMAL[kind](value) if kind in _NORMAL else value for kind, value in values.items()}


def normal_url(url: str) -> str:
    """A URL in one spelling: scheme and host in lower case, without default port and fragment, percent-encoded."""
    if _NORMAL_URL.fullmatch(url):
        return url
    try:
        parts = urlsplit(url)
        path = quote(parts.path or "/", _KEPT) + (f"?{quote(parts.query, _KEPT)}" if parts.query else "")
    except ValueError:  # also of lone surrogates
        return url
    user, at, host = parts.netloc.rpartition("@")
    name, colon, port = host.lower().rpartition(":")
    host = name if colon and (parts.scheme, port) in _DEFAULT_PORTS else host.lower()
    return f"{parts.scheme}://{user}{at}{host}{path}"


_NORMAL = {"sha256": str.lower, "url": normal_url}


def columns_of_identities(names: Sequence[str], images: bool = True) -> list[str]:
    """The columns of a samples file with the columns ``names`` that have identities; images only on request."""
    wanted = [*COLUMNS.values(), *([] if {"uid", "sha256"} & {*names} else ["metadata"])]
    found = [name for name in wanted if name in names]
    return [*found, "image"] if images and "image" in names and IMAGE_DIGEST not in names else found


def identities(samples: pa.Table) -> dict[str, pa.Array]:
    """The identities of rows of samples by kind, null where a row states none: texts, and digests as uint64 [rows]."""
    found = {kind: samples[name].combine_chunks() for kind, name in COLUMNS.items() if name in samples.column_names}
    if DIGEST not in found and "image" in samples.column_names:
        found[DIGEST] = pa.array(map(image_digest, samples["image"].to_pylist()), pa.uint64())
    if "metadata" in samples.column_names and "uid" not in found:
        stated = [{} if one is None else identity_of({"json": one.encode()}) for one in samples["metadata"].to_pylist()]
        for kind in COLUMNS:
            if kind != DIGEST:
                found[kind] = pa.array([one.get(kind) for one in stated], pa.string())
    return {kind: found[kind] for kind in COLUMNS if kind in found}


def stated(samples: pa.Table) -> list[Identity]:
    """The identity of each row, with digests in 16 hex digits."""
    columns = {kind: values.to_pylist() for kind, values in identities(samples).items()}
    if DIGEST in columns:
        columns[DIGEST] = [None if value is None else f"{value:016x}" for value in columns[DIGEST]]
    return [
        {kind: values[row] for kind, values in columns.items() if values[row] is not None}
        for row in range(samples.num_rows)
    ]


def lone_keys(samples: pa.Table, found: Mapping[str, pa.Array]) -> pa.Array:
    """The keys of rows, null where one of the identities ``found`` states more: no digest, no uid that is the key."""
    keys = samples["key"].combine_chunks()
    stated = np.zeros(len(keys), bool)
    for kind, values in found.items():
        if kind != DIGEST:
            stated |= pc.fill_null(pc.not_equal(values, keys), False).to_numpy(zero_copy_only=False)
    return pc.if_else(pa.array(stated), None, keys)


def hash_identities(kind: str, values: pa.Array) -> tuple[Hashes, npt.NDArray[np.int64]]:
    """Hashes of the values that are not null, and their places: digests themselves, of texts BLAKE2b-64 [m], [m]."""
    places = np.flatnonzero(values.is_valid().to_numpy(zero_copy_only=False)).astype(np.int64)
    present = values.drop_null()
    if kind == DIGEST:
        return present.to_numpy().astype(np.uint64), places
    hashes = (hash_text(text) for text in present.to_pylist())
    return np.fromiter(hashes, np.uint64, len(present)), places


def hash_text(text: str) -> int:
    """BLAKE2b-64 of a uid, SHA-256, URL or key."""
    return image_digest(text.encode("utf-8", "surrogatepass"))
