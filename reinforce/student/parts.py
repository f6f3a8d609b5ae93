"""Pixels and tokens of examples: the work of loader processes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from reinforce.augment import replay
from reinforce.errors import UserError
from reinforce.image import ImageRefused, decode
from reinforce.student.examples import Example

Tokenize = Callable[[Sequence[str]], torch.Tensor]


class Part(NamedTuple):
    """Some examples of a batch, as one loader process makes them: few and large tensors, cheap to send."""

    keys: list[str]
    image: torch.Tensor  # uint8 [n, size, size, 3]
    view: torch.Tensor | None  # uint8 [n, recorded size, recorded size, 3], for teachers in the loop
    tokens: torch.Tensor  # int64 [kinds of text, n, context]
    vectors: torch.Tensor  # float32 [n, sum of dimensions]
    texts: list[tuple[str, ...]]  # for teachers in the loop
    unusable: Counter[str]  # rows that were passed over on the way, by reason


@dataclass(frozen=True)
class Maker:
    """Makes parts with images of ``size`` pixels a side and, where teachers are in the loop, views of ``view``."""

    size: int
    tokenize: Tokenize
    view: int | None = None

    def part(self, examples: Sequence[Example], unusable: Counter[str]) -> Part:
        """Raises UserError where an image cannot be decoded, or is not the one that was augmented."""
        sizes = [self.size] if self.view in (None, self.size) else [self.size, self.view]
        images = [np.empty((len(examples), size, size, 3), np.uint8) for size in sizes]
        for i, example in enumerate(examples):
            try:
                whole = decode(example.image, example.origin.limits)
                for image, size in zip(images, sizes, strict=True):
                    image[i] = np.asarray(replay(whole, example.augmentation, size))
            except (ImageRefused, ValueError) as error:
                raise UserError(
                    f"{example.origin.path}, key {example.key}: this is not the image that was augmented ({error}). "
                    "If images are kept by reference, restore the tar that was changed. Else the file is damaged: "
                    "delete it, and the shard's files of all other layers, and run again."
                ) from error
        pixels = [torch.from_numpy(image) for image in images]
        return Part(
            [example.key for example in examples],
            pixels[0],
            pixels[-1] if self.view else None,
            torch.stack([self.tokenize(texts) for texts in zip(*(e.texts for e in examples), strict=True)]),
            torch.from_numpy(np.stack([example.vectors for example in examples])),
            [example.texts for example in examples] if self.view else [],
            unusable,
        )
