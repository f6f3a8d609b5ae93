"""Assembling batches from the parts that loader processes made, in the format that the student's task reads.

A batch is a plain mapping, so loaders can pin, slice and move it without knowing its content. With B samples of a rank:

=================  ===========================  ==============================================================
``key``            list[str]                    sample keys
``image``          uint8 [B, size, size, 3]     one augmentation, replayed at the student's image size, RGB;
                   ..                           absent with ``images: none``
``records``        list[CellRecord]             with the backend ``device-1``, whose cells then are in ``image``
``caption``        int64 [B, context]           tokens of the true caption (with ``mixed``: of the picked one)
``synthetic``      int64 [B, context]           tokens of a synthetic caption; absent with ``mixed`` or no captioner
``targets``        {model: {name: [B, ...]}}    what is stored of each model: of a teacher, unit-norm vectors float32
                   ..                           [B, D] of ``image``, ``caption`` and ``synthetic``, as far as it has
                   ..                           them; see ``target_tensors`` of a kind of layers
``crops``          {teacher: uint8 [B, h, w, 3]}  the same augmentation at the recorded size; online teachers only
``texts``          {what: list[str]}            captions as text; online teachers only
=================  ===========================  ==============================================================
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch

from reinforce.seeds import Ints
from reinforce.student.data.parts import Part, PartBuffers
from reinforce.student.data.reader import Target
from reinforce.training.task import Batch

T = TypeVar("T")


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
    """Concatenates parts to batches, as described above. It copies, since part buffers are reused.

    ``kinds`` are the kinds of text, ``targets`` those of an example, ``online`` the online teachers. With ``pin``,
    batches are in pinned memory, from which a CUDA device copies asynchronously.
    """

    kinds: tuple[str, ...]
    targets: tuple[Target, ...]
    online: tuple[str, ...]
    pin: bool
    _pool: BufferPool = field(default_factory=BufferPool)

    def assemble(self, parts: Sequence[Part], buffers: Sequence[PartBuffers], places: Ints | None = None) -> Batch:
        """Concatenate the parts of a batch; ``buffers`` hold their images and targets and have the parts' lengths.

        ``places`` [B] are those in the batch of the concatenated rows, if they are in another order.
        """
        batch: dict[str, Any] = {"key": _chain([part.keys for part in parts], places)}
        if buffers[0].image.numel():
            batch["image"] = self._concatenate_images([of_part.image for of_part in buffers], places)
        if parts[0].records:
            batch["records"] = _chain([part.records for part in parts], places)
        for number, kind in enumerate(self.kinds):
            batch[kind] = self._concatenate([part.tokens[number] for part in parts], places)
        targets: dict[str, dict[str, torch.Tensor]] = {}
        for number, target in enumerate(self.targets):
            values = [of_part.targets[number] for of_part in buffers]
            targets.setdefault(target.model, {})[target.name] = self._concatenate(values, places)
        batch["targets"] = targets
        if self.online:
            crops, crop = [of_part.crop for of_part in buffers], batch["image"]
            if crops[0].numel():
                crop = self._concatenate_images(crops, places)
            batch["crops"] = dict.fromkeys(self.online, crop)
            texts = _chain([part.texts for part in parts], places)
            batch["texts"] = {kind: [row[number] for row in texts] for number, kind in enumerate(self.kinds)}
        return batch

    def _concatenate_images(self, images: Sequence[torch.Tensor], places: Ints | None) -> torch.Tensor:
        if self.pin:
            return self._concatenate(images, places)
        out = self._pool.array((sum(map(len, images)), *images[0].shape[1:]))
        if places is None:
            np.concatenate([image.numpy() for image in images], out=out)
            return torch.from_numpy(out)
        return _scatter(images, places, torch.from_numpy(out))

    def _concatenate(self, tensors: Sequence[torch.Tensor], places: Ints | None) -> torch.Tensor:
        shape = (sum(map(len, tensors)), *tensors[0].shape[1:])
        out = torch.empty(shape, dtype=tensors[0].dtype, pin_memory=self.pin)
        return torch.cat(list(tensors), out=out) if places is None else _scatter(tensors, places, out)


def _scatter(tensors: Sequence[torch.Tensor], places: Ints, out: torch.Tensor) -> torch.Tensor:
    """Copy the rows of tensors to their places in ``out``. NumPy does it at the speed of ``torch.cat``."""
    start, rows = 0, out.numpy()
    for tensor in tensors:
        rows[places[start : start + len(tensor)]] = tensor.numpy()
        start += len(tensor)
    return out


def _chain(lists: Iterable[Sequence[T]], places: Ints | None) -> list[T]:
    """The items of lists, each at its place."""
    items = [*itertools.chain.from_iterable(lists)]
    return items if places is None else [items[row] for row in np.argsort(places).tolist()]
