"""Reference of the files that are written, from ``schemas/``."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa

import schemas
from reinforce_docs.tables import cell, code, table

#: Title -> (path of the files, schema).
FILES: dict[str, tuple[str, pa.Schema]] = {
    "Samples with embedded images": ("samples/<shard>.parquet", schemas.samples_schema("embed", True)),
    "Samples with referenced images": ("samples/<shard>.parquet", schemas.samples_schema("reference", True)),
    "Captions": ("captions/<captioner>/<shard>.parquet", schemas.CAPTIONS_SCHEMA),
    "Embeddings in float16": (
        "embeddings/<teacher>/<what>/<shard>.parquet",
        schemas.embeddings_schema(2, 768, "float16"),
    ),
    "Embeddings in int8": ("embeddings/<teacher>/<what>/<shard>.parquet", schemas.embeddings_schema(2, 768, "int8")),
    "Quarantine": ("quarantine/<layer>/<shard>.parquet", schemas.QUARANTINE_SCHEMA),
    "Index": ("index/<layer>.parquet", schemas.INDEX_SCHEMA),
    "Held-out images of a captioner's training": ("held-out.parquet", schemas.HELD_OUT),
}


def columns(fields: list[pa.Field], path: str = "") -> Iterator[tuple[str, pa.Field]]:
    """(path, field) of every column and of every field inside it, such as ``augmentations[].crop.top``."""
    for field in fields:
        name, inner = path + field.name, field.type
        yield name, field
        while pa.types.is_list(inner):
            name, inner = name + "[]", inner.value_type
        if pa.types.is_struct(inner):
            yield from columns([inner.field(index) for index in range(inner.num_fields)], f"{name}.")


def formats_page() -> str:
    """The page of all schemas."""
    parts = [
        "# Columns of the files\n",
        f"Generated from `schemas/`, version {schemas.SCHEMA_VERSION}. How the files belong together is in "
        "[File formats](../file-formats.md). The shapes of embeddings are those of 2 augmentations and a teacher of "
        "dimension 768.\n",
    ]
    for title, (path, schema) in FILES.items():
        rows = [
            (code(name), cell(_type(field.type)), "yes" if field.nullable else "no", cell(description(field)))
            for name, field in columns(list(schema))
        ]
        parts += [f"## {title}\n", f"`{path}`\n", table(("column", "type", "null allowed", "content"), rows)]
    return "\n".join(parts)


def description(field: pa.Field) -> str:
    """The description in the metadata of a field."""
    return (field.metadata or {}).get(b"description", b"").decode()


def _type(type_: pa.DataType) -> str:
    if pa.types.is_list(type_):
        return f"list of {_type(type_.value_type)}"
    if pa.types.is_struct(type_):
        return "struct"
    if isinstance(type_, pa.FixedShapeTensorType):
        return f"tensor {type_.shape} of {type_.value_type}"
    return str(type_)
