"""Assembling batches from the parts that loader processes made."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from reinforce.student.data.parts import Part, PartBuffers
from reinforce.student.data.reader import Targets
from reinforce.training.task import Batch


class BufferPool:
    """Arrays that are reused once nothing references them.

    Allocating new pages for a batch costs the kernel more time than copying the batch.
    """

    def __init__(self) -> None:
        self._arrays: list[tuple[np.ndarray, weakref.ref[np.ndarray]]] = []

    def array(self, shape: tuple[int, ...]) -> np.ndarray:
        """Return an uint8 array of the shape; tensors that share its memory keep it in use."""
        for number, (array, view_in_use) in enumerate(self._arrays):
            if view_in_use() is None and array.shape == shape:
                del self._arrays[number]
                break
        else:
            array = np.empty(shape, np.uint8)
        view = array.view()
        self._arrays.append((array, weakref.ref(view)))
        return view


@dataclass(frozen=True)
class Assembler:
    """Concatenates parts to batches, see ``reinforce.student.data.batch``. It copies, since part buffers are reused.

    ``kinds`` are the kinds of text, ``targets`` the stored vectors of an example, ``online`` the online teachers. With
    ``pin``, batches are in pinned memory, from which a CUDA device copies asynchronously.
    """

    kinds: tuple[str, ...]
    targets: Targets
    online: tuple[str, ...]
    pin: bool
    _pool: BufferPool = field(default_factory=BufferPool)

    def assemble(self, parts: Sequence[Part], buffers: Sequence[PartBuffers]) -> Batch:
        """Concatenate the parts of a batch; ``buffers`` hold their images and vectors and have the parts' lengths."""
        batch: dict[str, Any] = {
            "key": [key for part in parts for key in part.keys],
            "image": self._concatenate_images([of_part.image for of_part in buffers]),
        }
        if parts[0].records:
            batch["records"] = [record for part in parts for record in part.records]
        for number, kind in enumerate(self.kinds):
            batch[kind] = self._concatenate([part.tokens[number] for part in parts])
        targets: dict[str, dict[str, torch.Tensor]] = {}
        start = 0
        for (teacher, what), dim in self.targets:
            vectors = [of_part.vectors[:, start : start + dim] for of_part in buffers]
            targets.setdefault(teacher, {})[what] = self._concatenate(vectors)
            start += dim
        batch["targets"] = targets
        if self.online:
            has_views = bool(buffers[0].view.numel())
            view = self._concatenate_images([of_part.view for of_part in buffers]) if has_views else batch["image"]
            batch["views"] = dict.fromkeys(self.online, view)
            texts = [row for part in parts for row in part.texts]
            batch["texts"] = {kind: [row[number] for row in texts] for number, kind in enumerate(self.kinds)}
        return batch

    def _concatenate_images(self, images: Sequence[torch.Tensor]) -> torch.Tensor:
        if self.pin:
            return self._concatenate(images)
        out = self._pool.array((sum(map(len, images)), *images[0].shape[1:]))
        np.concatenate([image.numpy() for image in images], out=out)
        return torch.from_numpy(out)

    def _concatenate(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        shape = (sum(map(len, tensors)), *tensors[0].shape[1:])
        return torch.cat(list(tensors), out=torch.empty(shape, dtype=tensors[0].dtype, pin_memory=self.pin))
