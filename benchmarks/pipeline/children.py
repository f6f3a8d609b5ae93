"""Processes that are measured while they work at the same time."""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any


class Child:
    """A process that answers requests, one at a time. The constructor does not wait until it is ready."""

    def __init__(self, serve: Callable[..., None], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, *arguments), daemon=True)
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def send(self, request: Any) -> None:
        self._pipe.send(request)

    def receive(self) -> Any:
        """The oldest answer; the first one says that the process is ready. Raises EOFError if the process has died."""
        return self._pipe.recv()

    def close(self) -> None:
        self._pipe.close()
        self._process.join()


class Children(contextlib.AbstractContextManager["Children"]):
    """Processes of the same kind that work at the same time."""

    def __init__(self, serve: Callable[..., None], arguments: Sequence[tuple[Any, ...]]) -> None:
        self.all = [Child(serve, *each) for each in arguments]
        self._receive()

    def run(self, requests: Sequence[Any]) -> list[Any]:
        """Send each process a request and return the answers of all."""
        for child, request in zip(self.all, requests, strict=True):
            child.send(request)
        return self._receive()

    def __exit__(self, *_: object) -> None:
        for child in self.all:
            child.close()

    def _receive(self) -> list[Any]:
        return [child.receive() for child in self.all]


def serve(pipe: Connection, answer: Callable[[Any], Any]) -> None:
    """Answer requests until the parent closes the pipe."""
    pipe.send("ready")
    with contextlib.suppress(EOFError):
        while True:
            pipe.send(answer(pipe.recv()))
