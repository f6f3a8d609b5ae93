"""An external shuffle: parts write records sorted by partition, and each partition is then read from all parts.

The file of a part begins with the number of the first record of each partition, and that of all, [partitions + 1]. Who
hands out the partitions reads these once, so that a partition is one request for each part that has records of it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from reinforce.processes.attempts import prefetch
from reinforce.source.urls import read_range
from reinforce.storage import Storage

Ranges = npt.NDArray[np.int32]
_ENDING = ".records"
_END = np.dtype("<i4")
_READ_AT_ONCE = 16


@dataclass(frozen=True)
class Shuffle:
    """Records of type ``dtype`` in ``folder`` of the storage at ``url``, for so many ``partitions``."""

    url: str
    folder: tuple[str, ...]
    dtype: np.dtype[Any]
    partitions: int

    def path(self, part: int) -> tuple[str, ...]:
        return *self.folder, f"{part:06d}{_ENDING}"

    def write(self, part: int, partition: npt.NDArray[np.integer], blocks: Iterable[npt.NDArray[Any]]) -> None:
        """Write the records of a part, in blocks, sorted by their ``partition`` [records]. Raises StorageError."""
        ends = np.searchsorted(partition, np.arange(self.partitions + 1)).astype(_END)
        with _storage(self.url).new_file(*self.path(part)) as path, open(path, "wb") as file:
            file.write(ends.tobytes())
            for block in blocks:
                file.write(block.tobytes())

    def written(self) -> set[int]:
        """The numbers of the parts that are there."""
        names = _storage(self.url).names(*self.folder)
        return {int(name.removesuffix(_ENDING)) for name in names if name.endswith(_ENDING)}

    def ranges(self, parts: int) -> list[Ranges]:
        """Of each partition: its records in the file of each part, first and end [parts, 2]. Raises StorageError."""
        heads = b"".join(self._read([(0, (self.partitions + 1) * _END.itemsize)] * parts))
        ends = np.frombuffer(heads, _END).reshape(parts, self.partitions + 1)
        return [ends[:, number : number + 2] for number in range(self.partitions)]

    def read(self, ranges: Ranges) -> npt.NDArray[Any]:
        """The records of a partition, by part. Raises StorageError."""
        found = np.empty(int((ranges[:, 1] - ranges[:, 0]).sum(dtype=np.int64)), self.dtype)
        first, head = 0, (self.partitions + 1) * _END.itemsize
        for content in self._read((head + self.dtype.itemsize * ranges.astype(np.int64)).tolist()):
            records = np.frombuffer(content, self.dtype)
            found[first : first + len(records)] = records
            first += len(records)
        return found

    def _read(self, ranges: Sequence[Sequence[int]]) -> Iterator[bytes]:
        """The bytes of a range of the file of each part."""
        storage = _storage(self.url)

        def read(part: int) -> bytes:
            start, end = ranges[part]
            if start == end:
                return b""
            with storage.storage_errors("read", *self.path(part)):
                return read_range(storage.fs, storage.path(*self.path(part)), start, end)

        with ThreadPoolExecutor(1 if storage.local else _READ_AT_ONCE) as pool:
            yield from prefetch(pool, read, range(len(ranges)), 2 * _READ_AT_ONCE)


@functools.lru_cache(maxsize=4)
def _storage(url: str) -> Storage:
    return Storage(url)
