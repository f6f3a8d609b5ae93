"""Batches put together out of the parts that loader processes made."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from reinforce.student.data.parts import Part, Room
from reinforce.student.data.reader import Targets
from reinforce.training.task import Batch


class Lent:
    """Arrays that are lent out again when nothing refers to them any more.

    To clear new pages for a batch costs the kernel more than to copy it.
    """

    def __init__(self) -> None:
        self._arrays: list[tuple[np.ndarray, weakref.ref[np.ndarray]]] = []

    def array(self, shape: tuple[int, ...]) -> np.ndarray:
        """uint8 of the shape; tensors made of it keep it."""
        for number, (array, lent) in enumerate(self._arrays):
            if lent() is None and array.shape == shape:
                del self._arrays[number]
                break
        else:
            array = np.empty(shape, np.uint8)
        view = array.view()
        self._arrays.append((array, weakref.ref(view)))
        return view


@dataclass(frozen=True)
class Assembler:
    """Lays parts end to end: a copy, since their rooms are used again. See ``reinforce.student.data.batch``.

    ``pin``: into pinned memory, from where a CUDA device fetches by itself.
    """

    kinds: tuple[str, ...]
    targets: Targets
    online: tuple[str, ...]
    pin: bool
    _lent: Lent = field(default_factory=Lent)

    def batch(self, parts: Sequence[Part], rooms: Sequence[Room]) -> Batch:
        """``rooms`` are those that the parts were made in, each as long as its part."""
        batch: dict[str, Any] = {
            "key": [key for part in parts for key in part.keys],
            "image": self._images([room.image for room in rooms]),
        }
        for number, kind in enumerate(self.kinds):
            batch[kind] = self._joined([part.tokens[number] for part in parts])
        targets: dict[str, dict[str, torch.Tensor]] = {}
        start = 0
        for (teacher, what), dim in self.targets:
            vectors = [room.vectors[:, start : start + dim] for room in rooms]
            targets.setdefault(teacher, {})[what] = self._joined(vectors)
            start += dim
        batch["targets"] = targets
        if self.online:
            apart = bool(rooms[0].view.numel())
            view = self._images([room.view for room in rooms]) if apart else batch["image"]
            batch["views"] = dict.fromkeys(self.online, view)
            texts = [row for part in parts for row in part.texts]
            batch["texts"] = {kind: [row[number] for row in texts] for number, kind in enumerate(self.kinds)}
        return batch

    def _images(self, images: Sequence[torch.Tensor]) -> torch.Tensor:
        if self.pin:
            return self._joined(images)
        out = self._lent.array((sum(map(len, images)), *images[0].shape[1:]))
        np.concatenate([image.numpy() for image in images], out=out)
        return torch.from_numpy(out)

    def _joined(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        shape = (sum(map(len, tensors)), *tensors[0].shape[1:])
        return torch.cat(list(tensors), out=torch.empty(shape, dtype=tensors[0].dtype, pin_memory=self.pin))
