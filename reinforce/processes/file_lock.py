"""A lock of a file on a local disk: it ends with the process that has it, also by a kill."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from reinforce.errors import UserError


@contextlib.contextmanager
def lock_file(path: str, busy: str, fix: str) -> Iterator[None]:
    """Lock the file at ``path``. If another process has it, raises UserError: ``busy``, its owner, and the ``fix``."""
    import fcntl

    with contextlib.ExitStack() as stack:
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(path, "a+"))
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error}. Check the disk and the permissions.") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            owner = file.read(100)
            raise UserError(f"{busy}{f' ({owner})' if owner else ''}. {fix}") from error
        file.truncate(0)
        file.write(f"pid {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield
