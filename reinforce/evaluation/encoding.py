"""Loading of models, and text embeddings: of captions, and as a zero-shot classifier from classes and templates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from reinforce.evaluation.classes import Template
from reinforce.model_names import model_errors
from teachers.fast_paths.usage import in_force, loading
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
