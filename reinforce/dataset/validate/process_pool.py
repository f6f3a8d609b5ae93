"""Threads that read shards for ``reinforce validate``, in this process or, for large datasets, in several.

Python runs one thread of a process at a time, so threads alone would use one core for minutes.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from reinforce.dataset.validate.shard_checks import CheckedShard
from reinforce.dataset.validate.shard_reader import ReadOptions, ShardReader, Shards
from reinforce.errors import UserError
from reinforce.processes.cores import available_cores
from reinforce.processes.prefetch import prefetch
from reinforce.processes.signals import exit_with_parent
from reinforce.storage import Storage

#: Threads of a process, for the latency of storage; on a local disk, more of them only wait for each other.
_THREADS, _LOCAL_THREADS = 16, 4
_BATCH = 64  # shards that are read together; their results are one message of a process
#: Files and bytes that a process reads in about as much time as it takes to start.
_PROCESS_FILES, _PROCESS_BYTES = 4096, 2**30


def default_processes(quick: bool, files: int, size: int) -> int:
    """How many processes read so many files of ``size`` bytes; ``quick`` reads little of each."""
    worth = max(files / _PROCESS_FILES, 0 if quick else size / _PROCESS_BYTES)
    return max(1, min(available_cores(), int(worth)))


class ShardPool(contextlib.ExitStack):
    """Reads batches of shards in ``processes``; 1 is this one. A context manager."""

    def __init__(self, options: ReadOptions, processes: int) -> None:
        super().__init__()
        self._options, self._processes = options, processes
        if options.quick:
            self._threads, self.batch = _LOCAL_THREADS if Storage(options.url).local else _THREADS, _BATCH
        else:  # a thread holds a row group of the widest layer
            self._threads = max(2, _THREADS // processes)
            self.batch = 2 * self._threads

    def read(self, batches: Iterable[Shards]) -> Iterator[list[CheckedShard]]:
        """Read batches of shards in order, some ahead of the consumer. Raises UserError if a process ends."""
        read: Callable[[Shards], list[CheckedShard]]
        pool: ProcessPoolExecutor | ThreadPoolExecutor
        if self._processes > 1:
            # A fork of a process with threads may hang.
            context = multiprocessing.get_context("spawn")
            pool = ProcessPoolExecutor(self._processes, context, _start, (self._options, self._threads))
            read = _read_in_process
        else:
            reader = ShardReader(self._options, self._threads)
            self.callback(reader.close)
            pool, read = ThreadPoolExecutor(2), reader.read
        self.callback(pool.shutdown, cancel_futures=True)
        try:
            yield from prefetch(pool, read, batches, 2 * self._processes)
        except BrokenProcessPool as error:
            raise UserError(
                "a process that read files has ended, probably for lack of memory. Use fewer of them: --workers 1."
            ) from error


_readers: list[ShardReader] = []  # of a process of the pool


def _start(options: ReadOptions, threads: int) -> None:
    """Set up a process of the pool."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the pool
    exit_with_parent()
    _readers.append(ShardReader(options, threads))


def _read_in_process(shards: Shards) -> list[CheckedShard]:
    return _readers[0].read(shards)
