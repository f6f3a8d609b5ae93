"""What loader processes call: of the tests they import this module alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

import reinforce


def letters(texts: Sequence[str]) -> torch.Tensor:
    """A tokenizer: code points of the first 40 characters, [B, 40]."""
    return torch.tensor([[ord(letter) for letter in text[:40].ljust(40)] for text in texts])


def read(tokens: torch.Tensor) -> list[str]:
    """The texts that ``letters`` encoded."""
    return ["".join(map(chr, row)).strip() for row in tokens.tolist()]


def key_and_crop(sample: reinforce.Sample) -> tuple[str, torch.Tensor]:
    return sample.key, torch.tensor(list(sample.augmented(0, size=8).tobytes()))


def unchanged(part: Any) -> Any:
    return part
