"""Samples at which a decode process really crashes or raises after decoding, and rows of any size."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reinforce.engine.worker.decode import Row
from reinforce.source.samples import RawSample


class _Faulty(RawSample):
    def __reduce__(self) -> Any:
        return _restore, (type(self), self.key, self.image, self.sidecars)


def _restore(kind: type[_Faulty], key: str, image: bytes, sidecars: dict[str, bytes]) -> RawSample:
    """The sample in a decode process, where ``sidecars`` are read once the image was decoded."""
    return kind(key, image, 0, len(image), kind.Sidecars(sidecars))


class CrashingSample(_Faulty):
    """Segfaults each time."""

    class Sidecars(dict[str, bytes]):
        def get(self, *_: Any) -> Any:
            os.kill(os.getpid(), signal.SIGSEGV)


class OnceCrashingSample(_Faulty):
    """Segfaults the first time, and then not: the file that the environment names exists."""

    class Sidecars(dict[str, bytes]):
        def get(self, *arguments: Any) -> Any:
            marker = Path(os.environ["TESTS_CRASHED"])
            if not marker.exists():
                marker.touch()
                os.kill(os.getpid(), signal.SIGSEGV)
            return super().get(*arguments)


class FailingSample(_Faulty):
    """Raises."""

    class Sidecars(dict[str, bytes]):
        def get(self, *_: Any) -> Any:
            raise ZeroDivisionError("decoders do not do this")


class CrashingRecords(list[Any]):
    """Augmentations of a stored image that segfaults."""

    def __reduce__(self) -> Any:
        return CrashingRecords, ()

    def __iter__(self) -> Any:
        os.kill(os.getpid(), signal.SIGSEGV)


@dataclass(eq=False)
class SizedRow(Row):
    """Counts as ``size`` encoded bytes."""

    size: int = 0  # type: ignore[misc]
