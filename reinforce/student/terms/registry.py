"""The terms of a student's loss, found by name and made for a config."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from reinforce.dataset.kinds.registry import owner_of
from reinforce.errors import UserError
from reinforce.student.config import TERMS, Loss
from reinforce.student.teachers import IMAGE
from reinforce.student.terms.base import MAP, TargetModels, Tensors, Term, module_name, scale_name
from teachers.image_encoder import features_and_map

#: The module of each term, in the order of the losses.
MODULES = {name: importlib.import_module(f"{__package__}.{name}") for name in TERMS}

_UNUSED = "unused: it has only one side and loss.features is none, or only texts, which are not read"


@dataclass(frozen=True)
class Terms:
    """The terms of one training run; ``notes`` describe the use of each model in one line."""

    terms: Sequence[Term] = ()
    notes: Sequence[str] = field(default=(), compare=False)

    @property
    def models(self) -> dict[str, list[str]]:
        """The models that have to be read or run, by section of dataset.json."""
        found: dict[str, list[str]] = {"teachers": []}
        for section, name in dict.fromkeys(key for term in self.terms for key in term.uses):
            found.setdefault(section, []).append(name)
        return found

    @property
    def start_key(self) -> str | None:
        """The key of ``loss`` of a term that needs the first weights; None if none does."""
        return next((term.key for term in self.terms if term.needs_start), None)

    @property
    def mapped(self) -> Term:
        """A term that needs the map of a stage; one whose ``stage`` is None if none does."""
        return next((term for term in self.terms if term.stage is not None), Term())

    def merged(self, part: Callable[[Term], Mapping[str, Any]]) -> dict[str, Any]:
        """A part of each term, such as its losses, in one dict."""
        return {key: value for term in self.terms for key, value in part(term).items()}

    def map_heads(self, width: Callable[[int], int]) -> dict[str, torch.nn.Module]:
        """The heads of the map; ``width`` returns the channels after a stage. Raises UserError for its ValueError."""
        if self.mapped.stage is None:
            return {}
        try:
            channels = width(self.mapped.stage)
        except ValueError as error:
            raise UserError(f"loss.{self.mapped.key}.stage: {error}") from error
        return self.merged(lambda term: term.map_heads(channels))

    def scales(self) -> torch.nn.ModuleDict:
        """The logit scales to learn, by the names of modules of their teachers."""
        starts = self.merged(lambda term: term.scales)
        return torch.nn.ModuleDict({module_name(teacher): _Scale(start) for teacher, start in starts.items()})

    @staticmethod
    def scalars(scales: torch.nn.ModuleDict) -> dict[str, torch.Tensor]:
        """The values of ``scales`` as scalars of ``Rows``."""
        return {scale_name(name.replace(",", ".")): scale() for name, scale in scales.items()}

    def encode_images(self, clip: Any, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """The features IMAGE [p, D] of a model and, if a term needs it, the MAP of its image tower, in one pass."""
        stage = self.mapped.stage
        if stage is None:
            return {IMAGE: clip.encode_image(pixels)}
        return dict(zip((IMAGE, MAP), features_and_map(clip.visual, pixels, stage), strict=True))

    def losses_of_rows(
        self, features: Tensors, targets: Mapping[str, Tensors], heads: torch.nn.ModuleDict
    ) -> dict[str, torch.Tensor]:
        plain = {name: rows for name, rows in features.items() if name != MAP}
        return self.merged(lambda term: term.losses_of_rows(plain if term.stage is None else features, targets, heads))


class _Scale(torch.nn.Module):
    """A teacher's logit scale; the loop clamps parameters of this name and does not decay them."""

    def __init__(self, start: float) -> None:
        super().__init__()
        self.logit_scale = torch.nn.Parameter(torch.tensor(math.log(start)))

    def forward(self) -> torch.Tensor:
        return self.logit_scale.exp()


def make_terms(loss: Loss, models: TargetModels) -> Terms:
    """The terms of a config. Raises UserError if the models do not fit, or if nothing would be learnt."""
    others, teachers = models, {**models.teachers}
    for name in loss.anchors:
        if name not in teachers:
            raise UserError(f"loss.anchor.teacher: there is no {name!r}; there are: {', '.join(teachers) or 'none'}.")
        others = replace(others, anchor=teachers.pop(name), teachers=teachers)
    terms: list[Term] = []
    for name, module in MODULES.items():
        try:
            term = module.make(loss, others)
        except ValueError as error:
            raise UserError(f"loss.{name}: {error}") from error
        if term is not None:
            terms.append(term)
    if not (models.texts and models.images):
        if not any(term.uses for term in terms):
            key, read, layer = ("images", "texts", "caption") if models.texts else ("captions", "images", "images")
            raise UserError(
                f"data.{key} is none, so only {read} are read, and no loss has targets of them. Name teachers with "
                f"layers embeddings/TEACHER/{layer} under data.teachers; loss.lambda must be above 0, and "
                "loss.features not none."
            )
    elif not any(term.aligns for term in terms) or (loss.lambda_ > 0 and not any(term.uses for term in terms)):
        raise UserError(
            f"loss.lambda is {loss.lambda_:g} and no teacher has vectors of both images and texts, so no loss would "
            "align them. For images alone set data.captions to none. Else name such a teacher under data.teachers, or "
            "lower loss.lambda (0: plain CLIP, which needs captions)."
        )
    keys = [key for term in terms for key in term.uses]
    used = {name for section, name in keys if owner_of(section) == "teachers" and name not in loss.anchors}
    if unknown := [name for name in loss.named_weights if name not in used]:
        raise UserError(
            f"loss.weights: no loss is a mean over teachers with {unknown[0]!r}; those with a weight are: "
            f"{', '.join(sorted(used)) or 'none'}."
        )
    notes = [] if loss.reads_ensemble or loss.anchors else ["lambda 0: no teacher is used"]
    uses: dict[tuple[str, str], list[str]] = {("teachers", name): [] for name in models.teachers}
    for term in terms:
        for (section, name), use in term.uses.items():
            uses.setdefault((owner_of(section), name), []).append(use)
    for name, weight in loss.named_weights.items():
        uses["teachers", name].append(f"weight {weight:g}")
    notes += [f"{section[:-1]} {name}: {'; '.join(found) or _UNUSED}" for (section, name), found in uses.items()]
    return Terms(terms, notes)
