"""Sizes of the batches of a worker's models, which are halved where the memory of the device runs out.

The shards of a worker share the sizes, and a size that was halved stays so. The batches are then cut as with a smaller
``workers.batch``.

Several batches may be on the device: one computes while those of the same and of the other shard that come next are
copied. After the first shortage it is one at a time, so that the others are not the cause of the next shortage.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Literal

from reinforce.config import Config
from reinforce.dataset.layers import Layer
from reinforce.engine.inference.out_of_memory import OutOfMemory
from reinforce.errors import UserError

_Bound = Literal["rows", "crops", "texts"]
_UNITS: dict[_Bound, str] = {"rows": "image", "crops": "augmented image", "texts": "text"}


def rows_per_batch(config: Config) -> int:
    """Rows whose augmented images make a batch."""
    return max(1, config.workers.images // config.augmentations.count)


class BatchSizes:
    """Bounds of batches by what they consist of; without one, the config decides."""

    def __init__(self) -> None:
        self._bounds: dict[_Bound, int] = {}
        self._notes: list[str] = []
        self._changed = threading.Condition()
        self._one_at_a_time = False
        self._holding = 0  # batches on the device

    def rows(self, rows: int) -> int:
        """Rows of a batch that may have ``rows``."""
        return min(rows, self._bounds.get("rows", rows))

    def crops(self, crops: int) -> int:
        """Augmented images of a forward pass that may have ``crops``."""
        return min(crops, self._bounds.get("crops", crops))

    def texts(self, texts: int) -> int:
        """Texts of a forward pass that may have ``texts``."""
        return min(texts, self._bounds.get("texts", texts))

    def take_notes(self) -> tuple[str, ...]:
        """Messages about sizes that were halved since the last call."""
        with self._changed:
            notes, self._notes = tuple(self._notes), []
        return notes

    @property
    def short(self) -> bool:
        """Whether there was a shortage, since the last ``end_of_search``."""
        return self._one_at_a_time

    @contextlib.contextmanager
    def on_device(self) -> Iterator[bool]:
        """Hold tensors on the device. After a shortage, one batch at a time can do so.

        Yields whether others may hold some, so that a batch is to be copied before its turn, and not in it.
        """
        with self._changed:
            self._changed.wait_for(lambda: not self._one_at_a_time or not self._holding)
            shared = not self._one_at_a_time
            self._holding += 1
        try:
            yield shared
        finally:
            with self._changed:
                self._holding -= 1
                self._changed.notify_all()

    def end_of_search(self) -> bool:
        """Whether there was a shortage, after which several batches, smaller ones, may be on the device again."""
        with self._changed:
            found, self._one_at_a_time = self._one_at_a_time, False
        return found

    def halve(self, shortage: OutOfMemory, layer: Layer | None, size: int, config: Config, shared: bool) -> None:
        """Halve the size of a batch that did not fit: ``size`` rows, or texts of a layer of texts; ``layer`` is None if
        the images could not be copied.

        Raises UserError for a single input, unless the device was ``shared``.
        """
        bound, count = _bound(layer, size), config.augmentations.count
        failed = self.crops(count) if bound == "crops" else size
        planned: dict[_Bound, int] = {"rows": rows_per_batch(config), "crops": count, "texts": config.workers.images}
        with self._changed:
            self._one_at_a_time = True
            if failed > 1:
                before = self._bounds.get(bound, max(failed, planned[bound]))
                after = self._bounds[bound] = _halved(before, failed)
                if after < before:
                    self._notes.append(_note(shortage, failed, after, bound))
        if failed == 1 and not shared:
            raise UserError(_too_large(shortage, layer))


def _bound(layer: Layer | None, size: int) -> _Bound:
    """What is halved: the augmented images only where a batch cannot have fewer rows."""
    if layer is not None and layer.kind.name == "texts":
        return "texts"
    return "crops" if layer is not None and layer.kind.name == "images" and size == 1 else "rows"


def _halved(size: int, failed: int) -> int:
    """``size`` halved until it is less than the size that failed, at least 1."""
    while size > 1 and size >= failed:
        size //= 2
    return size


def _note(shortage: OutOfMemory, failed: int, after: int, bound: _Bound) -> str:
    unit = _UNITS[bound]
    return (
        f"{shortage.layer or 'copying images'}: {failed:,} {unit}s at once do not fit in the memory of the device; "
        f"from now on {after:,} {unit}{'s' * (after > 1)} at once. Cause: {shortage.text}"
    )


def _too_large(shortage: OutOfMemory, layer: Layer | None) -> str:
    model = layer and layer.model
    if layer is None or model is None:
        what, fix = "copying images: the pixels of one image do", "a smaller augmentations.count or augmentations.size"
    elif layer.kind.name == "captions":
        section = f"captioners.{model}"
        what = f"{layer.name}: one image with its {layer.count} captions does"
        fix = f"{section}: a smaller model, `precision: bf16`, or fewer `captions` or `beams`"
    else:
        what = f"{layer.name}: one {'text' if layer.kind.name == 'texts' else 'augmented image'} does"
        fix = f"teachers.{model}: a smaller model, or `precision: bf16`"
    return (
        f"{what} not fit in the memory of the device. Use {fix}; or a device with more memory, or one that no other "
        f"program uses. The error was {shortage.text}"
    )
