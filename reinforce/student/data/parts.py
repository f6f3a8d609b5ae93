"""Pixels and tokens of examples: the work of loader processes."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch

from reinforce.dataset.augment.backends import load_backend
from reinforce.dataset.augment.device_records import CELL, CellRecord, fill_cell
from reinforce.errors import UserError
from reinforce.images.policy import ImageRefused, decode
from reinforce.processes.shared_memory import SharedMemory
from reinforce.student.data.examples import Example
from reinforce.student.data.reader import Target

_ALIGNMENT = 64  # bytes
#: Broken images in a row after which a training run fails.
_MOST_BROKEN = 100

#: n texts -> int64 [n, context].
Tokenize = Callable[[Sequence[str]], torch.Tensor]
#: The example in place of one of a part, by its number and the number of the attempt.
Spare = Callable[[int, int], Example]
_Layout: TypeAlias = "tuple[str, tuple[int, ...]]"  # dtype and shape
_Pixels: TypeAlias = "list[tuple[np.ndarray, int]]"  # images [n, side, side, 3] and side in pixels


@dataclass(frozen=True)
class PartBuffers:
    """Memory for the large tensors of a part of n examples or, with leading dimensions, of many parts."""

    image: torch.Tensor  # uint8 [..., n, size, size, 3]
    crop: torch.Tensor  # uint8 [..., n, crop, crop, 3]; [..., n, 0, 0, 3] if there is none or it equals the image
    targets: tuple[torch.Tensor, ...]  # [..., n, *shape] of each target
    memory: SharedMemory | None = None  # that holds all of them; a process that is started with them maps it, too

    def select(self, *index: int | slice) -> PartBuffers:
        """The buffers at an index into the leading dimensions, sharing memory."""
        return PartBuffers(self.image[index], self.crop[index], tuple(target[index] for target in self.targets))

    def __reduce__(self) -> tuple[Any, ...]:
        if self.memory is None:
            return PartBuffers, (self.image, self.crop, self.targets)
        arrays = [tensor.numpy() for tensor in (self.image, self.crop, *self.targets)]
        return _map_buffers, (self.memory, [(array.dtype.str, array.shape) for array in arrays])


def _map_buffers(memory: SharedMemory, layout: Sequence[_Layout]) -> PartBuffers:
    """Buffers of these dtypes and shapes in shared memory."""
    content, start, tensors = memory.array(), 0, []
    for (dtype, shape), size in zip(layout, _aligned_sizes(layout), strict=True):
        array = np.frombuffer(content, dtype, count=math.prod(shape), offset=start).reshape(shape)
        tensors.append(torch.from_numpy(array))
        start += size
    image, crop, *targets = tensors
    return PartBuffers(image, crop, tuple(targets), memory)


def _aligned_sizes(layout: Sequence[_Layout]) -> list[int]:
    """Bytes of each array, rounded up so that the next one is aligned."""
    return [-(-np.dtype(dtype).itemsize * math.prod(shape) // _ALIGNMENT) * _ALIGNMENT for dtype, shape in layout]


class Part(NamedTuple):
    """Some examples of a batch."""

    keys: list[str]
    buffers: PartBuffers | None  # None when it comes from a loader process, which has filled shared memory
    tokens: list[torch.Tensor]  # int64 [n, context] of each kind of text
    texts: list[tuple[str, ...]]  # for online teachers
    unusable: Counter[str]  # unusable rows since the last part, by reason
    records: Sequence[CellRecord] = ()  # of images that the device augments
    replaced: Sequence[str] = ()  # a line about each image that could not be decoded


@dataclass(frozen=True)
class PartMaker:
    """Makes parts with images of ``size`` x ``size`` pixels and the ``targets`` of each example.

    ``crop`` is the side in pixels of the images for online teachers, None if there are none. Translations of the
    student's images are scaled with their size, unless not ``scaled``. With ``replaces``, another example stands in
    for one whose image cannot be decoded, which is an error otherwise: a run has decoded each image of a dataset.
    With ``device``, images are cells for the augmentation backend ``device-1``.
    """

    size: int
    targets: tuple[Target, ...]
    tokenize: Tokenize
    crop: int | None = None
    scaled: bool = True
    replaces: bool = False
    device: bool = False

    @property
    def sides(self) -> list[int]:
        """Sides of image and crop in pixels, 0 for what is not needed."""
        return [self.size * (CELL if self.device else 1), 0 if self.crop in (None, self.size) else self.crop or 0]

    def allocate(self, *rows: int) -> PartBuffers:
        """Buffers with leading dimensions ``rows``, the last of which is n."""
        image, crop, *targets = [torch.from_numpy(np.empty(shape, dtype)) for dtype, shape in self._layout(rows)]
        return PartBuffers(image, crop, tuple(targets))

    def allocate_shared(self, *rows: int) -> PartBuffers:
        """A shared-memory version, whose pages are reused instead of allocated anew."""
        layout = self._layout(rows)
        return _map_buffers(SharedMemory(sum(_aligned_sizes(layout))), layout)

    def _layout(self, rows: Sequence[int]) -> list[_Layout]:
        images: list[_Layout] = [("uint8", (*rows, side, side, 3)) for side in self.sides]
        return images + [(target.dtype, (*rows, *target.shape)) for target in self.targets]

    def make(
        self, examples: list[Example], buffers: PartBuffers, unusable: Counter[str], spare: Spare | None = None
    ) -> Part:
        """Make a part in ``buffers`` for at least as many examples.

        Raises UserError if an image cannot be decoded or does not fit its augmentation record.
        """
        buffers = buffers.select(slice(len(examples)))
        pixels = [(buffers.image.numpy(), self.size), (buffers.crop.numpy(), self.sides[1])]
        records: list[CellRecord] = []
        replaced: list[str] = []
        for i, example in enumerate(examples):
            try:
                if (record := self._draw(example, i, pixels)) is not None:
                    records.append(record)
            except (ImageRefused, ValueError, TypeError, OverflowError) as error:
                if self.replaces and spare is not None and isinstance(error, ImageRefused):
                    unusable[error.reason.value] += 1
                    replaced.append(f"{example.file.path}, key {example.key} is replaced by another example: {error}")
                    examples[i] = self._replace(i, pixels, partial(spare, i))
                    continue
                raise UserError(
                    f"{example.file.path}, key {example.key}: this is not the image that was augmented ({error}). "
                    "If images are stored by reference, restore the tar that was changed. Otherwise the file is "
                    "damaged: drop it (`reinforce drop DATASET samples --shard NAME --yes`) and run again."
                ) from error
        for number, target in enumerate(buffers.targets):
            np.stack([example.targets[number] for example in examples], out=target.numpy())
        texts = [example.texts for example in examples]
        tokens = [self.tokenize(of_kind) for of_kind in zip(*texts, strict=True)]
        keys = [example.key for example in examples]
        return Part(keys, buffers, tokens, texts if self.crop else [], unusable, records, replaced)

    def _draw(self, example: Example, i: int, pixels: _Pixels) -> CellRecord | None:
        """Decode and augment the image of example ``i``, or return what the device is to do with it.

        Raises ImageRefused and what the replay raises.
        """
        record = example.augmentation
        if record is None:  # texts alone
            return None
        image = decode(example.image, example.file.limits, policy=example.file.policy)
        if callable(record):
            record = record(*image.size)
        if self.device:
            own = record if self.scaled else dataclasses.replace(record, size=self.size)
            return fill_cell(image, own, self.size, pixels[0][0][i])
        replay = load_backend(example.file.backend)
        for images, side in pixels:
            if side:
                own = record if self.scaled or images is not pixels[0][0] else dataclasses.replace(record, size=side)
                images[i] = replay(image, own, side)
        return None

    def _replace(self, i: int, pixels: _Pixels, spare: Callable[[int], Example]) -> Example:
        """Draw another example in place of number ``i``; those that cannot be decoded count when it is their turn."""
        for attempt in range(_MOST_BROKEN):
            example = spare(attempt)
            try:
                self._draw(example, i, pixels)
                return example
            except ImageRefused as refused:
                error = refused
        raise UserError(
            f"data: {_MOST_BROKEN} images in a row cannot be decoded, the last: {example.file.path}, key "
            f"{example.key}: {error}. Check the shards."
        ) from error
