"""Models that are evaluated, loaded and encoding: each image is decoded once for all that are evaluated together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from reinforce.errors import UserError
from reinforce.evaluation.classes import Template
from reinforce.evaluation.model_names import model_errors
from reinforce.evaluation.reading import ContentDigest, ImageBatches, geometry_of
from teachers.fast_paths.usage import in_force, loading
from teachers.pixels import to_pixels
from teachers.protocols import ImageSpec
from teachers.registry import teacher_spec
from teachers.runtime.accelerator import Accelerator, Precision
from teachers.runtime.determinism import set_flags
from teachers.spec import ModelSpec, TeacherSpec

NOT_FINITE_FIX = "Check the weights of the model, or evaluate it in fp32."
_TEXTS_AT_ONCE = 2**14  # bounds the memory of a classifier for any number of classes and templates


class Encoder(Protocol):
    """A model to evaluate: a ``teachers.protocols.Teacher``, or a module in memory. It may lack a side."""

    image: ImageSpec | None

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        """[B, 3, H, W] float32 on the device, preprocessed by ``image`` -> [B, dim], unit norm."""
        ...

    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """B strings -> [B, dim], unit norm."""
        ...


@dataclass
class NotFinite:
    """Counts of embeddings by model and sort, such as ``image``: all, and those with NaN or infinity.

    Such an embedding has no score, so that the metrics of a set would count it as a miss.
    """

    counts: dict[str, dict[str, tuple[int, int]]] = field(default_factory=dict)

    def add(self, model: str, sort: str, vectors: torch.Tensor) -> None:
        """Count the embeddings [N, dim] of a model."""
        sorts = self.counts.setdefault(model, {})
        wrong, total = sorts.get(sort, (0, 0))
        sorts[sort] = wrong + int((~vectors.isfinite().all(1)).sum()), total + len(vectors)

    def describe(self, model: str) -> str | None:
        """The problem of a model's embeddings; None if all are finite."""
        found = self.counts.get(model, {}).items()
        parts = [f"{wrong:,} of {total:,} {sort} embeddings" for sort, (wrong, total) in found if wrong]
        return f"{' and '.join(parts)} are not finite" if parts else None


def load_encoders(
    specs: Mapping[str, ModelSpec], device: str, precision: Precision, threads: int
) -> Iterator[tuple[str, Encoder, Accelerator]]:
    """Load models onto a device, each when it is asked for, and use at most ``threads`` of CPUs. Raises UserError."""
    torch.set_num_threads(min(torch.get_num_threads(), threads))  # torch ignores quotas of containers
    set_flags(device)
    for name, given in specs.items():
        with model_errors(name):
            accelerator = Accelerator(device, precision)
        yield name, load_encoder(name, given, device, precision), accelerator


def load_encoder(name: str, given: ModelSpec, device: str, precision: Precision) -> Encoder:
    """Load a model onto a device. Raises UserError."""
    with model_errors(name), loading(name):
        is_teacher = isinstance(given, TeacherSpec)
        spec = given if is_teacher else teacher_spec(model=given.model, pretrained=given.pretrained)
        if spec.uses_precision:
            spec = spec.model_copy(update={"precision": precision})
        return in_force(spec).load(name, device)


def encode_texts(model: Encoder, texts: Sequence[str], batch: int) -> torch.Tensor:
    """Encode N texts -> float32 [N, dim] on the model's device.

    Texts are batched by length, since a batch takes as long as its longest text.
    """
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    starts = range(0, len(texts), batch)
    # Each part is copied: the model may reuse its memory in the next call.
    parts = [model.encode_texts([texts[i] for i in order[start : start + batch]]).clone() for start in starts]
    vectors = torch.cat(parts).float()
    return vectors[torch.tensor(order, device=vectors.device).argsort()]


def build_classifier(model: Encoder, classes: Sequence[str], templates: Sequence[Template], batch: int) -> torch.Tensor:
    """Return class weights, float32 [C, dim] on the CPU, unit norm.

    Each is the mean of the embeddings of a class's texts, as in open_clip's ``build_zero_shot_classifier``.
    """
    rows = max(1, _TEXTS_AT_ONCE // len(templates))
    parts = []
    for start in range(0, len(classes), rows):
        names = classes[start : start + rows]
        vectors = encode_texts(model, [template(name) for name in names for template in templates], batch)
        parts.append(vectors.cpu().view(len(names), len(templates), -1).mean(1))
    means = torch.cat(parts)
    return means / means.norm(dim=1, keepdim=True)


@dataclass(frozen=True)
class EvaluatedModels:
    """Models by name, on one accelerator. ``not_finite`` is of one set.

    ``short`` says that published sets whose metrics need a training take its short schedule. ``shown`` is the number of
    images whose segmentations are drawn.
    """

    encoders: Mapping[str, Encoder]
    accelerator: Accelerator
    batch: int
    threads: int
    weights: dict[tuple[str, ...], torch.Tensor] = field(default_factory=dict)  # classifiers; ImageNet's sets share one
    not_finite: NotFinite = field(default_factory=NotFinite)
    kept: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)  # vectors of images that sets share
    short: bool = False
    shown: int = 0

    def encode_images(self, images: ImageBatches) -> Iterator[tuple[dict[str, torch.Tensor], list[Any]]]:
        """Yield float32 [B, dim] of unit norm by model, on the device, and the targets of each batch.

        Raises UserError for a model without an image side.
        """
        specs = {}
        for name, encoder in self.encoders.items():
            if encoder.image is None:
                raise UserError(f"{name} has no image side; evaluate a model that encodes images.")
            specs[name] = encoder.image
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
        next ones only read their files for the targets.
        """
        known = self.kept.get(shared)
        if known and self.encoders.keys() <= known.keys():
            targets = [target for _, batch in images.decode([], self.batch, self.threads) for target in batch]
            if all(len(targets) == len(of_model) for of_model in known.values()):
                for name in self.encoders:
                    self.not_finite.add(name, "image", known[name])
                return {name: known[name] for name in self.encoders}, targets
        self.kept.clear()
        parts: dict[str, list[torch.Tensor]] = {}
        targets = []
        for of_batch, targets_of_batch in self.encode_images(images):
            targets += targets_of_batch
            for name, of_model in of_batch.items():
                parts.setdefault(name, []).append(of_model.cpu())
        vectors = {name: torch.cat(of_model) for name, of_model in parts.items()}
        if shared and targets and not images.refused:
            self.kept[shared] = vectors
        return vectors, targets

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
                raise UserError(f"{name} has no text side: evaluate it on sets of `probes` and `segmentation`.")


def load_models(
    specs: Mapping[str, ModelSpec], device: str, precision: Precision, batch: int, threads: int
) -> EvaluatedModels:
    """Load all models onto one device, with ``threads`` that decode images. Raises UserError."""
    loaded = [*load_encoders(specs, device, precision, threads)]
    return EvaluatedModels({name: model for name, model, _ in loaded}, loaded[-1][2], batch, threads)
