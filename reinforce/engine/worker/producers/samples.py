"""The samples: rows as they were read from the source."""

from __future__ import annotations

import hashlib
from functools import cached_property
from typing import Any

import pyarrow as pa

from reinforce.dataset.layers import Layer
from reinforce.dataset.store import IMAGES
from reinforce.engine.worker.producers.base import Producer, RowGroupTables
from reinforce.source.samples import RawSample
from reinforce.source.urls import digest_of
from schemas import IMAGE_DIGEST, LABELLED, TRUE_CAPTIONS


class SamplesProducer(Producer):
    kind = "samples"

    @cached_property
    def _images(self) -> Any:
        """The digest of the digests of referenced images."""
        return hashlib.blake2b(digest_size=8)

    def table(self, layer: Layer, group: RowGroupTables) -> pa.Table:
        schema = self.schema(layer)
        decoded = [row.decoded for row in group.rows]
        columns: dict[str, list[Any]] = {
            "key": group.keys,
            "caption": [row.caption for row in group.rows],
            TRUE_CAPTIONS: [row.captions for row in group.rows],
            "metadata": [one.metadata for one in decoded],
            "width": [one.width for one in decoded],
            "height": [one.height for one in decoded],
            "augmentations": [one.records for one in decoded],
            LABELLED: [one.joined for one in decoded],
        }
        samples = [row.sample for row in group.rows if isinstance(row.sample, RawSample)]
        if "image" in schema.names:
            columns["image"] = [sample.image for sample in samples]
        else:
            columns["image_ref"] = [
                {"url": sample.url or self.source, "offset": sample.offset, "length": len(sample.image)}
                for sample in samples
            ]
            columns[IMAGE_DIGEST] = [digest_of(sample.image) for sample in samples]
        table = pa.table([pa.array(columns[field.name], field.type) for field in schema], schema=schema)
        if IMAGE_DIGEST in schema.names:
            self._images.update(table[IMAGE_DIGEST].to_numpy().tobytes())
        return table

    def footer(self) -> dict[str, str]:
        return {} if self.session.config.embeds_images else {IMAGES: self._images.hexdigest()}
