"""A claim: a file that only one of several processes can create, by a conditional put, and that names its owner.

Some stores ignore the condition, so the file is read back. A claim that was not written for long is over.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from reinforce.errors import DamagedJson, StorageError, UserError
from reinforce.processes.attempts import CLAIMS
from reinforce.storage import Storage

_DAMAGED = "damaged"  # key of what a file is that is no claim


@dataclass(frozen=True)
class ClaimFile:
    """A claim of the process with ``token``, which is over after ``seconds``.

    ``over_here`` decides about one of another process of this machine before that. ``content`` is stored with it.
    """

    storage: Storage
    path: tuple[str, ...]
    token: str
    seconds: float
    over_here: Callable[[Mapping[str, Any]], bool]
    content: Mapping[str, Any] = field(default_factory=dict)

    def take(self, shared: Callable[[Mapping[str, Any]], bool] = lambda claim: False) -> dict[str, Any]:
        """Create the claim unless another process has one -> the claim that is there. Raises StorageError.

        One that is ``shared`` is kept although it is over.
        """
        why = "other processes remove it, or the storage loses it; run again"
        for _ in range(CLAIMS.count):
            found = self.read()
            if found is None:
                self.storage.create(self._json(), *self.path)
            elif found.get("token") == self.token or shared(found) or not self.is_over(found):
                return found
            else:
                if _DAMAGED in found:
                    why = f"it is {found[_DAMAGED]}, each time that it is read back; check the storage, and run again"
                self.storage.remove(*self.path)
        raise StorageError(f"{self.storage.path(*self.path)} cannot be written: {why}.")

    def read(self) -> dict[str, Any] | None:
        """The claim that is there, without keys if it is none. Raises StorageError."""
        try:
            self.storage.fs.invalidate_cache()
            return self.storage.read_json(*self.path)
        except DamagedJson as error:  # no process has written it, or the storage has not stored it
            return {_DAMAGED: error.args[1]}
        except StorageError:
            raise
        except UserError:
            return {}

    def is_over(self, claim: Mapping[str, Any]) -> bool:
        at = claim.get("time")
        if not isinstance(at, (int, float)) or abs(time.time() - at) > self.seconds:
            return True
        return claim.get("host") == socket.gethostname() and self.over_here(claim)

    def renew(self) -> None:
        self.storage.write_bytes(self._json(), *self.path)

    def release(self) -> None:
        """Remove the claim if it is this process's, or no claim."""
        with contextlib.suppress(StorageError, FileNotFoundError):
            if (found := self.read()) and (found.get("token") == self.token or _DAMAGED in found):
                self.storage.remove(*self.path)

    def _json(self) -> bytes:
        owner = {"token": self.token, "host": socket.gethostname(), "pid": os.getpid(), "time": time.time()}
        return json.dumps({**self.content, **owner}, ensure_ascii=False).encode()
