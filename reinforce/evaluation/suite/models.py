"""Models that are evaluated together: each image is decoded once for all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from reinforce.config import Limits
from reinforce.errors import UserError
from reinforce.evaluation.classes import Template
from reinforce.evaluation.encoding import Encoder, NotFinite, build_classifier, encode_texts
from reinforce.evaluation.images import decode_batches
from reinforce.evaluation.reading import Example
from reinforce.evaluation.suite.content import ContentDigest
from reinforce.images.policy import PUBLISHED_POLICY
from reinforce.source.samples import Refusal
from teachers.device.accelerator import Accelerator
from teachers.preprocessing.pixels import to_pixels
from teachers.protocols import ImageSpec


@dataclass(frozen=True)
class Outcome:
    """What a set gives: ``metrics`` by model, the number of ``samples``, those ``refused``, and the ``classes``.

    ``failed`` has the reason why a model has no metrics; ``content`` is the digest of what was read.
    """

    metrics: dict[str, dict[str, float | None]]
    samples: int
    refused: list[Refusal]
    classes: int | None = None
    failed: dict[str, str] = field(default_factory=dict)
    content: str = ""


@dataclass(frozen=True)
class Models:
    """Dual encoders by name, on one accelerator. ``digest`` and ``not_finite`` are of one set."""

    encoders: Mapping[str, Encoder]
    accelerator: Accelerator
    batch: int
    threads: int
    weights: dict[tuple[str, ...], torch.Tensor] = field(default_factory=dict)  # classifiers; ImageNet's sets share one
    progress: Callable[[int], None] = lambda images: None  # receives the number of a set's images that are encoded
    digest: ContentDigest | None = None  # None: what is read is not hashed
    not_finite: NotFinite = field(default_factory=NotFinite)

    def among(self, names: Sequence[str], progress: Callable[[int], None]) -> Models:
        """The models of these names."""
        return replace(self, encoders={name: self.encoders[name] for name in names}, progress=progress)

    def for_set(self, digest: ContentDigest | None) -> Models:
        """The same models for one set: ``digest`` receives what is read, and embeddings are counted from 0."""
        return replace(self, digest=digest, not_finite=NotFinite())

    def encode_images(
        self, examples: Iterator[Example | Refusal], refused: list[Refusal]
    ) -> Iterator[tuple[dict[str, torch.Tensor], list[Any]]]:
        """Yield float32 [B, dim] of unit norm by model, on the device, and the targets of each batch.

        Images are decoded as by Pillow's ``convert("RGB")``, as the published evaluations do.
        """
        examples = examples if self.digest is None else self.digest.watch(examples)
        specs = {name: _image_spec(name, encoder) for name, encoder in self.encoders.items()}
        sizes = {(spec.height, spec.width, spec.interpolation, spec.resize): spec for spec in specs.values()}
        places = [*sizes]
        batches = decode_batches(
            examples, [*sizes.values()], self.batch, self.threads, Limits(), refused, PUBLISHED_POLICY
        )
        done = 0
        for pixels, targets in batches:
            put = [self.accelerator.put(array) for array in pixels]
            vectors = {}
            for name, spec in specs.items():
                at = places.index((spec.height, spec.width, spec.interpolation, spec.resize))
                vectors[name] = self.encoders[name].encode_images(to_pixels(put[at], spec)).float()
                self.not_finite.add(name, "image", vectors[name])
            yield vectors, targets
            done += len(targets)
            self.progress(done)

    def encode_all(
        self, examples: Iterator[Example | Refusal], refused: list[Refusal]
    ) -> tuple[dict[str, torch.Tensor], list[Any]]:
        """The vectors [N, dim] of all images on the CPU, by model, and the N targets; no model if there is no image."""
        parts: dict[str, list[torch.Tensor]] = {}
        targets: list[Any] = []
        for vectors, batch in self.encode_images(examples, refused):
            targets += batch
            for name, images in vectors.items():
                parts.setdefault(name, []).append(images.cpu())
        return {name: torch.cat(of_model) for name, of_model in parts.items()}, targets

    def encode_texts(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Encode N texts -> float32 [N, dim] on the CPU, by model."""
        vectors = {name: encode_texts(encoder, texts, self.batch).cpu() for name, encoder in self.encoders.items()}
        for name, of_model in vectors.items():
            self.not_finite.add(name, "text", of_model)
        return vectors

    def classifiers(self, classes: Sequence[str], templates: Sequence[Template]) -> dict[str, torch.Tensor]:
        """Class weights, float32 [C, dim] on the device, by model; those of the same texts are computed once."""
        texts = (*classes, "", *(template("{}") for template in templates))
        if self.digest is not None:
            self.digest.add_texts(texts)
        for name, encoder in self.encoders.items():
            if (name, *texts) not in self.weights:
                weights = build_classifier(encoder, classes, templates, self.batch)
                self.weights[(name, *texts)] = self.accelerator.put(weights)
            self.not_finite.add(name, "class", self.weights[(name, *texts)])
        return {name: self.weights[(name, *texts)] for name in self.encoders}


def _image_spec(name: str, encoder: Encoder) -> ImageSpec:
    if encoder.image is None:
        raise UserError(f"{name} has no image side; evaluate a model that encodes images.")
    return encoder.image
