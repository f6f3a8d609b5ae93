"""How well a model follows each teacher of a reinforced dataset, by the stored vectors of one crop of each sample.

A model encodes the crop of a sample's first augmentation record, replayed at its own size as in a student's training.
Of these vectors and those of a teacher, the shared nearest neighbours are counted, and a linear map from the first to
the second is fitted to one half of the rows and measured on the other.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from pydantic import Field

from reinforce.dataset.layers import embeddings_layer, require_images
from reinforce.dataset.manifest import read_manifest, select_names
from reinforce.dataset.reading import Dataset
from reinforce.dataset.sample import ImagePolicies, Sample
from reinforce.dataset.store import Store
from reinforce.dataset.vectors import normalized
from reinforce.errors import UserError
from reinforce.evaluation.kinds.base import ImageSet, OwnSet, SetKind
from reinforce.evaluation.reading import IMAGES_KEY, ImageBatches, LabelledImage
from reinforce.evaluation.report import Metrics, Outcome
from reinforce.settings import OneOrMore
from reinforce.source.config import Limits
from reinforce.source.samples import Refusal
from schemas import Reason
from teachers.protocols import ImageSpec

if TYPE_CHECKING:
    import torch

    from reinforce.evaluation.encoding import EvaluatedModels
    from teachers.runtime.accelerator import Accelerator

#: Summaries of the teachers by name, which are names of metrics as those of teachers are.
_SUMMARIES: Mapping[str, Callable[..., np.ndarray]] = {"mean": np.mean, "lowest": np.min}
_SCORES = ("knn", "variance")
#: Ridge term of the linear map, as a share of the mean squared length of a centred row of features. So it does not
#: depend on the scale of the features, has less effect the more rows there are, and allows fewer rows than dimensions.
#: Of 0.001 to 3 it is the largest by which the demo's teachers explain 99 % of themselves from 600 samples on; from 200
#: on, they explain each other by at most 0.02 less than with the best of these.
RIDGE = 0.1


class AgreementSet(OwnSet):
    """Samples of a reinforced dataset, and the teachers with which a model is compared. Needs no texts."""

    dataset: str = Field(min_length=1, description="folder or URL of a reinforced dataset")
    teachers: OneOrMore | None = Field(
        None,
        min_length=1,
        description="teachers with stored vectors of images, by name or pattern; default: all of these",
    )
    k: int = Field(10, ge=1, description="number of nearest neighbours")
    limit: int | None = Field(None, ge=1, description="samples to use, the first ones")

    @functools.cached_property
    def names(self) -> list[str]:
        """The teachers, by dataset.json, which is read once. Raises UserError for one without vectors of images."""
        url = self.dataset
        manifest = read_manifest(Store(url))
        require_images(manifest, url)
        stored = [
            name
            for name in select_names(url, "teachers", None, manifest)
            if embeddings_layer(name, "images") in manifest["layers"]
        ]
        chosen = stored if self.teachers is None else select_names(url, "teachers", self.teachers, manifest)
        if lacking := [name for name in chosen if name not in stored]:
            known = ", ".join(stored) or "no teacher"
            raise UserError(f"{url} has no vectors of images of teacher {lacking[0]}; {known} has them.")
        if not chosen:
            raise UserError(f"{url} has no vectors of images of a teacher. Run a config with `teachers` on it.")
        if named := [name for name in chosen if name in _SUMMARIES]:
            raise UserError(f"{url}: a metric over all teachers is named {named[0]}, too. Leave out this teacher.")
        return chosen

    @property
    def scores(self) -> list[str]:
        return [f"{name}/{score}" for name in (*_SUMMARIES, *self.names) for score in _SCORES]

    @property
    def size(self) -> int | None:
        return self.limit


def _open(config: AgreementSet, name: str, limits: Limits, images_from: Sequence[str] = ()) -> ImageSet:
    """A set of the user, which is checked. Raises UserError."""
    layers = [embeddings_layer(teacher, "images") for teacher in config.names]
    models = {"teachers": config.names}
    data = Dataset(config.dataset, models, images_from=images_from, images_key=IMAGES_KEY, layers=layers)
    policies = ImagePolicies.from_manifest(data.manifest, data.store.url)
    policies.check()

    def examples() -> Iterator[LabelledImage | Refusal]:
        for sample in itertools.islice(data, config.limit):
            yield _example(sample, config.names)

    usable = [isinstance(item, LabelledImage) for item in examples()]
    if fault := _too_few(sum(usable), config):
        raise UserError(f"{name}: {fault}")
    return ImageSet(name, examples, functools.partial(_score, config), len(usable), policies.image)


KIND = SetKind("agreement", None, section="agreement", open_own=_open)


def _example(sample: Sample, teachers: Sequence[str]) -> LabelledImage | Refusal:
    """The crop of a sample's first record; its target has the vectors of the teachers, float32 [D] of unit norm."""
    stored = [sample.images[name][0] for name in teachers]
    for name, vector in zip(teachers, stored, strict=True):
        if not np.isfinite(vector).all():
            return Refusal(sample.key, Reason.NOT_FINITE, f"the stored vector of {name} is null or not finite")
        if not vector.any():
            return Refusal(sample.key, Reason.ZERO_VECTOR, f"the stored vector of {name} is zero")

    def crop(image: Image.Image, spec: ImageSpec) -> np.ndarray:
        return np.asarray(sample.augmented(0, spec.height, image))

    return LabelledImage(sample.key, functools.partial(bytes, sample.image), [*map(normalized, stored)], crop)


def _score(config: AgreementSet, models: EvaluatedModels, images: ImageBatches) -> Outcome:
    import torch

    from reinforce.evaluation.ranking import find_others, shared_neighbours

    accelerator = models.accelerator.of_float64("nearest neighbours")
    vectors, targets = models.encode_all(images)
    outcome = Outcome({}, len(targets) + len(images.refused), images.refused)
    of_teachers = {
        name: torch.from_numpy(np.stack(rows))
        for name, rows in zip(config.names, zip(*targets, strict=True), strict=False)  # no rows without an image
    }
    fault = _too_few(len(targets), config)
    for name, stored in of_teachers.items():
        if bool((stored == stored[0]).all()):
            fault = f"all stored vectors of {name} are equal, so that there is nothing to follow: leave it out."
    if fault:
        return replace(outcome, failed=dict.fromkeys(vectors, fault))
    metrics: dict[str, Metrics] = {}
    for model, features in vectors.items():
        if not features.isfinite().all():  # `evaluate_set` reports how many are not
            metrics[model] = {}
            continue
        neighbours = find_others(features, features, config.k, accelerator)
        found = np.array(
            [
                (
                    shared_neighbours(neighbours, find_others(stored, stored, config.k, accelerator)),
                    explained_variance(features, stored, accelerator),
                )
                for stored in of_teachers.values()
            ]
        )
        rows = np.concatenate([[summary(found, axis=0) for summary in _SUMMARIES.values()], found])
        metrics[model] = dict(zip(config.scores, rows.ravel().tolist(), strict=True))
    return replace(outcome, metrics=metrics)


def _too_few(rows: int, config: AgreementSet) -> str | None:
    least = 2 * config.k + 2
    if rows >= least:
        return None
    return (
        f"k of {config.k} neighbours needs {least} samples with a vector of {' and '.join(config.names)}, and {rows:,} "
        "are usable: set `k` to a smaller number, or take more samples."
    )


def explained_variance(features: torch.Tensor, targets: torch.Tensor, accelerator: Accelerator) -> float:
    """The share of the variance of targets [N, D] that a linear map of features [N, E] explains, mean of two fits.

    Each fit is a ridge regression, of ``RIDGE``, from every second row, and is measured on the others, as
    ``1 - |residual|^2 / |targets - mean of the fitted rows|^2``. So 0 is what this mean alone explains; a mean below 0
    is 0. The device needs float64.
    """
    import torch

    x, y = accelerator.put(features).double(), accelerator.put(targets).double()
    explained = []
    for first in (0, 1):
        fitted, others = slice(first, None, 2), slice(1 - first, None, 2)
        inputs, outputs = x - x[fitted].mean(0), y - y[fitted].mean(0)
        products = inputs[fitted].T @ inputs[fitted]
        ridge = RIDGE * products.trace() / len(inputs[fitted])
        products.diagonal().add_(ridge.clamp_min(torch.finfo(torch.float64).tiny))  # equal features give no map
        weights = torch.linalg.solve(products, inputs[fitted].T @ outputs[fitted])
        residual = outputs[others] - inputs[others] @ weights
        explained.append(1 - float(residual.square().sum() / outputs[others].square().sum()))
    return max(0.0, sum(explained) / 2)
