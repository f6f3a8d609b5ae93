"""The pyarrow schema of every Parquet file that is written, with its version, and the quarantine reasons. No logic."""

from schemas.layers import (
    AUGMENTATION,
    IDENTITIES,
    IMAGE_DIGEST,
    LABELLED,
    SCHEMA_VERSION,
    TRUE_CAPTIONS,
    captions_schema,
    embeddings_schema,
    identities_schema,
    image_column,
    image_columns,
    index_schema,
    quarantine_schema,
    samples_schema,
    scores_schema,
    view_schema,
    view_shards_schema,
)
from schemas.pairs import PAIRS
from schemas.reasons import WHOLE_SHARD, Reason

__all__ = [
    "AUGMENTATION",
    "IDENTITIES",
    "IMAGE_DIGEST",
    "LABELLED",
    "PAIRS",
    "SCHEMA_VERSION",
    "TRUE_CAPTIONS",
    "WHOLE_SHARD",
    "Reason",
    "captions_schema",
    "embeddings_schema",
    "identities_schema",
    "image_column",
    "image_columns",
    "index_schema",
    "quarantine_schema",
    "samples_schema",
    "scores_schema",
    "view_schema",
    "view_shards_schema",
]
