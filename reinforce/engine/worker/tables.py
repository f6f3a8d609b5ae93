"""The pyarrow tables of one row group, one for each kind of layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from reinforce.dataset import vectors
from reinforce.dataset.layers import Layer
from reinforce.engine.decode.row import Row
from reinforce.engine.messages.results import raising_layer_failure
from reinforce.engine.worker.refusals import Refusals
from reinforce.engine.worker.stale_files import OutOfStep
from reinforce.source.references import image_digest
from reinforce.source.samples import RawSample, Refusal
from schemas import IMAGE_DIGEST, Reason


def samples_table(schema: pa.Schema, rows: Sequence[Row], source: str) -> pa.Table:
    """Rows that were read from the source. ``source`` is the shard's URL, for image references."""
    columns: dict[str, list[Any]] = {
        "key": [row.key for row in rows],
        "caption": [row.caption for row in rows],
        "metadata": [row.decoded.metadata for row in rows],
        "width": [row.decoded.width for row in rows],
        "height": [row.decoded.height for row in rows],
        "augmentations": [row.decoded.records for row in rows],
    }
    samples = [row.sample for row in rows if isinstance(row.sample, RawSample)]
    if "image" in schema.names:
        columns["image"] = [sample.image for sample in samples]
    else:
        columns["image_ref"] = [
            {"url": sample.url or source, "offset": sample.offset, "length": len(sample.image)} for sample in samples
        ]
        columns[IMAGE_DIGEST] = [image_digest(sample.image) for sample in samples]
    return pa.table([pa.array(columns[field.name], field.type) for field in schema], schema=schema)


def captions_table(schema: pa.Schema, keys: Sequence[str], captions: Sequence[list[str] | None]) -> pa.Table:
    return pa.table([pa.array(keys, pa.string()), pa.array(captions, pa.list_(pa.string()))], schema=schema)


def vectors_table(
    schema: pa.Schema,
    layer: Layer,
    keys: Sequence[str],
    values: npt.NDArray[np.float32],
    valid: npt.NDArray[np.bool_],
    refusals: Refusals,
) -> pa.Table:
    """Embeddings ``values`` [rows, count, dim], null where ``valid`` [rows] is False.

    A row that is not finite is null, too, and refused. Raises LayerFailure.
    """
    finite = np.isfinite(values).all(axis=(1, 2))
    for key, refused in zip(keys, valid & ~finite, strict=True):
        if refused:
            refusals.add(layer.name, Refusal(key, Reason.NOT_FINITE, f"{layer.model} returned NaN or infinity"))
    with raising_layer_failure(layer.name):
        columns = vectors.encode(values, layer.dtype, valid & finite)
    return pa.table([pa.array(keys, pa.string()), *columns], schema=schema)


def aligned_captions(layer: str, table: pa.Table, keys: Sequence[str]) -> list[list[str] | None]:
    """The captions of a stored row group. Raises OutOfStep unless its rows have these keys, in this order."""
    if table["key"].to_pylist() != list(keys):
        raise OutOfStep(layer)
    captions: list[list[str] | None] = table["captions"].to_pylist()
    return captions
