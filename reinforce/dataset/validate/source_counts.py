"""Samples of a shard by its source file, compared with its rows and its quarantine, for ``reinforce validate --count``.

The rows of a Parquet file are in its footer, of which some kilobytes are read. Other files are read as a whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from reinforce.config import Limits
from reinforce.dataset.files.key_hashes import hash_keys
from reinforce.dataset.runs.key_sample import ShardKeys
from reinforce.source.formats.recognise import format_of_name
from reinforce.source.formats.registry import find_format
from reinforce.source_formats import DEFAULT
from schemas import Reason

Quarantine = Sequence[Mapping[str, str | None]]


def count_source(url: str, limits: Limits) -> int | None:
    """Number of samples of a source file, or None if it cannot be read. Raises the errors of the storage."""
    return (format_of_name(url) or find_format(DEFAULT)).count(url, limits)


def count_stored(url: str, rows: int, keys: ShardKeys, quarantine: Quarantine) -> int | None:
    """Samples of a shard of the dataset: its rows and those that are only in the quarantine of the samples layer.

    ``keys`` are all hashes of its rows by ``hash_keys``. None if a part of a table could not be read: the
    quarantine does not record how many rows it had.
    """
    format_ = format_of_name(url)
    table = format_ is not None and format_.is_table
    if table and any(row["key"] is None and row["reason"] != Reason.SHARD_SAMPLES for row in quarantine):
        return None
    refused = {row["key"] for row in quarantine if row["key"] is not None}
    others = np.unique(hash_keys(pa.array(sorted(refused), pa.string())))
    only = len(np.setdiff1d(others, keys.hashes))
    repeated = sum(row["reason"] == Reason.DUPLICATE_KEY and row["key"] is not None for row in quarantine)
    return rows + only + (repeated if table else 0)


def limits_of(manifest: Mapping[str, Any]) -> Limits:
    """The limits that the samples of a dataset were read with."""
    known = manifest.get("input", {}).get("limits", {})
    return Limits.model_validate({name: value for name, value in known.items() if name in Limits.model_fields})
