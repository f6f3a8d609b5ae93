"""A linear segmentation head on frozen patch features: dropout, batch normalisation and a 1 x 1 convolution.

The head is trained by AdamW on the mean cross-entropy of the pixels that are not ignored, of logits that are resized
bilinearly to the crop, after a linear warm-up with a rate that decays to zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch

from reinforce.evaluation.kinds.masks import IGNORED, window_starts
from schemas.seeds import seed_for
from teachers.image_encoder import PatchEncoder
from teachers.pixels import to_pixels

#: Classes whose logits are resized at once, which bounds the memory of an image.
_CLASSES_AT_ONCE = 16
_INIT = 0.01  # standard deviation of the first weights


@dataclass(frozen=True)
class HeadSchedule:
    """How a head is trained, in steps of ``batch`` crops."""

    steps: int
    batch: int
    warmup: int
    learning_rate: float
    weight_decay: float
    decay: Literal["cosine", "linear"]
    dropout: float

    def rate(self, step: int) -> float:
        """The learning rate of a step, the first is 0."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / (self.warmup + 1)
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        left = (1 + math.cos(math.pi * done)) / 2 if self.decay == "cosine" else 1 - done
        return self.learning_rate * left


class LinearHead(torch.nn.Module):
    """Patch features [B, rows, columns, dim] -> logits [B, classes, rows, columns]."""

    def __init__(self, dim: int, classes: int, dropout: float, seed: int) -> None:
        super().__init__()
        self.norm = torch.nn.BatchNorm2d(dim)
        self.classify = torch.nn.Conv2d(dim, classes, 1)
        self._dropout = dropout
        self._random = torch.Generator().manual_seed(seed_for(seed, "", "segmentation head") >> 1)
        torch.nn.init.normal_(self.classify.weight, std=_INIT, generator=self._random)
        assert self.classify.bias is not None
        torch.nn.init.zeros_(self.classify.bias)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        features = patches.permute(0, 3, 1, 2)
        if self.training and self._dropout:
            kept = torch.rand(features.shape[:2], generator=self._random) >= self._dropout
            features = features * (kept / (1 - self._dropout)).to(features.device)[:, :, None, None]
        logits: torch.Tensor = self.classify(self.norm(features))
        return logits


def train_head(
    encoder: PatchEncoder,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    classes: int,
    schedule: HeadSchedule,
    device: torch.device,
    seed: int,
) -> LinearHead:
    """Train a head on ``schedule.steps`` batches on the device: uint8 [B, H, W, 3] and class indices, uint8 [B, H, W].

    The encoder learns nothing. Gradients are computed where they are switched off, too.
    """
    with torch.inference_mode(False), torch.enable_grad():
        head = LinearHead(encoder.dim, classes, schedule.dropout, seed).to(device)
        optimizer = torch.optim.AdamW(head.parameters(), weight_decay=schedule.weight_decay)
        for step, (images, labels) in enumerate(batches):
            patches = encoder.encode_patches(to_pixels(images, encoder.image)).clone()  # no tensor of inference
            logits = _resize(head(patches), labels.shape[1:])
            for group in optimizer.param_groups:
                group["lr"] = schedule.rate(step)
            optimizer.zero_grad()
            pixel_loss(logits, labels).backward()
            optimizer.step()
    return head.eval()


def pixel_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the pixels that are not ignored; 0 if there are none."""
    total = torch.nn.functional.cross_entropy(logits, labels.long(), ignore_index=IGNORED, reduction="sum")
    return total / (labels != IGNORED).sum().clamp(min=1)


@dataclass(frozen=True)
class Segmenter:
    """An encoder with its head. ``stride`` is that of windows in pixels; None: images are seen as a whole."""

    encoder: PatchEncoder
    head: LinearHead
    stride: int | None
    batch: int

    @property
    def size(self) -> tuple[int, int]:
        return self.encoder.image.height, self.encoder.image.width

    def logits(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [classes, H, W] of an image, uint8 [H, W, 3], and the features of its windows [N, dim].

        The image covers a window, and those of windows that overlap are averaged; the logits of a single window have
        the size of its grid.
        """
        height, width = self.size
        stride = self.stride or max(height, width)
        tops, lefts = (
            window_starts(length, side, stride) for length, side in zip(image.shape[:2], self.size, strict=True)
        )
        places = [(top, left) for top in tops for left in lefts]
        windows = torch.stack([image[top : top + height, left : left + width] for top, left in places])
        with torch.no_grad():
            patches = torch.cat(
                [self.encoder.encode_patches(to_pixels(part, self.encoder.image)) for part in windows.split(self.batch)]
            )
            found = torch.cat([self.head(part) for part in patches.split(self.batch)])
            features = patches.flatten(0, 2)
            if len(places) == 1:
                return found[0], features
            total = found.new_zeros(found.shape[1], *image.shape[:2])
            counts = found.new_zeros(image.shape[:2])
            for (top, left), of_window in zip(places, found, strict=True):
                total[:, top : top + height, left : left + width] += _resize(of_window[None], self.size)[0]
                counts[top : top + height, left : left + width] += 1
            return total / counts, features


def most_likely(logits: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """The class of each pixel, int64 [height, width], of logits [classes, H, W] that are resized bilinearly."""
    best, found = None, torch.zeros(size, dtype=torch.int64, device=logits.device)
    for first in range(0, len(logits), _CLASSES_AT_ONCE):
        values, indices = _resize(logits[None, first : first + _CLASSES_AT_ONCE], size)[0].max(0)
        if best is None:
            best, found = values, indices
        else:
            better = values > best
            best, found = torch.where(better, values, best), torch.where(better, indices + first, found)
    return found


def confusion(predicted: torch.Tensor, labels: torch.Tensor, classes: int) -> torch.Tensor:
    """Numbers of pixels, int64 [classes, classes], by true and predicted class; ignored pixels do not count."""
    counted = labels != IGNORED
    pairs = labels[counted].long() * classes + predicted[counted]
    return torch.bincount(pairs, minlength=classes * classes).view(classes, classes)


def mean_iou(counts: torch.Tensor) -> tuple[float, float]:
    """mIoU and pixel accuracy of ``confusion``.

    A class that is neither true nor predicted anywhere has no intersection over union, and is not in the mean.
    """
    counts = counts.double()
    hits = counts.diagonal()
    union = counts.sum(0) + counts.sum(1) - hits
    present = union > 0
    return float((hits[present] / union[present]).mean()), float(hits.sum() / counts.sum())


def _resize(logits: torch.Tensor, size: Iterable[int]) -> torch.Tensor:
    return torch.nn.functional.interpolate(logits, tuple(size), mode="bilinear", align_corners=False)
