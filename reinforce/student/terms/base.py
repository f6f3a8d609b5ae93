"""What a term of a student's loss states, and what it is computed from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeAlias

import torch
from torch.nn.functional import normalize

from reinforce.errors import UserError
from reinforce.student.teachers import CAPTION, SYNTHETIC, TeacherInfo
from reinforce.student.terms.balance import Moments

#: Features or targets: tensors [B, ...] by what they are of, ``image`` or a kind of text.
Tensors = Mapping[str, torch.Tensor]
#: Name of the map of an image tower among the features of ``losses_of_rows``.
MAP = "map"
#: Finds the moments of the targets of a section of a teacher, by what they are of, and if the third argument is true
#: their covariance; raises UserError.
FindMoments: TypeAlias = Callable[[str, str, bool], Mapping[str, Moments]]
#: Finds the entries of layers in dataset.json by the name of their model.
ReadEntries: TypeAlias = "Callable[[str, Sequence[str] | None], Mapping[str, Any]]"


@dataclass(frozen=True)
class TargetModels:
    """The models whose targets a training run may take.

    ``teachers`` are described by a TeacherInfo; ``entries`` finds the models that have other targets, by name, as
    their layers' entries in dataset.json. It gets the ``target_section`` of the kind, and the names that the config
    states; it raises ValueError if an online teacher of them lacks such targets. ``kinds`` are the kinds of text of
    examples, ``images`` is whether they have images. ``anchor`` is the teacher of ``loss.anchor``, which terms do not
    find among ``teachers``. ``moments`` are those of the targets of a teacher, stored or online, as batches have them.
    """

    teachers: Mapping[str, TeacherInfo]
    kinds: tuple[str, ...] = (CAPTION, SYNTHETIC)
    images: bool = True
    entries: ReadEntries = lambda section, names: {}
    anchor: TeacherInfo | None = None
    moments: FindMoments = lambda section, name, covariance: {}

    @property
    def texts(self) -> bool:
        """Whether examples have texts."""
        return bool(self.kinds)


def check_rows(where: str, *groups: Mapping[str, Any]) -> None:
    """Raise UserError unless the tensors of each group are [B, D] of one shape, with one B, at least 1, for all."""
    given = {name: rows for group in groups for name, rows in group.items()}
    shapes = {name: [*rows.shape] if isinstance(rows, torch.Tensor) else None for name, rows in given.items()}
    right = all(shape is not None and len(shape) == 2 for shape in shapes.values())
    right = right and all(len({tuple(shapes[name] or ()) for name in group}) == 1 for group in groups)
    if right and len(counts := {shape[0] for shape in shapes.values() if shape}) == 1 and counts != {0}:
        return
    together = "; ".join(" and ".join(group) for group in groups)
    got = ", ".join(f"{name} {shapes[name] or type(rows).__name__}" for name, rows in given.items())
    raise UserError(f"{where}: want tensors [B, D] of the same pairs, of one D: {together}. Got {got}.")


def as_scalar(name: str, value: Any, device: Any) -> torch.Tensor:
    """A number or a tensor of one as a scalar on a device. Raises UserError."""
    try:
        return torch.as_tensor(value, device=device).reshape(())
    except (RuntimeError, TypeError, ValueError):
        raise UserError(f"{name}: want a number, or a tensor of one, got {value!r:.100}") from None


@dataclass(frozen=True)
class Rows:
    """All rows of a rank: features and targets of its batch, and the learnt scalars.

    ``features`` are unit-norm [b, D], with the ``projections`` of terms; ``targets`` are by model; ``heads`` are those
    of the terms. ``reduced`` lets CUDA multiply in TF32.
    """

    features: Tensors
    scalars: Mapping[str, torch.Tensor]
    targets: Mapping[str, Tensors]
    reduced: bool = False
    heads: torch.nn.ModuleDict = field(default_factory=torch.nn.ModuleDict)


@dataclass(frozen=True, kw_only=True)
class Term:
    """One term of a student's loss. It implements ``losses_of_rows`` or, if it needs the rows of all ranks, ``losses``.

    The module of a term has ``make(loss, models)``, which returns the term, or None if the config does not ask for it,
    and raises UserError if the models do not fit. ``TERMS`` of ``student.config`` lists the modules.

    ``uses`` states what it takes from each model, by section and name, in a few words; these models are read.
    ``recorded`` are values by dotted key that decide what is learnt and are not in the config; they must not change on
    resume. ``scales`` are logit scales to learn, by teacher, with their starts. ``stage`` is that of the image tower
    whose map [p, C, h, w] it needs as the feature MAP of ``losses_of_rows``, if it needs one.

    ``key`` is that of ``loss`` in the config, in messages about ``stage`` and ``needs_start``. ``aligns`` is whether it
    makes the features of images and texts comparable, ``needs_start`` whether it implements ``losses_of_weights``.
    """

    uses: Mapping[tuple[str, str], str] = field(default_factory=dict)
    recorded: Mapping[str, Any] = field(default_factory=dict)
    scales: Mapping[str, float] = field(default_factory=dict)
    stage: int | None = None
    key: ClassVar[str] = ""
    aligns: ClassVar[bool] = False
    needs_start: ClassVar[bool] = False

    def heads(self, width: int) -> Mapping[str, torch.nn.Module]:
        """Modules learnt with the student, by a name without dots; ``width`` is that of its features."""
        return {}

    def map_heads(self, width: int) -> Mapping[str, torch.nn.Module]:
        """As ``heads``, for those of the map of ``stage``, which has ``width`` channels."""
        return {}

    def projections(self, features: Tensors, heads: torch.nn.ModuleDict) -> dict[str, torch.Tensor]:
        """Features [p, ...] besides the student's that ``losses`` needs of all rows, by a name that has a ``/``."""
        return {}

    def losses_of_rows(
        self, features: Tensors, targets: Mapping[str, Tensors], heads: torch.nn.ModuleDict
    ) -> dict[str, torch.Tensor]:
        """Weighted losses by name, means over the p rows of a microbatch; computed in the model's forward pass.

        ``features`` are unit-norm float32 [p, D], and MAP if the term has a ``stage``.
        """
        return {}

    def losses_of_weights(self, weights: Tensors, start: Tensors) -> Mapping[str, torch.Tensor]:
        """Weighted losses by name of the trained weights of a pretrained student; ``start`` are its first ones."""
        return {}

    def losses(self, rows: Rows) -> dict[str, torch.Tensor]:
        """Weighted losses by name over all rows of all ranks; the mean over the ranks is that of the global batch."""
        return {}

    def parts(self, rows: Rows) -> Iterator[tuple[str, str, torch.Tensor]]:
        """``("loss", TEACHER, its part)`` of each weighted mean over teachers, over the rows of this rank.

        Gradients reach the features, which are the student's alone. Where weights follow confidence, ``("rows",
        TEACHER, count)`` are those of which it is surest. Called on every rank.
        """
        yield from ()

    def losses_of_teachers(self, rows: Rows) -> dict[str, torch.Tensor]:
        """The parts of teachers, by name, in the weighted losses of ``rows``; called on every rank.

        Their gradients reach the student's features.
        """
        return {}


def mean_of_teachers(losses: Mapping[str, torch.Tensor], weights: Mapping[str, float]) -> torch.Tensor:
    """The mean of scalars by teacher, with weights of which those that are not given are 1."""
    if len({weights.get(name, 1.0) for name in losses}) == 1:
        return torch.stack([*losses.values()]).mean()
    return torch.stack([part for _, _, part in parts_of_teachers(1.0, losses, weights)]).sum()


def parts_of_teachers(
    weight: float, losses: Mapping[str, torch.Tensor], weights: Mapping[str, float]
) -> Iterator[tuple[str, str, torch.Tensor]]:
    """The ``Term.parts`` of ``weight * mean_of_teachers``."""
    total = sum(weights.get(name, 1.0) for name in losses)
    for name, loss in losses.items():
        yield "loss", name, weight * weights.get(name, 1.0) / total * loss


def module_name(model: str) -> str:
    """A model's name as that of a module, which cannot have dots; names of models have no commas."""
    return model.replace(".", ",")


def head_name(model: str, what: str) -> str:
    """Name of the head that learns ``what`` of a model."""
    return f"{module_name(model)}/{what}"


def unit(vectors: torch.Tensor) -> torch.Tensor:
    """Vectors [..., D] at unit norm, in float32."""
    return normalize(vectors.float(), dim=-1)


def scale_name(teacher: str) -> str:
    """Name of a teacher's learnt scale among the scalars of ``Encoded``."""
    return f"logit_scale/{teacher}"
