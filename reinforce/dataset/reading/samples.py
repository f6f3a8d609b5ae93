"""The samples of a row group, and those of a dataset by number: a map-style dataset for the DataLoader of torch."""

from __future__ import annotations

import copy
import itertools
import json
import operator
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from threading import Lock
from typing import Any, Protocol, overload

import numpy as np
import pyarrow as pa

from reinforce.dataset.augment.records import from_records
from reinforce.dataset.files.store import Store
from reinforce.dataset.kinds.registry import kind_of
from reinforce.dataset.kinds.samples import true_captions
from reinforce.dataset.layers import NO_IMAGES, SAMPLES, TRUE_CAPTION, captions_layer, embeddings_layer
from reinforce.dataset.reading.aligned import row_errors
from reinforce.dataset.reading.sample import ImagePolicies, Sample
from reinforce.errors import UserError
from reinforce.seeds import Ints
from reinforce.source.references import ImageRoots, referenced_images
from schemas import IMAGE_DIGEST, image_column

_KEPT_BYTES = 128 * 2**20


def read_samples(
    tables: Mapping[str, pa.Table],
    manifest: Mapping[str, Any],
    teachers: Sequence[str],
    captioners: Sequence[str],
    policies: ImagePolicies,
    roots: ImageRoots,
    with_images: bool = True,
) -> Iterator[Sample]:
    """The samples of one row group. Raises UserError if a row is not what a run writes."""
    column, inputs = image_column(manifest["images"]), (TRUE_CAPTION, *captioners)
    with_images &= manifest["images"] != NO_IMAGES
    if with_images and column not in tables[SAMPLES].column_names:
        raise UserError(f"{policies.url}: column {column}, which dataset.json states, is missing. Restore it.")
    with row_errors(policies.url):
        rows, every = tables[SAMPLES].to_pylist(), true_captions(tables[SAMPLES])
        values = {name: kind_of(name).decode(table) for name, table in tables.items() if name != SAMPLES}
    captions = {c: values.pop(name) for c in captioners if (name := captions_layer(c)) in values}
    vectors = {t: values.pop(name) for t in teachers if (name := embeddings_layer(t, "images")) in values}
    texts = {t: {i: values.pop(name) for i in inputs if (name := embeddings_layer(t, i)) in values} for t in teachers}
    images: Iterator[bytes]
    if not with_images:
        images = itertools.repeat(b"", len(rows))
    elif manifest["images"] == "embed":
        images = (row["image"] for row in rows)
    else:
        digests = [row.get(IMAGE_DIGEST) for row in rows]
        images = referenced_images([row["image_ref"] for row in rows], roots, digests=digests)
    for i, (row, image) in enumerate(zip(rows, images, strict=True)):
        with row_errors(policies.url):
            # A row with fewer true captions than vectors has the same ones again.
            ends = {TRUE_CAPTION: max(1, len(every[i]))}
            sample = Sample(
                key=row["key"],
                caption=row["caption"],
                metadata=json.loads(row["metadata"]) if row["metadata"] else None,
                width=row["width"],
                height=row["height"],
                image=image,
                augmentations=tuple(from_records(row["augmentations"])),
                captions={name: of[i] for name, of in captions.items()},
                images={name: of[i] for name, of in vectors.items()},
                texts={t: {name: one[i][: ends.get(name)] for name, one in of.items()} for t, of in texts.items()},
                values={name: of[i] for name, of in values.items()},
                true_captions=tuple(every[i]),
                policies=policies,
            )
        yield sample


class KeptGroups:
    """Row groups as tables by layer: those that were used last, up to ``_KEPT_BYTES``. A copy by pickle is empty.

    One that could not be read is not kept, so it is read again.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._groups: dict[tuple[str, int], Future[dict[str, pa.Table]]] = {}  # by shard and place, the last used last

    def __reduce__(self) -> tuple[Any, ...]:
        return KeptGroups, ()

    def get(self, key: tuple[str, int], read: Callable[[], dict[str, pa.Table]]) -> dict[str, pa.Table]:
        """Return a row group; one thread reads it while others wait. Raises what ``read`` raises."""
        with self._lock:
            known = self._groups.pop(key, None)
            group = self._groups[key] = known or Future()
        if known is None:
            try:
                group.set_result(read())
            except BaseException as error:
                with self._lock:
                    del self._groups[key]
                group.set_exception(error)  # for those that wait
                raise
            self._drop_oldest()
        return group.result()

    def _drop_oldest(self) -> None:
        left = _KEPT_BYTES
        with self._lock:
            for key, group in reversed([*self._groups.items()]):
                if group.done():
                    left -= sum(table.nbytes for table in group.result().values())
                    if left < 0:
                        del self._groups[key]


class _Rows(Protocol):
    """The part of ``Dataset`` that is used here."""

    store: Store
    shards: list[str]

    def row_group(self, shard: str, group: int) -> dict[str, pa.Table]: ...
    def samples_of(self, shard: str, tables: Mapping[str, pa.Table], places: Sequence[int]) -> list[Sample]: ...


def checked_number(number: Any, total: int) -> int:
    """The number of one of ``total`` samples, from 0 on; a negative one counts from the end.

    Raises IndexError if there is none of it, and UserError if it is none.
    """
    try:
        index = operator.index(number)
    except TypeError:
        raise UserError(f"a sample has a whole number, from 0 to {total - 1:,}; got {number!r:.100}") from None
    if not -total <= index < total:
        raise IndexError(f"sample {index} is out of range: there are {total:,}")
    return index % total


class RowPlaces:
    """Row groups [groups, 3], as ``row_group_table`` gives them, of which rows are found by their number."""

    def __init__(self, groups: Ints) -> None:
        self.groups = groups
        self._ends = np.cumsum(groups[:, 2])

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def find(self, number: int) -> tuple[int, int]:
        """The row group of a row, by its place in the table, and the row's place in the group.

        Raises IndexError. A negative number counts from the end.
        """
        number = checked_number(number, len(self))
        group = int(np.searchsorted(self._ends, number, side="right"))
        return group, number - int(self._ends[group] - self.groups[group, 2])


class Samples(Sequence[Sample]):
    """The samples of a dataset in their order; ``Dataset.samples``.

    ``samples[3]`` is a sample, ``samples[:5]`` a list of samples. A row group is read as a whole: those that were read
    last stay in memory, up to 128 MiB. A process that a DataLoader forks opens the files again.
    """

    def __init__(self, data: _Rows, groups: Ints) -> None:
        self._data, self._places, self._kept, self._process = data, RowPlaces(groups), KeptGroups(), os.getpid()

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return self.__getitems__(range(*index.indices(len(self))))
        [sample] = self.__getitems__([index])
        return sample

    def __getitems__(self, numbers: Iterable[int]) -> list[Sample]:
        """Some samples, as a DataLoader asks for those of a batch."""
        if self._process != os.getpid():  # clients of object stores are not fork-safe
            self._data, self._kept, self._process = copy.copy(self._data), KeptGroups(), os.getpid()
            self._data.store = copy.deepcopy(self._data.store)
        return [self._read(*self._places.find(number)) for number in numbers]

    def _read(self, group: int, place: int) -> Sample:
        number, in_file, _ = self._places.groups[group].tolist()
        shard = self._data.shards[number]
        tables = self._kept.get((shard, in_file), lambda: self._data.row_group(shard, in_file))
        [sample] = self._data.samples_of(shard, tables, [place])
        return sample
