"""One selection of a view at a time: two of one name would remove each other's parts and rows.

A local dataset has a lock file for each view. In an object store a selection creates ``views/<name>/selection.json`` by
a conditional put, and writes it again while it runs; one that was killed expires.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from reinforce.dataset.files.store import Store
from reinforce.errors import StorageError, UserError
from reinforce.source.views import FOLDER

_FILE = "selection.json"
_RENEWED, _EXPIRES = 20.0, 120.0  # seconds
_ATTEMPTS = 5
_LOG = logging.getLogger(__name__)


@contextlib.contextmanager
def lock_view(store: Store, view: str) -> Iterator[Callable[[], None]]:
    """Lock a view against a second selection. Yields what raises UserError if the lock was lost.

    Raises UserError if another selection has it.
    """
    if store.local:
        with _local_lock(store, view):
            yield lambda: None
        return
    claim = _Claim(store, view)
    claim.take()
    stopped = threading.Event()
    thread = threading.Thread(target=claim.renew, args=(stopped,), daemon=True)
    thread.start()
    try:
        yield claim.check
    finally:
        stopped.set()
        thread.join()
        claim.release()


@contextlib.contextmanager
def _local_lock(store: Store, view: str) -> Iterator[None]:
    import fcntl

    folder = Path(store.path(".tmp"))
    with contextlib.ExitStack() as stack:
        with store.storage_errors("written", FOLDER, view):
            folder.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(folder / f"select-{view}.lock", "a+"))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            raise _busy(store, view, file.read(100).strip()) from error
        file.truncate(0)
        file.write(f"pid {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def _busy(store: Store, view: str, who: str) -> UserError:
    return UserError(
        f"another selection is making view {view} of {store.url}{f' ({who})' if who else ''}. Wait until it ends, or "
        "set another `name`."
    )


class _Claim:
    """The claim of this selection on a view of an object store."""

    def __init__(self, store: Store, view: str) -> None:
        self._store, self._view, self._path = store, view, (FOLDER, view, _FILE)
        self._token, self._lost = uuid.uuid4().hex, False

    def take(self) -> None:
        """Raises UserError if another selection has the view."""
        for _ in range(_ATTEMPTS):
            found = self._read()
            if found is None:
                self._store.create(self._json(), *self._path)
                continue  # some stores ignore the condition of the put, so the claim is read back
            if found.get("token") == self._token:
                return
            if not _is_over(found):
                raise _busy(self._store, self._view, f"pid {found.get('pid')} on {found.get('host')}")
            self._store.remove(*self._path)
        raise StorageError(f"{self._store.path(*self._path)} cannot be written: others remove it. Run again.")

    def renew(self, stopped: threading.Event) -> None:
        """Write the claim again until the event is set, or until another selection has taken it."""
        while not stopped.wait(_RENEWED):
            try:
                if (self._read() or {}).get("token") != self._token:
                    self._lost = True
                    return
                self._store.write_bytes(self._json(), *self._path)
            except UserError as error:  # StorageError among them; it is tried again
                _LOG.warning("%s", error)

    def check(self) -> None:
        """Raise UserError if another selection has taken the view, because this one was not heard of for long."""
        if self._lost or (self._read() or {}).get("token") != self._token:
            raise _busy(self._store, self._view, "it began while this one did not reach the storage")

    def release(self) -> None:
        with contextlib.suppress(StorageError):
            if (self._read() or {}).get("token") == self._token:
                self._store.remove(*self._path)

    def _read(self) -> dict[str, Any] | None:
        self._store.fs.invalidate_cache()
        try:
            return self._store.read_json(*self._path)
        except StorageError:
            raise
        except UserError:  # no selection has written it
            return {}

    def _json(self) -> bytes:
        claim = {"token": self._token, "host": socket.gethostname(), "pid": os.getpid(), "time": time.time()}
        return json.dumps(claim).encode()


def _is_over(claim: Mapping[str, Any]) -> bool:
    """Whether the selection that has made a claim has ended without removing it."""
    at, pid = claim.get("time"), claim.get("pid")
    if not isinstance(at, (int, float)) or abs(time.time() - at) > _EXPIRES:
        return True
    if claim.get("host") != socket.gethostname() or not isinstance(pid, int) or pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False
