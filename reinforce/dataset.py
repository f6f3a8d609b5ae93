"""Reading a reinforced dataset: the layers of each shard zipped by row group, checked to be aligned by key."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

import schemas
from reinforce import vectors
from reinforce.augment import Augmentation, from_records
from reinforce.errors import UserError
from reinforce.layers import SAMPLES, captions_layer, embeddings_layer
from reinforce.source import referenced_images
from reinforce.store import MANIFEST, Store


@dataclass(frozen=True)
class Sample:
    """One image-text pair with its reinforcements.

    ``image`` is the encoded image, ``captions`` the synthetic ones by captioner, ``images`` [K, D] by teacher
    (vector k belongs to ``augmentations[k]``), ``texts`` [1 or N, D] by teacher and then by ``caption`` or captioner.
    Float32; where a layer could not serve a row its vectors are NaN and its captions None.
    """

    key: str
    caption: str | None
    metadata: dict[str, Any] | None
    width: int
    height: int
    image: bytes
    augmentations: tuple[Augmentation, ...]
    captions: Mapping[str, list[str] | None]
    images: Mapping[str, np.ndarray]
    texts: Mapping[str, Mapping[str, np.ndarray]]


class Dataset:
    """Iterates over the samples of the shards that are complete in every chosen layer; see ``open``."""

    def __init__(self, url: str, teachers: Sequence[str] | None, captioners: Sequence[str] | None) -> None:
        self.store = Store(url)
        manifest = self.store.read_json(MANIFEST)
        if manifest is None:
            raise UserError(f"{url} is not a reinforced dataset: it has no {MANIFEST}.")
        if manifest["schema_version"] > schemas.SCHEMA_VERSION:
            raise UserError(f"{url} was written by a newer version of this program. Upgrade to read it.")
        self.manifest = manifest
        self.teachers = _chosen(url, "teachers", teachers, manifest)
        self.captioners = _chosen(url, "captioners", captioners, manifest)
        wanted = [captions_layer(c) for c in self.captioners]
        wanted += [embeddings_layer(t, w) for t in self.teachers for w in ("images", "caption", *self.captioners)]
        self.layers = [SAMPLES, *(name for name in wanted if name in manifest["layers"])]
        listings = [self.store.shards(name) for name in self.layers]
        self.shards = sorted(set(listings[0]).intersection(*listings[1:]))
        if not self.shards:
            raise UserError(f"{url} has no shard that is complete in {', '.join(self.layers)}. Finish the run.")

    def __iter__(self) -> Iterator[Sample]:
        for shard in self.shards:
            for tables in self.row_groups(shard):
                yield from self._samples(tables)

    def row_groups(self, shard: str) -> Iterator[dict[str, pa.Table]]:
        """Tables of one row group by layer, aligned by key. Raises UserError where they are not."""
        with contextlib.ExitStack() as stack:
            fingerprints = {name: self.manifest["layers"][name]["fingerprint"] for name in self.layers}
            files = {n: stack.enter_context(self.store.open_layer(n, shard, fingerprints[n])) for n in self.layers}
            for index in range(files[SAMPLES].num_row_groups):
                tables = {name: file.read_row_group(index) for name, file in files.items()}
                keys = tables[SAMPLES]["key"]
                for name, table in tables.items():
                    if not table["key"].equals(keys):
                        raise UserError(
                            f"{name}/{shard}.parquet does not have the keys of {SAMPLES}/{shard}.parquet: one of them "
                            "was changed. Delete the file of the layer and run again."
                        )
                yield tables

    def _samples(self, tables: Mapping[str, pa.Table]) -> Iterator[Sample]:
        rows = tables[SAMPLES].to_pylist()
        encoded = [r["image"] for r in rows] if "image" in tables[SAMPLES].column_names else None
        images = iter(encoded or referenced_images([row["image_ref"] for row in rows]))
        captions = {
            c: tables[captions_layer(c)]["captions"].to_pylist() for c in self.captioners if captions_layer(c) in tables
        }
        arrays = {name: vectors.decode(table) for name, table in tables.items() if name.startswith("embeddings/")}
        of_images = {name.split("/")[1]: v for name, v in arrays.items() if name.endswith("/images")}
        for i, row in enumerate(rows):
            texts: dict[str, dict[str, np.ndarray]] = {t: {} for t in self.teachers}
            for name, values in arrays.items():
                _, teacher, what = name.split("/")
                if what != "images":
                    texts[teacher][what] = values[i]
            yield Sample(
                row["key"],
                row["caption"],
                json.loads(row["metadata"]) if row["metadata"] else None,
                row["width"],
                row["height"],
                next(images),
                tuple(from_records(row["augmentations"])),
                {name: texts_of[i] for name, texts_of in captions.items()},
                {teacher: values[i] for teacher, values in of_images.items()},
                texts,
            )


def open(url: str, teachers: Sequence[str] | None = None, captioners: Sequence[str] | None = None) -> Dataset:
    """Open the dataset at a folder or fsspec URL with the layers of some teachers and captioners; default: all.

    Raises UserError if there is no dataset, or none of that name in it.
    """
    return Dataset(url, teachers, captioners)


def _chosen(url: str, kind: str, names: Sequence[str] | None, manifest: Mapping[str, Any]) -> list[str]:
    known = list(manifest[kind])
    for name in names or []:
        if name not in known:
            raise UserError(f"{url} has no {kind[:-1]} {name!r}; it has: {', '.join(known) or 'none'}.")
    return known if names is None else list(names)
