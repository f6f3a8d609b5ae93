"""Schema of ``pairs.parquet``, the image-caption pairs that fine-tuning of a captioner stores with its checkpoints."""

from __future__ import annotations

import pyarrow as pa


def _field(name: str, type_: pa.DataType, description: str) -> pa.Field:
    return pa.field(name, type_, nullable=False, metadata={"description": description})


#: One row per image with captions. The file's metadata contains the ``fingerprint`` of the pairs' source.
PAIRS = pa.schema(
    [
        _field("key", pa.string(), "the sample's key in its shard, as webdataset forms it"),
        _field("url", pa.string(), "the tar or the samples file that holds the image, without what must not be told"),
        _field("offset", pa.int64(), "first byte of the encoded image in the tar, or in all images of the file"),
        _field("length", pa.int64(), "bytes of the encoded image"),
        _field(
            "captions",
            pa.list_(pa.field("element", pa.string(), nullable=False)),
            "the image's captions after the caption policy, at least one",
        ),
        _field("held_out", pa.bool_(), "whether it is judged by and never learnt from"),
    ]
)
