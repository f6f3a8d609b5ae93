"""Files of labels that cannot be read: asked for several times, and remembered by name.

A file that does not exist is asked for as often as a source shard, with the same pauses, because a store may answer 404
for a file that it has. After that, its rows have no labels. What the storage refuses or fails to send is an error of
the storage, for which the run waits.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from reinforce.dataset.files.layer_file import RefusedFile
from reinforce.dataset.files.store import Store
from reinforce.dataset.layers import LABELS
from reinforce.errors import StorageError, UserError
from reinforce.processes.attempts import pause_seconds

_MOST_SECONDS = 60.0  # of pauses of one reader: a step of a shard must not seem to hang
_ABSENT: set[tuple[str, str]] = set()  # URL of labels and file: a process waits once for each
T = TypeVar("T")


class RefusedLabels(StorageError, PermissionError):
    """A file of labels may not be read."""


class MissingLabels(StorageError, FileNotFoundError):
    """A part of labels does not exist, without which nothing can be said of any sample."""


def quarantine_of(labels: str) -> str:
    """The folder below ``quarantine`` whose files name what could not be read of some labels, by shard."""
    return f"{LABELS}/{labels}"


@contextlib.contextmanager
def naming_file(store: Store, layer: str, shard: str) -> Iterator[None]:
    """Turn errors of a storage into StorageError with the path, and into RefusedLabels where it refuses the file.

    FileNotFoundError stays.
    """
    try:
        with store.storage_errors("read", layer, f"{shard}.parquet"):
            yield
    except StorageError as error:
        if isinstance(error.__cause__, PermissionError) and not isinstance(error, PermissionError):
            raise RefusedLabels(str(error)) from error
        raise


@dataclass
class LabelFiles:
    """Reads files of labels in at most ``attempts``. ``unread`` are those that could not be read, with the reason.

    ``check`` raises StorageError if the labels do not exist any more.
    """

    store: Store
    attempts: int
    check: Callable[[], object]
    unread: dict[str, str] = field(default_factory=dict)
    _refused: dict[tuple[str, int | None], str] = field(default_factory=dict)  # files and their row groups
    _waited: float = 0.0

    def read(self, layer: str, shard: str, read: Callable[[], T], group: int | None = None) -> T:
        """What ``read`` returns of a file, or of a row group of it. Raises RefusedFile, now and each later time, if it
        does not exist or is damaged or of another recipe, and StorageError, after which it is read again."""
        name = f"{layer}/{shard}.parquet"
        for place in ((name, None), (name, group)):
            if place in self._refused:
                raise RefusedFile(self._refused[place])
        try:
            with naming_file(self.store, layer, shard):
                return self._read(name, read)
        except StorageError:
            raise
        except FileNotFoundError as error:
            self.check()
            self._refused[name, None] = f"{name} does not exist"
            self.unread[name] = "does not exist"
            raise RefusedFile(self._refused[name, None]) from error
        except (ValueError, UserError) as error:
            self.unread.setdefault(name, f"cannot be read: {error}")
            self._refused[name, group] = str(error)  # the error would keep what was read
            raise RefusedFile(str(error)) from error

    def _read(self, name: str, read: Callable[[], T]) -> T:
        """Read a file, again after a pause where it does not exist. Raises FileNotFoundError."""
        known = (self.store.url, name)
        for attempt in range(1, self.attempts):
            if known in _ABSENT or self._waited > _MOST_SECONDS:
                break
            with contextlib.suppress(FileNotFoundError):
                return read()
            seconds = pause_seconds(attempt)
            time.sleep(seconds)
            self._waited += seconds
            self.store.fs.invalidate_cache()
        try:
            found = read()
        except FileNotFoundError:
            _ABSENT.add(known)
            raise
        _ABSENT.discard(known)
        return found
