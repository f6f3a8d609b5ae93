"""Sizes of the batches of a worker's models, which are halved where the memory of the device runs out.

The shards of a worker share the sizes, and a size that was halved stays so. The batches are then cut as with a smaller
``workers.batch``.

Several batches may be on the device: one computes while those of the same and of the other shard that come next are
copied. After the first shortage it is one at a time, so that the others are not the cause of the next shortage.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

from reinforce.config import Config
from reinforce.engine.messages.results import LayerFailure
from reinforce.engine.messages.tracebacks import error_with_frames, shorten
from reinforce.errors import UserError
from teachers.redact import Redactor
from teachers.runtime.memory import forget_frames, is_out_of_memory

#: Largest batch of ``workers.batch: auto``. Larger ones take more shared memory for pixels.
MAX_AUTO_BATCH = 1024
#: Least texts of a batch on accelerators: with fewer, launching the kernels of a text tower is estimated to take longer
#: than running them.
_LEAST_TEXTS = 1024
_CAUSE_CHARS = 500
Bound = Literal["rows", "crops", "texts", "samples"]
_UNITS: dict[Bound, str] = {"rows": "image", "crops": "augmented image", "texts": "text", "samples": "sample"}
_T = TypeVar("_T")


@dataclass(frozen=True)
class Demand:
    """Memory that a batch needs on the device, for messages when it does not fit.

    Attributes:
        bound: what is halved.
        one: the layer and a single input of it, with a verb: "captions/c: one image with its 5 captions does".
        fix: what the user can change if a single input does not fit.
    """

    bound: Bound
    one: str
    fix: str


@dataclass(frozen=True)
class OutOfMemory:
    """The failure that ``attempt`` returns instead of raising: the layer whose model raised, None for a copy, and the
    text."""

    layer: str | None
    text: str


def attempt(work: Callable[[], _T]) -> _T | OutOfMemory:
    """The result of ``work``, or OutOfMemory. Then nothing refers any more to what the functions in it have held."""
    try:
        return work()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        layer = error.layer if isinstance(error, LayerFailure) else None
        text = str(error.args[1]) if isinstance(error, LayerFailure) else error_with_frames(error)
        forget_frames(error)
    return OutOfMemory(layer, text)


COPYING = Demand(
    "rows", "copying images: the pixels of one image do", "a smaller augmentations.count or augmentations.size"
)


def rows_per_batch(config: Config) -> int:
    """Rows whose augmented images make a batch."""
    return max(1, config.workers.images // config.augmentations.count)


def texts_per_batch(config: Config) -> int:
    images = config.workers.images
    return max(images, _LEAST_TEXTS) if config.workers.gpus else images


class BatchSizes:
    """Bounds of batches by what they consist of; without one, the config decides."""

    def __init__(self) -> None:
        self._bounds: dict[Bound, int] = {}
        self._notes: list[str] = []
        self._changed = threading.Condition()
        self.short = False  # one batch at a time, after a shortage, until `end_of_search`
        self._holding = 0  # batches on the device

    def fitting(self, bound: Bound, count: int) -> int:
        """How many of ``count`` inputs fit: rows of a batch, augmented images or texts of a forward pass, or samples
        that a scorer gets without their images."""
        return min(count, self._bounds.get(bound, count))

    def note(self, text: str) -> None:
        """Add a message to those of ``take_notes``."""
        with self._changed:
            self._notes.append(text)

    def take_notes(self) -> tuple[str, ...]:
        """Messages since the last call: about sizes that were halved, and others."""
        with self._changed:
            notes, self._notes = tuple(self._notes), []
        return notes

    @contextlib.contextmanager
    def on_device(self) -> Iterator[bool]:
        """Hold tensors on the device. After a shortage, one batch at a time can do so.

        Yields whether others may hold some, so that a batch is to be copied before its turn, and not in it.
        """
        with self._changed:
            self._changed.wait_for(lambda: not self.short or not self._holding)
            shared = not self.short
            self._holding += 1
        try:
            yield shared
        finally:
            with self._changed:
                self._holding -= 1
                self._changed.notify_all()

    def end_of_search(self) -> bool:
        """Whether there was a shortage, after which several smaller batches may be on the device again."""
        with self._changed:
            found, self.short = self.short, False
        return found

    def halve(self, shortage: OutOfMemory, demand: Demand, size: int, config: Config, shared: bool) -> None:
        """Halve the size of a batch of ``size`` inputs that did not fit.

        Raises UserError for a single input, unless the device was ``shared``.
        """
        bound, count = demand.bound, config.augmentations.count
        failed = self.fitting("crops", count) if bound == "crops" else size
        rows, images = rows_per_batch(config), config.workers.images
        planned: dict[Bound, int] = {"rows": rows, "crops": count, "texts": texts_per_batch(config), "samples": images}
        text = Redactor(config.model_dump(mode="json")).cut(shortage.text)
        shortage = replace(shortage, text=shorten(text, _CAUSE_CHARS))
        with self._changed:
            self.short = True
            if failed > 1:
                before = self._bounds.get(bound, max(failed, planned[bound]))
                after = self._bounds[bound] = _halved(before, failed)
                if after < before:
                    self._notes.append(_note(shortage, failed, after, bound))
        if failed == 1 and not shared:
            raise UserError(_too_large(shortage, demand))


def _halved(size: int, failed: int) -> int:
    """``size`` halved until it is less than the size that failed, at least 1."""
    while size > 1 and size >= failed:
        size //= 2
    return size


def _note(shortage: OutOfMemory, failed: int, after: int, bound: Bound) -> str:
    unit = _UNITS[bound]
    return (
        f"{shortage.layer or 'copying images'}: {failed:,} {unit}s at once do not fit in the memory of the device; "
        f"from now on {after:,} {unit}{'s' * (after > 1)} at once. Cause: {shortage.text}"
    )


def _too_large(shortage: OutOfMemory, demand: Demand) -> str:
    return (
        f"{demand.one} not fit in the memory of the device. Use {demand.fix}; or a device with more memory, or one "
        f"that no other program uses. The error was {shortage.text}"
    )
