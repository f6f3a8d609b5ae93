"""The parts of a selection, with the results of finished ones kept.

A part's result is small: arrays that the driver adds up. Larger results are the records of a shuffle.
"""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from reinforce.dataset.aligned import layer_errors
from reinforce.dataset.index import Columns, content_of
from reinforce.dataset.shuffle import Shuffle
from reinforce.dataset.store import Store
from reinforce.dataset.view import FOLDER
from reinforce.errors import UserError
from reinforce.processes.parallel import MapWorkers

Arrays = dict[str, npt.NDArray[Any]]
_T = TypeVar("_T")
_ENDING = ".npz"
_MAX_BYTES = 2**33
_FIX = "Finished parts are kept: run the command again on a machine with more memory, or on fewer cores (taskset -c 0)."


@dataclass(frozen=True)
class Parts:
    """Where the results of a selection's parts are: a folder of the dataset at ``url``.

    ``fingerprint`` covers all that they depend on, the states of the files that are read among it.
    """

    url: str
    view: str
    fingerprint: str

    @property
    def store(self) -> Store:
        return _store(self.url)

    def load(self, stage: str, number: int) -> Arrays:
        """The result of a part."""
        try:
            content = self.store.read_bytes(*self._path(stage, number), limit=_MAX_BYTES)
        except FileNotFoundError as error:
            raise UserError(
                f"{self.store.path(*self._folder)} was removed while view {self.view} was being made. Run it again."
            ) from error
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            return dict(arrays)

    def save(self, stage: str, number: int, result: Arrays) -> None:
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **result)  # type: ignore[arg-type]
        self.store.write_bytes(buffer.getvalue(), *self._path(stage, number))

    def shuffle(self, stage: str, dtype: np.dtype[Any], partitions: int) -> Shuffle:
        """The records that the parts of a stage write for the partitions of the next one."""
        return Shuffle(self.url, (*self._folder, stage), dtype, partitions)

    def compute(
        self, workers: MapWorkers, stage: str, compute: Callable[[int, _T], Arrays], items: Sequence[_T]
    ) -> Iterator[Arrays]:
        """``compute(number, item)`` of each item in order. Finished ones are read instead."""
        names = self.store.names(*self._folder, stage)
        finished = {int(name.removesuffix(_ENDING)) for name in names if name.endswith(_ENDING)}
        call = functools.partial(_compute, self, stage, compute)
        missing = [pair for pair in enumerate(items) if pair[0] not in finished]
        found = workers.map(
            call, missing, unit="part", ordered=True, name=lambda one: f"part {one[0]} of {stage}", fix=_FIX
        )
        for number in range(len(items)):
            yield self.load(stage, number) if number in finished else next(found)[1]

    def remove(self, others: bool = False) -> int:
        """Remove the results of all selections of the view, or of ``others`` that were stopped -> how many there were.

        The others had other rules or files.
        """
        names = [name for name in self.store.names(FOLDER, self.view) if name.startswith("parts-")]
        names = [name for name in names if not others or name != self._folder[-1]]
        for name in names:
            with self.store.storage_errors("removed", self.view), contextlib.suppress(FileNotFoundError):
                self.store.fs.rm(self.store.path(FOLDER, self.view, name), recursive=True)
        return len(names)

    @property
    def _folder(self) -> tuple[str, ...]:
        return FOLDER, self.view, f"parts-{self.fingerprint}"

    def _path(self, stage: str, number: int) -> tuple[str, ...]:
        return *self._folder, stage, f"{number:06d}{_ENDING}"


def content_digest(store: Store, columns: Columns, shard: str) -> int:
    """The digest of some columns of the layers of a shard. Raises UserError."""
    return content_of(store, columns, shard, lambda layer: layer_errors(store, layer, shard))


@functools.lru_cache(maxsize=4)
def _store(url: str) -> Store:
    return Store(url)


def _compute(parts: Parts, stage: str, compute: Callable[[int, _T], Arrays], pair: tuple[int, _T]) -> Arrays:
    result = compute(*pair)
    parts.save(stage, pair[0], result)
    return result
