"""Torch's flags belong to the process: who relies on them, and who changes them for a while.

Where several threads launch models at the same time, each is inside ``relying``. What changes a flag is inside
``changing``: it waits until no other thread relies on the flags, and keeps the others out meanwhile. Where nobody
relies on them, nothing waits.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator


class _Users:
    """Threads, by what they do with the flags. Those that wait to change some come before those that will rely."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self.relying: set[int] = set()
        self.changing: int | None = None
        self._waiting = 0

    def start_relying(self, thread: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self.changing is None and not self._waiting)
            self.relying.add(thread)

    def stop_relying(self, thread: int) -> None:
        with self._changed:
            self.relying.discard(thread)
            self._changed.notify_all()

    def start_changing(self, thread: int) -> bool:
        """Returns whether the thread has relied on the flags."""
        with self._changed:
            relied = thread in self.relying
            self.relying.discard(thread)  # while it waits, it launches nothing
            self._waiting += 1
            self._changed.notify_all()
            self._changed.wait_for(lambda: self.changing is None and not self.relying)
            self._waiting -= 1
            self.changing = thread
        return relied

    def stop_changing(self, thread: int, relied: bool) -> None:
        with self._changed:
            self.changing = None
            if relied:
                self.relying.add(thread)
            self._changed.notify_all()


_users = _Users()


@contextlib.contextmanager
def relying() -> Iterator[None]:
    """Launch models while other threads do so, too."""
    thread = threading.get_ident()
    _users.start_relying(thread)
    try:
        yield
    finally:
        _users.stop_relying(thread)


@contextlib.contextmanager
def changing() -> Iterator[None]:
    """Change flags, and change them back before the end. May be nested."""
    thread = threading.get_ident()
    if _users.changing == thread:
        yield
        return
    relied = _users.start_changing(thread)
    try:
        yield
    finally:
        _users.stop_changing(thread, relied)


def are_shared() -> bool:
    """Whether this thread must leave the flags as they are."""
    return threading.get_ident() in _users.relying
