"""Tables of images as other tools write them, and the result of reading them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from reinforce.source.config import Input
from reinforce.source.formats.base import Shard, read_samples
from reinforce.source.samples import RawSample, Refusal
from tests.helpers.data import config_of

datasets.disable_progress_bars()
#: Written by img2dataset 1.47 with output_format=parquet: 6 images, and 4 with a row of a download that failed.
IMG2DATASET = sorted(Path(__file__).parents[1].glob("helpers/img2dataset/*.parquet"))


def write_huggingface(path: Path, images: Sequence[bytes | None], columns: Mapping[str, Sequence[Any]]) -> str:
    """A Parquet file of the package ``datasets`` with its image feature and other columns."""
    values = [None if image is None else {"bytes": image, "path": None} for image in images]
    rows = datasets.Dataset.from_dict({"image": values, **columns}).cast_column("image", datasets.Image())
    rows.to_parquet(str(path))
    return str(path)


def write_columns(path: Path, columns: Mapping[str, Any], **options: Any) -> Path:
    """A Parquet file of pyarrow."""
    pq.write_table(pa.table(dict(columns)), path, **options)
    return path


def samples_config(source: Path | str, output: Path | str, **changes: Any) -> dict[str, Any]:
    """A config without models."""
    return config_of(str(source), output, **{"captioners": {}, "teachers": {}, **changes})


def stored_rows(dataset: Path | str) -> list[dict[str, Any]]:
    """The rows of the samples of a dataset."""
    return [row for path in sorted(Path(dataset, "samples").iterdir()) for row in pq.read_table(path).to_pylist()]


def read_lazily(path: Path | str, format_: str = "parquet", **spec: Any) -> Iterator[Any]:
    return read_samples(Shard(str(path), "shard", format_), Input(**spec))


def read_table(path: Path | str, format_: str = "parquet", **spec: Any) -> list[RawSample | Refusal]:
    return list(read_lazily(path, format_, **spec))


def outcomes(items: Sequence[RawSample | Refusal]) -> dict[str | None, str]:
    """The caption of each sample by key, or the reason and detail of its refusal."""
    spec = Input()
    return {
        item.key: str(item.caption(spec.captions, spec.limits))
        if isinstance(item, RawSample)
        else f"{item.reason.value}: {item.detail}"
        for item in items
    }
