"""Samples of a shard by its source file, compared with its rows and its quarantine, for ``reinforce validate --count``.

The rows of a Parquet file are in its footer, of which some kilobytes are read. Other files are read as a whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from reinforce.config import Limits
from reinforce.dataset.runs.key_sample import ShardKeys
from reinforce.dataset.validate.key_hashes import hash_keys
from reinforce.parquet.footers import RefusedFile
from reinforce.source.file_types import CSV, JSONL, PARQUET, TAR
from reinforce.source.formats import lines
from reinforce.source.formats.parquet import ParquetFile
from reinforce.source.formats.recognise import format_of_name
from reinforce.source.formats.tar import read_shard
from schemas import Reason

_LINE_BYTES = 2**30

Quarantine = Sequence[Mapping[str, str | None]]


def count_source(url: str, limits: Limits) -> int | None:
    """Samples that a source file has for a run; None if nothing of it can be read. Raises what the storage raises."""
    format_ = format_of_name(url) or TAR
    try:
        if format_ == PARQUET:
            with ParquetFile(url) as file:
                return min(int(file.footer.num_rows), limits.shard_samples)
        if format_ == TAR:
            keys = [item.key for item in read_shard(url, limits, images=False) if item.key is not None]
            return len(ShardKeys.of(keys).hashes) or None
        rows = lines.jsonl_rows(url, _LINE_BYTES) if format_ == JSONL else lines.csv_rows(url)
        return min(sum(1 for _ in rows), limits.shard_samples)
    except (RefusedFile, EOFError):
        return None


def count_stored(url: str, rows: int, keys: ShardKeys, quarantine: Quarantine) -> int | None:
    """Samples of a shard of the dataset: its rows and those that are only in the quarantine of the samples layer.

    ``keys`` are all hashes of its rows by ``hash_keys``. None where a part of a table could not be read, of which the
    quarantine does not say how many rows it had.
    """
    table = format_of_name(url) in (PARQUET, JSONL, CSV)
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
