"""One selection of a view at a time: two of one name would remove each other's parts and rows.

A local dataset has a lock file for each view. In an object store a selection creates ``views/<name>/selection.json`` by
a conditional put, and writes it again while it runs; one that was killed expires.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import psutil

from reinforce.claim_file import ClaimFile
from reinforce.dataset.files.store import Store
from reinforce.errors import UserError
from reinforce.processes.file_lock import lock_file
from reinforce.source.views import FOLDER

_FILE = "selection.json"
_RENEWED, _EXPIRES = 20.0, 120.0  # seconds
_LOG = logging.getLogger(__name__)


@contextlib.contextmanager
def lock_view(store: Store, view: str) -> Iterator[Callable[[], None]]:
    """Lock a view against a second selection. Yields what raises UserError if the lock was lost.

    Raises UserError if another selection has it.
    """
    busy = f"another selection is making view {view} of {store.url}"
    fix = "Wait until it ends, or set another `name`."
    if store.local:
        with lock_file(store.path(".tmp", f"select-{view}.lock"), busy, fix):
            yield lambda: None
        return
    claim = ClaimFile(store, (FOLDER, view, _FILE), uuid.uuid4().hex, _EXPIRES, _has_ended)
    if (found := claim.take()).get("token") != claim.token:
        raise UserError(f"{busy} (pid {found.get('pid')} on {found.get('host')}). {fix}")
    stopped = threading.Event()

    def check() -> None:
        if not _is_held(claim):
            raise UserError(f"{busy} (it began while this one did not reach the storage). {fix}")

    thread = threading.Thread(target=_renew, args=(claim, stopped), daemon=True)
    thread.start()
    try:
        yield check
    finally:
        stopped.set()
        thread.join()
        claim.release()


def _renew(claim: ClaimFile, stopped: threading.Event) -> None:
    """Write a claim again until the event is set, or until another selection has taken it."""
    while not stopped.wait(_RENEWED):
        try:
            if not _is_held(claim):
                return
            claim.renew()
        except UserError as error:  # StorageError among them; it is tried again
            _LOG.warning("%s", error)


def _is_held(claim: ClaimFile) -> bool:
    return (claim.read() or {}).get("token") == claim.token


def _has_ended(claim: Mapping[str, Any]) -> bool:
    """Whether the process of a claim of this machine has ended."""
    pid = claim.get("pid")
    return isinstance(pid, int) and pid != os.getpid() and not psutil.pid_exists(pid)
