"""What a model makes of texts: vectors for captions, and a classifier out of classes and templates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from reinforce.evaluation.classes import Template
from teachers.protocols import ImageSpec

_TEXTS = 2**14  # of one part of a classifier: bounds memory at any number of classes and templates


class Encoder(Protocol):
    """What is judged: a ``teachers.protocols.Teacher`` with both sides, or a module in memory."""

    image: ImageSpec | None

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        """[B, 3, H, W] float32 on the device, preprocessed as ``image`` says -> [B, dim], unit norm."""
        ...

    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """B strings -> [B, dim], unit norm."""
        ...


def encode_texts(model: Encoder, texts: Sequence[str], batch: int) -> torch.Tensor:
    """N texts -> float32 [N, dim] on the CPU. Encoded by length, since a batch takes as long as its longest text."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    parts = []
    for start in range(0, len(order), batch):
        vectors = model.encode_texts([texts[i] for i in order[start : start + batch]])
        parts.append(vectors.float().cpu())
    vectors = torch.cat(parts)
    return torch.empty_like(vectors).index_copy_(0, torch.tensor(order), vectors)


def classifier(model: Encoder, classes: Sequence[str], templates: Sequence[Template], batch: int) -> torch.Tensor:
    """float32 [C, dim] on the CPU, unit norm: the mean of a class's texts, as open_clip builds it."""
    rows = max(1, _TEXTS // len(templates))
    parts = []
    for start in range(0, len(classes), rows):
        names = classes[start : start + rows]
        vectors = encode_texts(model, [template(name) for name in names for template in templates], batch)
        parts.append(vectors.view(len(names), len(templates), -1).mean(1))
    means = torch.cat(parts)
    return means / means.norm(dim=1, keepdim=True)
