"""Row groups of a dataset that a process keeps in memory, since samples of them are read one by one."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from threading import Lock
from typing import Any

import pyarrow as pa

_KEPT_BYTES = 128 * 2**20


class KeptGroups:
    """Row groups as tables by layer: those that were used last, up to ``_KEPT_BYTES``. A copy by pickle is empty."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._groups: dict[tuple[str, int], Future[dict[str, pa.Table]]] = {}  # by shard and place, the last used last

    def __reduce__(self) -> tuple[Any, ...]:
        return KeptGroups, ()

    def get(self, key: tuple[str, int], read: Callable[[], dict[str, pa.Table]]) -> dict[str, pa.Table]:
        """Return a row group; one thread reads it while others wait. Raises what ``read`` raises."""
        with self._lock:
            known = self._groups.pop(key, None)
            group = self._groups[key] = known or Future()
        if known is None:
            try:
                group.set_result(read())
            except BaseException as error:
                group.set_exception(error)
            self._drop_oldest()
        return group.result()

    def _drop_oldest(self) -> None:
        left = _KEPT_BYTES
        with self._lock:
            for key, group in reversed([*self._groups.items()]):
                if group.done() and group.exception() is None:
                    left -= sum(table.nbytes for table in group.result().values())
                    if left < 0:
                        del self._groups[key]
