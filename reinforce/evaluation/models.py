"""Models that are evaluated together: each image is decoded once for all of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from reinforce.errors import UserError
from reinforce.evaluation.classes import Template
from reinforce.evaluation.content import ContentDigest
from reinforce.evaluation.encoding import Encoder, NotFinite, build_classifier, encode_texts, load_encoders
from reinforce.evaluation.images import ImageBatches, geometry_of
from reinforce.terminal import OpenScreen
from teachers.preprocessing.pixels import to_pixels
from teachers.protocols import ImageSpec
from teachers.runtime.accelerator import Accelerator, Precision
from teachers.spec import ModelSpec


class _Encoded(NamedTuple):
    """The vectors [N, dim] of images by model, and their targets."""

    vectors: dict[str, torch.Tensor]
    targets: list[Any]
    images: ImageBatches


@dataclass(frozen=True)
class Models:
    """Models by name, on one accelerator. ``not_finite`` is of one set.

    ``short`` says that published sets whose metrics need a training take its short schedule, and ``open_screen`` is
    where such a training shows its steps, if it does. ``shown`` is the number of images whose segmentations are drawn.
    """

    encoders: Mapping[str, Encoder]
    accelerator: Accelerator
    batch: int
    threads: int
    weights: dict[tuple[str, ...], torch.Tensor] = field(default_factory=dict)  # classifiers; ImageNet's sets share one
    not_finite: NotFinite = field(default_factory=NotFinite)
    kept: dict[str, _Encoded] = field(default_factory=dict)  # images that sets share
    short: bool = False
    shown: int = 0
    open_screen: OpenScreen | None = None

    def encode_images(self, images: ImageBatches) -> Iterator[tuple[dict[str, torch.Tensor], list[Any]]]:
        """Yield float32 [B, dim] of unit norm by model, on the device, and the targets of each batch.

        Raises UserError for a model without an image side.
        """
        specs = {name: _image_spec(name, encoder) for name, encoder in self.encoders.items()}
        sizes = {geometry_of(spec): spec for spec in specs.values()}
        for pixels, targets in images.decode([*sizes.values()], self.batch, self.threads):
            put = dict(zip(sizes, map(self.accelerator.put, pixels), strict=True))
            vectors = {}
            for name, spec in specs.items():
                vectors[name] = self.encoders[name].encode_images(to_pixels(put[geometry_of(spec)], spec)).float()
                self.not_finite.add(name, "image", vectors[name])
            yield vectors, targets

    def encode_all(self, images: ImageBatches, shared: str = "") -> tuple[dict[str, torch.Tensor], list[Any]]:
        """The vectors [N, dim] of all images on the CPU, by model, and the N targets; no model if there is no image.

        Sets with the same name ``shared`` have the same images in the same order: the first set encodes them, and the
        next ones only read their files for the targets, unless they have the same ``images``.
        """
        known = self.kept.get(shared)
        same = known is not None and known.images is images
        if known and (same or not known.images.refused) and self.encoders.keys() <= known.vectors.keys():
            targets = known.targets
            if not same:
                targets = [target for _, batch in images.decode([], self.batch, self.threads) for target in batch]
            if len(targets) == len(known.targets):
                for name in self.encoders:
                    self.not_finite.add(name, "image", known.vectors[name])
                return {name: known.vectors[name] for name in self.encoders}, targets
        self.kept.clear()
        vectors, targets = self._encode_all(images)
        if shared and targets:
            self.kept[shared] = _Encoded(vectors, targets, images)
        return vectors, targets

    def _encode_all(self, images: ImageBatches) -> tuple[dict[str, torch.Tensor], list[Any]]:
        parts: dict[str, list[torch.Tensor]] = {}
        targets: list[Any] = []
        for vectors, batch in self.encode_images(images):
            targets += batch
            for name, of_model in vectors.items():
                parts.setdefault(name, []).append(of_model.cpu())
        return {name: torch.cat(of_model) for name, of_model in parts.items()}, targets

    def encode_texts(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Encode N texts -> float32 [N, dim] on the CPU, by model. Raises UserError for a model without a text side."""
        self._check_texts()
        vectors = {name: encode_texts(encoder, texts, self.batch).cpu() for name, encoder in self.encoders.items()}
        for name, of_model in vectors.items():
            self.not_finite.add(name, "text", of_model)
        return vectors

    def classifiers(
        self, classes: Sequence[str], templates: Sequence[Template], digest: ContentDigest | None = None
    ) -> dict[str, torch.Tensor]:
        """Class weights, float32 [C, dim] on the device, by model; those of the same texts are computed once.

        ``digest`` receives the texts. Raises UserError for a model without a text side.
        """
        self._check_texts()
        texts = (*classes, "", *(template("{}") for template in templates))
        if digest is not None:
            digest.texts.append(texts)
        for name, encoder in self.encoders.items():
            if (name, *texts) not in self.weights:
                weights = build_classifier(encoder, classes, templates, self.batch)
                self.weights[(name, *texts)] = self.accelerator.put(weights)
            self.not_finite.add(name, "class", self.weights[(name, *texts)])
        return {name: self.weights[(name, *texts)] for name in self.encoders}

    def _check_texts(self) -> None:
        for name, encoder in self.encoders.items():
            if not callable(getattr(encoder, "encode_texts", None)):
                raise UserError(f"{name} has no text side: evaluate it on sets of `knn`, `linear` and `segmentation`.")


def load_models(specs: Mapping[str, ModelSpec], device: str, precision: Precision, batch: int, threads: int) -> Models:
    """Load all models onto one device, with ``threads`` that decode images. Raises UserError."""
    loaded = [*load_encoders(specs, device, precision, threads)]
    return Models({name: model for name, model, _ in loaded}, loaded[-1][2], batch, threads)


def _image_spec(name: str, encoder: Encoder) -> ImageSpec:
    if encoder.image is None:
        raise UserError(f"{name} has no image side; evaluate a model that encodes images.")
    return encoder.image
