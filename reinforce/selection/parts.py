"""The parts of a selection: computed in this process, in several, or on Ray, with the results of finished ones kept.

A part's result is small: arrays that the driver adds up. Larger results are *records* in a file of the part, sorted by
the part of the next stage that reads them, which reads its range of each file.
"""

from __future__ import annotations

import contextlib
import functools
import io
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from reinforce.dataset.files.store import Store
from reinforce.dataset.view import FOLDER
from reinforce.errors import UserError
from reinforce.nodes import for_each_shard
from reinforce.processes.cores import available_cores
from reinforce.processes.prefetch import prefetch
from reinforce.processes.signals import exit_with_parent
from reinforce.source.whole_reads import read_range

Arrays = dict[str, npt.NDArray[Any]]
_T = TypeVar("_T")
_ENDING = ".npz"
_MAX_BYTES = 2**33
_READ_AT_ONCE = 16
_AHEAD = 2  # parts in work or done for each core


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

    def save_records(self, stage: str, number: int, blocks: Iterable[npt.NDArray[Any]]) -> None:
        """Write the records of a part, in blocks."""
        with self.store.new_file(*self._path(stage, number, ".records")) as path, open(path, "wb") as file:
            for block in blocks:
                file.write(block.tobytes())

    def load_records(self, stage: str, ranges: npt.NDArray[np.integer], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        """The records of a range [parts, 2] of the file of each part, one after the other."""
        ends = np.cumsum(ranges[:, 1] - ranges[:, 0], dtype=np.int64)
        found = np.empty(int(ends[-1]), dtype)

        def read(number: int) -> None:
            first, last = (int(place) for place in ranges[number])
            if last > first:
                name = self._path(stage, number, ".records")
                with self.store.storage_errors("read", *name):
                    start, end = first * dtype.itemsize, last * dtype.itemsize
                    content = read_range(self.store.fs, self.store.path(*name), start, end)
                found[ends[number] - (last - first) : ends[number]] = np.frombuffer(content, dtype)

        with ThreadPoolExecutor(1 if self.store.local else _READ_AT_ONCE) as pool:
            for _ in prefetch(pool, read, range(len(ranges)), 2 * _READ_AT_ONCE):
                pass
        return found

    def finished(self, stage: str) -> set[int]:
        """Numbers of the parts whose result is kept."""
        names = self.store.names(*self._folder, stage)
        return {int(name.removesuffix(_ENDING)) for name in names if name.endswith(_ENDING)}

    def remove(self) -> None:
        """Remove the results of this and of earlier selections of the view that were killed."""
        self._remove(self._names())

    def remove_others(self) -> int:
        """Remove the results of selections that were killed, and of which rules or files were others; returns how
        many there were."""
        others = [name for name in self._names() if name != self._folder[-1]]
        self._remove(others)
        return len(others)

    def _names(self) -> list[str]:
        return [name for name in self.store.names(FOLDER, self.view) if name.startswith("parts-")]

    def _remove(self, names: Iterable[str]) -> None:
        for name in names:
            with self.store.storage_errors("removed", self.view), contextlib.suppress(FileNotFoundError):
                self.store.fs.rm(self.store.path(FOLDER, self.view, name), recursive=True)

    @property
    def _folder(self) -> tuple[str, ...]:
        return FOLDER, self.view, f"parts-{self.fingerprint}"

    def _path(self, stage: str, number: int, ending: str = _ENDING) -> tuple[str, ...]:
        return *self._folder, stage, f"{number:06d}{ending}"


@functools.lru_cache(maxsize=4)
def _store(url: str) -> Store:
    return Store(url)


class Work:
    """Computes parts: on Ray if ``address`` or the environment names a cluster, else in processes of this machine.

    A context manager.
    """

    def __init__(self, parts: Parts, address: str | None, processes: int | None = None) -> None:
        self._parts, self._address = parts, address or os.environ.get("RAY_ADDRESS")
        self._processes = processes or available_cores()
        self._stack = contextlib.ExitStack()
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Work:
        if self._address:
            from reinforce.cluster import ray_cluster

            self._stack.enter_context(ray_cluster(self._address))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def map(self, stage: str, compute: Callable[[int, _T], Arrays], items: Sequence[_T]) -> Iterator[Arrays]:
        """``compute(number, item)`` of each item in order. Finished ones are read instead."""
        finished = self._parts.finished(stage)
        call = functools.partial(_compute, self._parts, stage, compute)
        missing = [(number, item) for number, item in enumerate(items) if number not in finished]
        found = self._run(call, missing)
        for number in range(len(items)):
            yield self._parts.load(stage, number) if number in finished else next(found)

    def _run(self, call: Callable[[tuple[int, _T]], Arrays], items: Sequence[tuple[int, _T]]) -> Iterator[Arrays]:
        if self._address:
            return self._on_ray(call, dict(items))
        if self._processes == 1 or len(items) < 2:
            return map(call, items)
        return self._in_processes(call, items)

    def _on_ray(self, call: Callable[[tuple[int, _T]], Arrays], items: dict[int, _T]) -> Iterator[Arrays]:
        numbered, left = functools.partial(_call_numbered, call, items), deque(items)
        found: dict[int, Arrays] = {}
        for number, result in for_each_shard(numbered, [*map(str, items)], address=self._address, unit="part"):
            found[int(number)] = result
            while left and left[0] in found:
                yield found.pop(left.popleft())

    def _in_processes(
        self, call: Callable[[tuple[int, _T]], Arrays], items: Sequence[tuple[int, _T]]
    ) -> Iterator[Arrays]:
        if self._pool is None:
            # A fork of a process with threads may hang. The processes are the threads of the arithmetic.
            self._stack.enter_context(_one_thread())
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self._processes, context, _start)
            self._stack.callback(self._pool.shutdown, cancel_futures=True)
        try:
            yield from prefetch(self._pool, call, items, _AHEAD * self._processes)
        except BrokenProcessPool as error:
            raise UserError(
                "a process has ended, probably for lack of memory. Finished parts are kept: run the command again on a "
                "machine with more memory, or on fewer cores (taskset -c 0)."
            ) from error


def _compute(parts: Parts, stage: str, compute: Callable[[int, _T], Arrays], item: tuple[int, _T]) -> Arrays:
    result = compute(*item)
    parts.save(stage, item[0], result)
    return result


def _call_numbered(call: Callable[[tuple[int, _T]], Arrays], items: dict[int, _T], number: str) -> Arrays:
    return call((int(number), items[int(number)]))


def _start() -> None:
    """Set up a process of the pool."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the pool
    exit_with_parent()


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Let the arithmetic of processes that are started use one thread."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        os.environ.pop("OMP_NUM_THREADS")
        if before is not None:
            os.environ["OMP_NUM_THREADS"] = before
