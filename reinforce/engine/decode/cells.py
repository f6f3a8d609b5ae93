"""Pixels of rows in memory that decode processes share: each row has a cell, and a batch is a set of cells."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from PIL.Image import Image

from reinforce.dataset.augment.backends import Replay
from reinforce.dataset.augment.records import Augmentation
from teachers.preprocessing.fit import fit
from teachers.protocols import ImageSpec

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class PixelCells:
    """Pixels by cell: ``crops`` uint8 [cells, K, S, S, 3] and, for each captioner's preprocessing, whole images uint8
    [cells, h, w, 3]."""

    crops: Bytes | None
    whole: Mapping[ImageSpec, Bytes] = field(default_factory=dict)

    @property
    def needed(self) -> bool:
        """Whether rows have pixels at all."""
        return self.crops is not None or bool(self.whole)

    def write(self, cell: int, image: Image, augmentations: Sequence[Augmentation], replay: Replay) -> None:
        """Write the pixels of one RGB image, with the crops by ``replay``.

        Raises ValueError if an augmentation does not fit the image.
        """
        if self.crops is not None:
            for k, augmentation in enumerate(augmentations):
                self.crops[cell, k] = replay(image, augmentation)
        for spec, whole in self.whole.items():
            whole[cell] = fit(image, spec)

    def blacken(self, cell: int) -> None:
        for array in (self.crops, *self.whole.values()):
            if array is not None:
                array[cell] = 0


@dataclass(frozen=True)
class PixelLayout:
    """What the models of a lease need of each image: ``crops`` is (number, side in pixels) of the augmented images, or
    None, and ``whole`` are the preprocessings of whole images."""

    crops: tuple[int, int] | None
    whole: tuple[ImageSpec, ...] = ()

    @property
    def cell_bytes(self) -> int:
        return sum(map(math.prod, self._shapes()))

    def cells(self, memory: Bytes) -> PixelCells:
        """Arrays of as many cells as ``memory`` [bytes] holds, sharing it."""
        count = len(memory) // self.cell_bytes if self.cell_bytes else 0
        arrays, start = [], 0
        for shape in self._shapes():
            end = start + count * math.prod(shape)
            arrays.append(memory[start:end].reshape(count, *shape))
            start = end
        crops = None if self.crops is None else arrays.pop(0)
        return PixelCells(crops, dict(zip(self.whole, arrays, strict=True)))

    def _shapes(self) -> list[tuple[int, ...]]:
        crops = [] if self.crops is None else [(self.crops[0], self.crops[1], self.crops[1], 3)]
        return [*crops, *((spec.height, spec.width, 3) for spec in self.whole)]


class FreeCells:
    """The numbers of unused cells; the lowest are taken first, so that the rows of a batch are neighbours."""

    def __init__(self, count: int) -> None:
        self._free = list(range(count))  # a heap

    def __len__(self) -> int:
        return len(self._free)

    def take(self) -> int:
        return heapq.heappop(self._free)

    def release(self, cells: Iterable[int]) -> None:
        for cell in cells:
            heapq.heappush(self._free, cell)


def runs(array: Bytes, cells: Sequence[int]) -> list[Bytes]:
    """Views of ``array`` [cells, ...] that together are its rows ``cells``, in order: one per run of neighbours."""
    breaks = [i for i in range(1, len(cells)) if cells[i] != cells[i - 1] + 1]
    bounds = [0, *breaks, len(cells)]
    return [array[cells[a] : cells[b - 1] + 1] for a, b in itertools.pairwise(bounds) if b > a]
