"""Reading a reinforced dataset: the layers of each shard zipped by row group, checked to be aligned by key."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import schemas
from reinforce.dataset import vectors
from reinforce.dataset.augment import Augmentation, from_records
from reinforce.dataset.layers import SAMPLES, TRUE_CAPTION, captions_layer, embeddings_layer
from reinforce.dataset.manifest import check_names
from reinforce.dataset.store import MANIFEST, Store
from reinforce.errors import UserError
from reinforce.source.shards import referenced_images


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


class AlignedShard:
    """The open files of one shard's layers."""

    def __init__(self, shard: str, files: Mapping[str, pq.ParquetFile], columns: Mapping[str, Sequence[str]]) -> None:
        self._shard, self._files, self._columns = shard, files, columns
        self.row_groups: int = files[SAMPLES].num_row_groups

    def row_group(self, number: int) -> tuple[pa.Table, Callable[[str], pa.Table]]:
        """The samples of a row group, and a function that reads another layer of it, aligned by key.

        Raises UserError where it is not, and where a file is damaged.
        """
        samples = self._read(SAMPLES, number)
        keys = samples["key"]

        def layer(name: str) -> pa.Table:
            table = self._read(name, number)
            if not table["key"].equals(keys):
                raise _out_of_step(name, self._shard)
            return table

        return samples, layer

    def read(self, number: int) -> dict[str, pa.Table]:
        """All layers of a row group, as ``row_group`` reads them."""
        samples, layer = self.row_group(number)
        return {name: samples if name == SAMPLES else layer(name) for name in self._files}

    def _read(self, name: str, row_group: int) -> pa.Table:
        with read_errors(f"{name}/{self._shard}.parquet"):
            return self._files[name].read_row_group(row_group, self._columns.get(name), use_threads=False)


def _out_of_step(layer: str, shard: str) -> UserError:
    """A file of a layer has other rows than the samples."""
    return UserError(
        f"{layer}/{shard}.parquet does not have the keys of {SAMPLES}/{shard}.parquet: one of them was changed. "
        "Delete the file of the layer and run again."
    )


@dataclass(frozen=True)
class AlignedLayers:
    """Layers of a dataset that are read side by side. ``columns`` restricts what is read of a layer to these."""

    store: Store
    fingerprints: Mapping[str, str]  # by layer, `samples` among them
    columns: Mapping[str, Sequence[str]]

    @contextlib.contextmanager
    def open(self, shard: str, *, whole: bool = True) -> Iterator[AlignedShard]:
        """Open a shard's files, to be read as a ``whole`` or for single row groups.

        Raises UserError where one is missing, damaged or made by another recipe.
        """
        with contextlib.ExitStack() as stack:
            files = {}
            for name, fingerprint in self.fingerprints.items():
                with read_errors(self.store.layer_path(name, shard)):
                    files[name] = stack.enter_context(self.store.open_layer(name, shard, fingerprint, whole=whole))
                if files[name].num_row_groups != files[SAMPLES].num_row_groups:
                    raise _out_of_step(name, shard)
            yield AlignedShard(shard, files, self.columns)


@contextlib.contextmanager
def read_errors(path: str) -> Iterator[None]:
    """Say which file cannot be read, and what to do. Raises UserError."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing. `reinforce run` with its config computes what is missing.") from error
    except Exception as error:  # each driver has its own exceptions, and Arrow several for damage
        raise UserError(
            f"{path} cannot be read ({type(error).__name__}: {error}). If it is damaged, delete it: "
            "`reinforce run` with its config computes what is missing."
        ) from error


class Dataset:
    """Iterates over the samples of the shards that are complete in every chosen layer; see ``open``."""

    def __init__(self, url: str, teachers: Sequence[str] | None, captioners: Sequence[str] | None) -> None:
        self.store = Store(url)
        self.manifest = read_manifest(self.store)
        self.teachers = chosen(url, "teachers", teachers, self.manifest)
        self.captioners = chosen(url, "captioners", captioners, self.manifest)
        wanted = [captions_layer(c) for c in self.captioners]
        wanted += [embeddings_layer(t, w) for t in self.teachers for w in ("images", TRUE_CAPTION, *self.captioners)]
        self.layers = [SAMPLES, *(name for name in wanted if name in self.manifest["layers"])]
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
        fingerprints = {name: self.manifest["layers"][name]["fingerprint"] for name in self.layers}
        with AlignedLayers(self.store, fingerprints, {}).open(shard) as layers:
            yield from map(layers.read, range(layers.row_groups))

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


def read_manifest(store: Store) -> dict[str, Any]:
    """What dataset.json says. Raises UserError where there is no dataset, or one of a newer program."""
    manifest = store.read_json(MANIFEST)
    if manifest is None:
        raise UserError(f"{store.url} is not a reinforced dataset: it has no {MANIFEST}.")
    if manifest["schema_version"] > schemas.SCHEMA_VERSION:
        raise UserError(f"{store.url} was written by a newer version of this program. Upgrade to read it.")
    check_names(manifest, store.url)
    return manifest


def chosen(url: str, kind: str, names: Sequence[str] | None, manifest: Mapping[str, Any]) -> list[str]:
    """The named ``teachers`` or ``captioners``; None: all of them. Raises UserError for one that is not there."""
    known = list(manifest[kind])
    for name in names or []:
        if name not in known:
            raise UserError(f"{url} has no {kind[:-1]} {name!r}; it has: {', '.join(known) or 'none'}.")
    return known if names is None else list(names)
