"""The index of a teacher: whether a model's vectors of images find what the teacher's find among the teacher's vectors.

The index has the teacher's vectors of all images. Each image is a query against the others, once by its vector of the
teacher and once by that of the model; recall@k is the share of the teacher's k nearest that are among the model's.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from reinforce.errors import UserError
from reinforce.evaluation.kinds.base import ImageSet, OwnSet, SetKind, SetSource
from reinforce.evaluation.model_names import resolve_models
from reinforce.evaluation.reading import ImageBatches, LabelledImage, input_of, read_samples
from reinforce.evaluation.report import Metrics, Outcome
from reinforce.source.config import Limits
from reinforce.source.samples import Refusal

if TYPE_CHECKING:
    import torch

    from reinforce.evaluation.encoding import EvaluatedModels
    from teachers.runtime.accelerator import Accelerator


class IndexSet(SetSource, OwnSet):
    """Images, and the teacher whose vectors of them are the index. Needs no texts."""

    images: str | list[str] = Field(
        min_length=1,
        description="what `source` of a run may be: tars, Parquet, jsonl or csv files, a folder of images, or a "
        "reinforced dataset",
    )
    teacher: str = Field(
        min_length=1, description="the teacher, by a name of `reinforce evaluate`, such as RUN.yaml:TEACHER"
    )
    k: list[Annotated[int, Field(ge=1)]] = Field(
        [10], min_length=1, description="numbers of neighbours; each gives a metric"
    )

    @property
    def scores(self) -> list[str]:
        return [f"k{count}/recall" for count in self.k]


class _Index:
    """The vectors of the teacher, computed once: a set is scored for several models, or often in a training run."""

    def __init__(self, config: IndexSet, name: str) -> None:
        self._config, self._name = config, name
        self._found: tuple[list[str], torch.Tensor | None] | None = None  # keys and vectors of the images
        with resolve_models([config.teacher], teachers=True):
            pass  # reports a teacher that does not exist

    def vectors(self, models: EvaluatedModels, images: ImageBatches) -> tuple[list[str], torch.Tensor | None]:
        """Keys, and vectors [N, D] on the CPU or None if there is no image. Raises UserError if the teacher fails."""
        if self._found is None:
            from reinforce.evaluation.encoding import NOT_FINITE_FIX, NotFinite, load_encoder

            teacher, accelerator = self._config.teacher, models.accelerator
            with resolve_models([teacher], teachers=True) as specs:
                encoder = load_encoder(teacher, specs[teacher], str(accelerator.device), accelerator.precision)
            alone = replace(models, encoders={teacher: encoder}, weights={}, not_finite=NotFinite())
            vectors, keys = alone.encode_all(images)
            if fault := alone.not_finite.describe(teacher):
                raise UserError(f"{self._name}: {teacher}: {fault}. {NOT_FINITE_FIX}")
            self._found = keys, vectors.get(teacher)
        return self._found


def _score(config: IndexSet, index: _Index, models: EvaluatedModels, images: ImageBatches) -> Outcome:
    keys, stored = index.vectors(models, images)
    vectors, of_models = models.encode_all(images)
    outcome = Outcome({}, len(keys) + len(images.refused), images.refused)
    if stored is None:
        return outcome
    if of_models != keys:
        raise UserError("the images have changed since the teacher encoded them. Try again.")
    if len(keys) <= max(config.k):
        return replace(outcome, failed=dict.fromkeys(vectors, _too_few(len(keys), config)))
    metrics: dict[str, Metrics] = {}
    failed: dict[str, str] = {}
    for name, queries in vectors.items():
        if queries.shape[1] != stored.shape[1]:
            failed[name] = (
                f"its vectors have {queries.shape[1]} dimensions and those of {config.teacher} {stored.shape[1]}, so "
                "they are of another space. Train it with loss.features.head: none."
            )
        else:
            finite = bool(queries.isfinite().all())  # else `evaluate_set` reports how many are not
            metrics[name] = _recalls(queries, stored, config.k, models.accelerator) if finite else {}
    return replace(outcome, metrics=metrics, failed=failed)


def _recalls(queries: torch.Tensor, index: torch.Tensor, counts: Sequence[int], accelerator: Accelerator) -> Metrics:
    """Recall of the nearest in ``index`` [N, D] by its own rows when they are searched by ``queries`` [N, D]."""
    from reinforce.evaluation.ranking import find_others, shared_neighbours

    accelerator, most = accelerator.of_float64("nearest neighbours"), max(counts)
    found, wanted = (find_others(rows, index, most, accelerator) for rows in (queries, index))
    return {f"k{count}/recall": shared_neighbours(found[:, :count], wanted[:, :count]) for count in counts}


def _too_few(images: int, config: IndexSet) -> str:
    return (
        f"k of {max(config.k)} neighbours needs {max(config.k) + 1} images, and {images:,} are usable: set `k` to "
        "smaller numbers, or add images."
    )


def _open(config: IndexSet, name: str, limits: Limits, images_from: Sequence[str] = ()) -> ImageSet:
    """A set of the user, which is checked. Raises UserError."""
    spec = input_of(limits, images_from, ["txt"], config)

    def examples() -> Iterator[LabelledImage | Refusal]:
        for item in itertools.islice(read_samples(config.images, spec, name), config.limit):
            if isinstance(item, Refusal):
                yield item
            else:
                yield LabelledImage(item.key, functools.partial(bytes, item.image), item.key)

    index = _Index(config, name)
    count = sum(isinstance(item, LabelledImage) for item in examples())
    if count <= max(config.k):
        raise UserError(f"{name}: {_too_few(count, config)}")
    return ImageSet(name, examples, functools.partial(_score, config, index), count)


KIND = SetKind("index", None, section="index", open_own=_open)
