"""Batches for the training loop: streams read by loader processes, and their parts put together."""

from __future__ import annotations

import contextlib
import gc
import itertools
import logging
import multiprocessing
import multiprocessing.connection
import os
import queue
import shutil
import threading
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from torch.utils.data import DataLoader, IterableDataset

from reinforce.errors import UserError
from reinforce.student.config import Data
from reinforce.student.data.assembly import Assembler
from reinforce.student.data.parts import Maker, Part, Tokenize
from reinforce.student.data.stream import Plan, Stream
from reinforce.student.data.survey import survey
from reinforce.training.task import Batch

_LOG = logging.getLogger(__name__)
_SHARED = Path("/dev/shm")  # noqa: S108 - where Linux keeps what processes share
#: Modules that loader processes need and that take seconds to import: the server they are forked from has them.
_PRELOADED = ["open_clip", "reinforce.student.data.stream", "teachers.open_clip_text"]

T = TypeVar("T")
_Made: TypeAlias = "tuple[Batch, Counter[str]]"  # a batch, and rows that were passed over on the way, by reason


class StudentFeed:
    """Batches as ``reinforce.student.data.batch`` describes them, from reinforced datasets.

    ``size`` is the side in pixels of the student's images. ``teachers`` are those whose stored vectors are read,
    instead of ``data.teachers``; for those ``online``, batches have ``views`` and ``texts``. ``pin`` puts batches
    into pinned memory.
    """

    def __init__(
        self,
        data: Data,
        seed: int,
        size: int,
        tokenize: Tokenize,
        teachers: Sequence[str] | None = None,
        online: Sequence[str] = (),
        pin: bool = False,
    ) -> None:
        self._data, self._seed = data, seed
        self._corpora = survey(data, seed, data.teachers if teachers is None else teachers)
        choice, targets = self._corpora[0].choice, self._corpora[0].targets
        self._assembler = Assembler(choice.kinds, targets, tuple(online), pin)
        width = sum(dim for _, dim in targets)
        self._maker = Maker(size, width, tokenize, max(corpus.size for corpus in self._corpora) if online else None)
        self.samples: int = data.samples or sum(corpus.rows for corpus in self._corpora)

    def batches(self, rank: int, ranks: int, batch: int, start: int) -> Generator[Batch]:
        """See ``reinforce.training.task.Feed``. Raises UserError for what is found amiss on the way.

        The number of a step is all that has to be known to go on, so a plain DataLoader does: there is no state of
        its processes to be collected and kept.
        """
        processes = max(1, self._data.workers)
        streams = self._data.streams or ranks * processes
        if streams % (ranks * processes):
            raise UserError(
                f"data.streams ({streams}) must be a multiple of ranks x data.workers ({ranks} x {processes})."
            )
        if batch < processes:
            raise UserError(f"data.workers ({processes}) must be at most the batch of a rank ({batch}).")
        plan = Plan(self._corpora, self._maker, self._seed, streams, self._data.window)
        stream = Stream(plan, rank, ranks, batch, start)
        batches = _ahead(self._by_processes(stream)) if self._data.workers else self._by_this_process(stream)
        unusable, samples = Counter[str](), start * batch * ranks
        with contextlib.closing(batches):
            for assembled, passed_over in batches:
                unusable.update(passed_over)
                epoch, samples = samples // self.samples, samples + batch * ranks
                if unusable and samples // self.samples > epoch:
                    told = ", ".join(f"{reason}: {count:,}" for reason, count in unusable.most_common())
                    _LOG.warning("epoch %d, rank %d: rows that others stood in for: %s", epoch + 1, rank, told)
                    unusable.clear()
                yield assembled

    def _by_this_process(self, stream: Stream) -> Generator[_Made]:
        stream.rooms = self._maker.room(1, 1, stream.batch)
        for part in stream:
            assert part.room is not None
            yield self._assembler.batch([part], [part.room]), part.unusable

    def _by_processes(self, stream: Stream) -> Generator[_Made]:
        processes, start = self._data.workers, stream.step
        # While the parts of one step are put together, a process is at most `prefetch` steps ahead of them.
        depth, rows = self._data.prefetch + 1, -(-stream.batch // processes)
        self._check_shared_memory(processes, depth, rows)
        rooms = stream.rooms = self._maker.room(processes, depth, rows).shared()
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOADED)
        loader: DataLoader[Part | UserError] = DataLoader(
            _Guarded(stream),
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=processes,
            prefetch_factor=self._data.prefetch,
            # A fork of this process would copy locks that threads hold which do not exist in it: Ray's, s3fs's.
            multiprocessing_context=context,
            worker_init_fn=partial(_enter, dict(os.environ)),
        )
        received = iter(loader)
        for step in itertools.count(start):
            parts = []
            for _ in range(processes):
                part = next(received)
                if isinstance(part, UserError):
                    raise part
                parts.append(part)
            made_in = [rooms.at(p, step % depth, slice(len(part.keys))) for p, part in enumerate(parts)]
            yield self._assembler.batch(parts, made_in), sum((part.unusable for part in parts), Counter())

    def _check_shared_memory(self, *rows: int) -> None:
        needed = self._maker.room_bytes(*rows)
        if _SHARED.exists() and (free := shutil.disk_usage(_SHARED).free) < needed:
            raise UserError(
                f"{_SHARED} has {free / 1e6:,.0f} MB free, and loader processes need {needed / 1e6:,.0f} MB there for "
                "batches. Enlarge it (docker run --shm-size), lower data.prefetch, or set data.workers to 0."
            )


class _Guarded(IterableDataset[Any]):
    """A stream as it is sent: without what is in shared memory, and with an error for users as its last item.

    A DataLoader would wrap the error into its own traceback.
    """

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def __iter__(self) -> Iterator[Part | UserError]:
        try:
            for part in self._stream:
                yield part._replace(room=None)
        except UserError as error:
            yield error


def _as_it_is(item: T) -> T:
    return item


def _enter(environment: Mapping[str, str], _: int) -> None:
    """Begin a loader process."""
    os.environ.update(environment)  # a fork server keeps that of its own start
    gc.freeze()  # spares every collection a walk through all modules
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), name="end", daemon=True).start()


def _end_with(sentinel: int) -> None:
    """End with the training: torch watches the process that forked this one, the server, which never ends before."""
    multiprocessing.connection.wait([sentinel])
    os._exit(1)


def _ahead(items: Generator[T]) -> Generator[T]:
    """The same items, made in a thread while the one before is used."""
    ready: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(maxsize=1)
    closed = threading.Event()

    def run() -> None:
        try:
            for item in items:
                ready.put((item, None))
                if closed.is_set():
                    break
        except BaseException as error:
            ready.put((None, error))
        finally:
            items.close()

    thread = threading.Thread(target=run, name="batches", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if error is not None:
                raise error
            assert item is not None
            yield item
    finally:
        closed.set()
        while thread.is_alive():
            with contextlib.suppress(queue.Empty):
                ready.get(timeout=0.05)
