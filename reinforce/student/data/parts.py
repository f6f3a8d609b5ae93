"""Pixels and tokens of examples: the work of loader processes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from reinforce.dataset.backends import load_backend
from reinforce.errors import UserError
from reinforce.source.image import ImageRefused, decode
from reinforce.student.data.examples import Example

#: n texts -> int64 [n, context].
Tokenize = Callable[[Sequence[str]], torch.Tensor]


@dataclass(frozen=True)
class PartBuffers:
    """Memory for the large tensors of a part of n examples or, with leading dimensions, of many parts."""

    image: torch.Tensor  # uint8 [..., n, size, size, 3]
    view: torch.Tensor  # uint8 [..., n, view, view, 3]; [..., n, 0, 0, 3] if there is none or it equals the image
    vectors: torch.Tensor  # float32 [..., n, sum of dimensions]

    def select(self, *index: int | slice) -> PartBuffers:
        """The buffers at an index into the leading dimensions, sharing memory."""
        return PartBuffers(self.image[index], self.view[index], self.vectors[index])

    def share_memory(self) -> PartBuffers:
        """The same buffers in memory shared between processes, whose pages are reused instead of allocated anew."""
        return PartBuffers(self.image.share_memory_(), self.view.share_memory_(), self.vectors.share_memory_())


class Part(NamedTuple):
    """Some examples of a batch."""

    keys: list[str]
    buffers: PartBuffers | None  # None when it comes from a loader process, which has filled shared memory
    tokens: torch.Tensor  # int64 [kinds of text, n, context]
    texts: list[tuple[str, ...]]  # for online teachers
    unusable: Counter[str]  # unusable rows since the last part, by reason


@dataclass(frozen=True)
class PartMaker:
    """Makes parts with images of ``size`` x ``size`` pixels and ``width`` vector elements per example.

    ``view`` is the side in pixels of the images for online teachers, None if there are none.
    """

    size: int
    width: int
    tokenize: Tokenize
    view: int | None = None

    @property
    def sides(self) -> list[int]:
        """Sides of image and view in pixels, 0 for a view that is not needed."""
        return [self.size, 0 if self.view in (None, self.size) else self.view or 0]

    def allocate(self, *rows: int) -> PartBuffers:
        """Buffers with leading dimensions ``rows``, the last of which is n."""
        image, view = (torch.empty((*rows, side, side, 3), dtype=torch.uint8) for side in self.sides)
        return PartBuffers(image, view, torch.empty((*rows, self.width)))

    def buffer_bytes(self, *rows: int) -> int:
        """Size of ``allocate(*rows)`` in bytes."""
        return math.prod(rows) * (sum(3 * side**2 for side in self.sides) + 4 * self.width)

    def make(self, examples: Sequence[Example], buffers: PartBuffers, unusable: Counter[str]) -> Part:
        """Make a part in ``buffers`` for at least as many examples.

        Raises UserError if an image cannot be decoded or does not fit its augmentation record.
        """
        buffers = buffers.select(slice(len(examples)))
        pixels = [(buffers.image.numpy(), self.size), (buffers.view.numpy(), self.sides[1])]
        for i, example in enumerate(examples):
            try:
                image = decode(example.image, example.file.limits, policy=example.file.policy)
                replay = load_backend(example.file.backend)
                for images, side in pixels:
                    if side:
                        images[i] = replay(image, example.augmentation, side)
            except (ImageRefused, ValueError) as error:
                raise UserError(
                    f"{example.file.path}, key {example.key}: this is not the image that was augmented ({error}). "
                    "If images are stored by reference, restore the tar that was changed. Otherwise the file is "
                    "damaged: delete it and the shard's files of all other layers, and run again."
                ) from error
        np.stack([example.vectors for example in examples], out=buffers.vectors.numpy())
        texts = [example.texts for example in examples]
        tokens = torch.stack([self.tokenize(of_kind) for of_kind in zip(*texts, strict=True)])
        return Part([example.key for example in examples], buffers, tokens, texts if self.view else [], unusable)
