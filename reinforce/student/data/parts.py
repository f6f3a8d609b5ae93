"""Pixels and tokens of examples: the work of loader processes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from reinforce.dataset.augment import replay
from reinforce.errors import UserError
from reinforce.source.image import ImageRefused, decode
from reinforce.student.data.examples import Example

Tokenize = Callable[[Sequence[str]], torch.Tensor]


@dataclass(frozen=True)
class Room:
    """Memory for what is large in a part of n examples, or, with leading dimensions, in many parts."""

    image: torch.Tensor  # uint8 [..., n, size, size, 3]
    view: torch.Tensor  # uint8 [..., n, view, view, 3], with a side of 0 where it would be equal to the image
    vectors: torch.Tensor  # float32 [..., n, sum of dimensions]

    def at(self, *index: int | slice) -> Room:
        return Room(self.image[index], self.view[index], self.vectors[index])

    def shared(self) -> Room:
        """The same in memory that processes share: pages of it that are used again need not be made again."""
        return Room(self.image.share_memory_(), self.view.share_memory_(), self.vectors.share_memory_())


class Part(NamedTuple):
    """Some examples of a batch."""

    keys: list[str]
    room: Room | None  # None on the way from a loader process, which has made the part in shared memory
    tokens: torch.Tensor  # int64 [kinds of text, n, context]
    texts: list[tuple[str, ...]]  # for teachers in the loop
    unusable: Counter[str]  # rows that were passed over on the way, by reason


@dataclass(frozen=True)
class Maker:
    """Makes parts with images of ``size`` pixels a side and vectors of ``width`` numbers.

    ``view`` is the side of what teachers in the loop see, None where there are none.
    """

    size: int
    width: int
    tokenize: Tokenize
    view: int | None = None

    @property
    def sides(self) -> list[int]:
        """Of image and view, 0 for one that need not be made."""
        return [self.size, 0 if self.view in (None, self.size) else self.view or 0]

    def room(self, *rows: int) -> Room:
        image, view = (torch.empty((*rows, side, side, 3), dtype=torch.uint8) for side in self.sides)
        return Room(image, view, torch.empty((*rows, self.width)))

    def room_bytes(self, *rows: int) -> int:
        return math.prod(rows) * (sum(3 * side**2 for side in self.sides) + 4 * self.width)

    def part(self, examples: Sequence[Example], room: Room, unusable: Counter[str]) -> Part:
        """Make a part in a room for as many or more. Raises UserError for an image that is not what was augmented."""
        room = room.at(slice(len(examples)))
        pixels = [(room.image.numpy(), self.size), (room.view.numpy(), self.sides[1])]
        for i, example in enumerate(examples):
            try:
                whole = decode(example.image, example.origin.limits, policy=example.origin.policy)
                for images, side in pixels:
                    if side:
                        images[i] = np.asarray(replay(whole, example.augmentation, side))
            except (ImageRefused, ValueError) as error:
                raise UserError(
                    f"{example.origin.path}, key {example.key}: this is not the image that was augmented ({error}). "
                    "If images are kept by reference, restore the tar that was changed. Else the file is damaged: "
                    "delete it, and the shard's files of all other layers, and run again."
                ) from error
        np.stack([example.vectors for example in examples], out=room.vectors.numpy())
        texts = [example.texts for example in examples]
        tokens = torch.stack([self.tokenize(of_kind) for of_kind in zip(*texts, strict=True)])
        return Part([example.key for example in examples], room, tokens, texts if self.view else [], unusable)
