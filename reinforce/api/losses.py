"""The terms of a student's loss: each as a function of vectors, and all of them as a module, ``StudentLoss``.

Vectors are tensors [B, D] of a batch of B pairs, those of images and texts in the same order. They need not have unit
norm: functions normalise them. With torch.distributed, rows are compared with those of all ranks, and the mean over the
ranks is the loss of the global batch. Equations are in ``docs/loss.md``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import open_clip
import torch

from reinforce import settings
from reinforce.dataset.manifest import read_manifest
from reinforce.dataset.store import Store
from reinforce.errors import UserError
from reinforce.student.config import Loss, StudentConfig
from reinforce.student.teachers import CAPTION, IMAGE, SYNTHETIC
from reinforce.student.terms.anchor_weights import distance_from_start
from reinforce.student.terms.base import MAP, Rows, Tensors, as_scalar, check_rows, unit
from reinforce.student.terms.dense import dense
from reinforce.student.terms.features import features
from reinforce.student.terms.interactive import interactive
from reinforce.student.terms.pairs import Objective, contrastive_losses
from reinforce.student.terms.probabilities import probabilities
from reinforce.student.terms.registry import make_terms
from reinforce.student.towers import map_width
from reinforce.student.train import read_stored
from teachers.open_clip.teacher import image_spec

if TYPE_CHECKING:
    from reinforce.api.examples import Examples

__all__ = [
    "StudentLoss", "contrastive", "dense", "distance_from_start", "distillation", "features", "interactive",
    "probabilities",
]  # fmt: skip

#: Vectors of a teacher's images and texts, and its logit scale.
TeacherVectors = tuple[torch.Tensor, torch.Tensor, "float | torch.Tensor"]


def contrastive(
    image: torch.Tensor,
    text: torch.Tensor,
    logit_scale: torch.Tensor | float,
    logit_bias: torch.Tensor | float | None = None,
    form: Literal["softmax", "sigmoid"] = "softmax",
) -> torch.Tensor:
    """The loss of CLIP, or with ``form="sigmoid"`` of SigLIP, whose ``logit_bias`` is required."""
    check_rows("contrastive", {"image": image, "text": text})
    return _pairs(Objective(0.0, _checked_form(form, logit_bias)), image, text, logit_scale, logit_bias, {})


def distillation(
    image: torch.Tensor,
    text: torch.Tensor,
    logit_scale: torch.Tensor | float,
    teachers: Sequence[TeacherVectors],
    logit_bias: torch.Tensor | float | None = None,
    form: Literal["softmax", "sigmoid"] = "softmax",
    weights: Sequence[float] | Literal["confidence"] | None = None,
) -> torch.Tensor:
    """Cross-entropy of the student's similarities with the mean of the teachers' probabilities (MobileCLIP).

    Each of ``teachers`` is its vectors of the images [B, D], of the texts [B, D], and its logit scale. ``weights`` are
    of the teachers, or ``confidence``: of each row by the probability that a teacher gives to the true pair.
    """
    if not teachers:
        raise UserError("distillation: teachers is empty. Give the vectors of a teacher, or use `contrastive`.")
    if not isinstance(teachers, Sequence) or not all(isinstance(of, (tuple, list)) and len(of) == 3 for of in teachers):
        raise UserError("distillation: teachers must be a list of (vectors of images, vectors of texts, logit scale).")
    names = [str(number) for number in range(len(teachers))]
    of_teachers = [{f"image of teacher {n}": of[0], f"text of teacher {n}": of[1]} for n, of in enumerate(teachers)]
    check_rows("distillation", {"image": image, "text": text}, *of_teachers)
    targets = {name: {IMAGE: unit(of[0]), CAPTION: unit(of[1])} for name, of in zip(names, teachers, strict=True)}
    scales = {name: of[2] for name, of in zip(names, teachers, strict=True)}
    for name, scale in scales.items():
        as_scalar(f"distillation: logit scale of teacher {name}", scale, image.device)
    by_name: Any = weights or {}
    if weights is not None and not isinstance(weights, str):
        if len(weights) != len(names):
            raise UserError(f"distillation: want a weight for each of {len(names)} teachers, got {len(weights)}")
        by_name = dict(zip(names, weights, strict=True))
    own = settings.parse(Loss, {"weights": by_name}).weights
    objective = Objective(1.0, _checked_form(form, logit_bias), scales, {}, own)
    return _pairs(objective, image, text, logit_scale, logit_bias, targets)


class StudentLoss(torch.nn.Module):
    """The loss of `reinforce train` for a loop of your own: every term that the keys of ``loss`` ask for.

    ``examples`` state the teachers and their logit scales, ``keys`` are keys of ``loss`` of a student's config
    (``lambda`` as ``lambda_=0.7``). ``width`` is the dimension of the student's features, for terms that project them
    with heads, which are parameters of this module: give them to the optimizer, too. ``model`` is the model of
    open_clip that is trained, for terms of its weights, whose start are those of now, and of its spatial map. ``notes``
    describe the use of each teacher. Raises UserError if the stored vectors do not suffice.
    """

    def __init__(self, examples: Examples, width: int | None = None, model: Any = None, **keys: Any) -> None:
        super().__init__()
        loss = settings.as_config(Loss, {}, **keys)
        if loss.online:
            raise UserError(
                "teachers: online teachers are loaded in `reinforce train` only; here, targets are stored. Remove it."
            )
        urls = [source.url for source in examples.data.datasets]
        unread: dict[str, Any] = {"output": "-", "student": {"model": "-"}, "train": {"steps": 1}}
        config = settings.parse(StudentConfig, {**unread, "data": examples.data, "loss": loss, "seed": examples.seed})
        self.terms = make_terms(loss, read_stored(config, {url: read_manifest(Store(url)) for url in urls}))
        self.notes = [*self.terms.notes]
        try:
            heads = self.terms.merged(lambda term: term.heads(width or 1))
        except UserError:
            if width is not None:
                raise
            heads = {"": torch.nn.Identity()}
        if heads and width is None:
            raise UserError(
                "this loss compares the student's features with vectors of teachers: set `width` to their dimension, "
                'or features="none" to leave one-sided teachers out'
            )
        self.heads = torch.nn.ModuleDict(heads)
        own = {target.model for target in examples.targets if target.name not in (IMAGE, CAPTION, SYNTHETIC)}
        for section, names in self.terms.models.items():
            if section != "teachers" and (missing := [name for name in names if name not in own]):
                raise UserError(
                    f"the loss reads {section} that these examples lack: set {section}={missing} of Examples."
                )
        self._models = (model,)  # in a tuple, so that its parameters are not those of this module
        self.heads.update(self.terms.map_heads(self._map_width))
        self._start: dict[str, torch.Tensor] = {}
        if self.terms.start_key is not None:
            named = self._model(self.terms.start_key).named_parameters()
            self._start = {name: weight.detach().clone() for name, weight in named if weight.requires_grad}
        self.scales = self.terms.scales()
        self._rows = (*((IMAGE,) if examples.data.images != "none" else ()), *examples.kinds)
        self._width = width

    def encode_image(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Features ``image`` [B, D] by the ``model``, and if a term needs it the ``map`` of its tower, in one pass."""
        return self.terms.encode_images(self._model("encode_image"), pixels)

    def forward(
        self,
        features: Tensors,
        targets: Mapping[str, Tensors],
        logit_scale: torch.Tensor | float,
        logit_bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The total loss, a scalar, of ``features`` [B, D] by ``image``, ``caption`` and ``synthetic``.

        Where a term needs it they have the ``map`` of the images, too, as ``encode_image`` returns it. ``targets`` are
        those of a batch of examples, ``logit_scale`` is that of the student, not its logarithm.
        """
        return torch.stack([*self.losses(features, targets, logit_scale, logit_bias).values()]).sum()

    def losses(
        self,
        features: Tensors,
        targets: Mapping[str, Tensors],
        logit_scale: torch.Tensor | float,
        logit_bias: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """The weighted terms by name, such as ``distill/caption``, which add to the total."""
        maps = () if self.terms.mapped.stage is None else (MAP,)
        self._check(features, targets, maps)
        of_rows = {what: rows if what in maps else unit(rows) for what, rows in features.items()}
        features = {what: rows for what, rows in of_rows.items() if what not in maps}
        device = next(iter(features.values())).device
        scalars = {"logit_scale": as_scalar("logit_scale", logit_scale, device)}
        if logit_bias is not None:
            scalars["logit_bias"] = as_scalar("logit_bias", logit_bias, device)
        scalars |= self.terms.scalars(self.scales)
        own = {name: dict(of) for name, of in targets.items()}
        try:
            losses = self.terms.losses_of_rows(of_rows, own, self.heads)
            if self._start:
                weights = dict(self._model(str(self.terms.start_key)).named_parameters())
                self._start = {name: value.to(weights[name]) for name, value in self._start.items()}
                losses |= self.terms.merged(lambda term: term.losses_of_weights(weights, self._start))
            projections = self.terms.merged(lambda term: term.projections(features, self.heads))
            rows = Rows({**features, **projections}, scalars, own, heads=self.heads)
            return {**losses, **self.terms.merged(lambda term: term.losses(rows))}
        except KeyError as error:
            raise UserError(
                f"the batch has no {error} that the loss needs: pass the `targets` of a batch of the same examples"
            ) from None

    def _check(self, features: Any, targets: Any, maps: Sequence[str]) -> None:
        """Raise UserError unless features are those that examples have, and targets those of as many examples."""
        stated = [targets, *targets.values()] if isinstance(targets, Mapping) else [targets]
        if not all(isinstance(one, Mapping) for one in (features, *stated)):
            raise UserError("want features by what they are of, such as {'image': ...}, and the `targets` of a batch.")
        if unknown := features.keys() - {*self._rows, *maps}:
            raise UserError(f"features: the examples have no {min(unknown)!r}; they have: {', '.join(self._rows)}.")
        if maps and MAP not in features:
            key = self.terms.mapped.key
            raise UserError(f"features: `{key}` needs the `map` of the images: add what `encode_image` returns.")
        if missing := [name for name in self._rows if name not in features]:
            raise UserError(
                f"features: the examples have {missing[0]!r}, which is missing: encode it, or let the examples have "
                "none, by `captioners=[]` or `captions`."
            )
        check_rows("features", {name: features[name] for name in self._rows})
        rows, dim = features[self._rows[0]].shape
        if self._width not in (None, dim):
            raise UserError(f"features: have {dim} dimensions, and `width` is {self._width}. Set `width` to theirs.")
        counts = {f"{name} of {model}": len(of) for model, own in targets.items() for name, of in own.items()}
        counts |= {name: len(features[name]) for name in maps}
        if other := [name for name, count in counts.items() if count != rows]:
            raise UserError(
                f"features have {rows:,} rows, and {other[0]} has {counts[other[0]]:,}: want those of one batch."
            )

    def _model(self, what: str) -> Any:
        """The model that is trained. Raises UserError if it was not given, or is none of open_clip."""
        [model] = self._models
        if not isinstance(getattr(model, "visual", None), torch.nn.Module):
            raise UserError(
                f"{what} reads the model that is trained: set `model` to it, a model of open_clip, got "
                f"{'none' if model is None else type(model).__name__}."
            )
        return model

    def _map_width(self, stage: int) -> int:
        """Channels of the map after a stage of the model's image tower. Raises ValueError if there is none."""
        model = self._model(self.terms.mapped.key)
        try:
            return map_width(model, image_spec(open_clip.get_model_preprocess_cfg(model)), stage)
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{type(model).__name__} has no map that is known here: {error}") from error


def _pairs(
    objective: Objective,
    image: torch.Tensor,
    text: torch.Tensor,
    logit_scale: torch.Tensor | float,
    logit_bias: torch.Tensor | float | None,
    targets: Mapping[str, Tensors],
) -> torch.Tensor:
    rows = {IMAGE: unit(image), CAPTION: unit(text)}
    scale = as_scalar("logit_scale", logit_scale, image.device)
    bias = None if logit_bias is None else as_scalar("logit_bias", logit_bias, image.device)
    [loss] = contrastive_losses(objective, rows, scale, bias, targets).values()
    return loss


def _checked_form(form: Any, logit_bias: Any) -> Literal["softmax", "sigmoid"]:
    if form not in ("softmax", "sigmoid"):
        raise UserError(f"form: want softmax or sigmoid, got {form!r:.100}")
    if form == "sigmoid" and logit_bias is None:
        raise UserError("form: sigmoid needs `logit_bias`, that of the student.")
    found: Literal["softmax", "sigmoid"] = form
    return found
