"""Zero-shot classification: images with labels, by which models rank the classes.

Sets of the user have labels in any format that a run reads. Published ones are tars with ``cls`` labels, of which some
have groups in ``npy`` metadata. Means of groups follow WILDS, F1 and recall scikit-learn; a class or group without
samples does not count.
"""

from __future__ import annotations

import functools
import io
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from reinforce.errors import UserError
from reinforce.evaluation.classes import Template, load_class_names, load_templates
from reinforce.evaluation.kinds.base import (
    CLASSES,
    TEMPLATES,
    TOP,
    ImageSet,
    SetFiles,
    SetKind,
    ZeroShotSet,
    classification_metrics,
    macro_recall,
    own_metrics,
    read_labels,
)
from reinforce.evaluation.reading import ImageBatches, LabelledImage, raise_on_damage, read_label
from reinforce.evaluation.registry import SuiteSet
from reinforce.evaluation.report import Metrics, Outcome
from reinforce.source.config import Input, Limits
from reinforce.source.formats.base import Shard, read_samples
from reinforce.source.samples import RawSample, Refusal

if TYPE_CHECKING:
    from reinforce.evaluation.encoding import EvaluatedModels

_LABEL, _METADATA = "cls", "npy"

#: Makes the metrics of a model from the targets, and from int64 [N] each: the labels, the ranks of the true classes (0
#: is first), and the predicted classes (-1: none).
_MakeMetrics = Callable[[list[Any], np.ndarray, np.ndarray, np.ndarray], Metrics]


def _score(
    classes: Sequence[str],
    templates: Sequence[Template],
    make_metrics: _MakeMetrics,
    models: EvaluatedModels,
    images: ImageBatches,
) -> Outcome:
    """The metrics of models on images, whose targets are indices into ``classes``, or pairs of one and metadata."""
    from reinforce.evaluation.ranking import rank_classes

    weights = models.classifiers(classes, templates, images.digest)
    ranked: dict[str, list[np.ndarray]] = {name: [] for name in weights}
    targets: list[Any] = []
    for vectors, batch in models.encode_images(images):
        targets += batch
        true = models.accelerator.put(_labels(batch))
        for name, of_model in vectors.items():
            found = rank_classes(of_model, weights[name], true)
            ranked[name].append(np.stack([found.ranks.cpu().numpy(), found.predicted.cpu().numpy()]))
    labels, of_models = _labels(targets), ranked.items() if targets else ()
    metrics = {name: make_metrics(targets, labels, *np.concatenate(parts, axis=1)) for name, parts in of_models}
    return Outcome(metrics, len(targets) + len(images.refused), images.refused, len(classes))


def _labels(targets: Sequence[Any]) -> np.ndarray:
    return np.array([target[0] if isinstance(target, tuple) else target for target in targets], np.int64)


def _open_own(config: ZeroShotSet, name: str, limits: Limits, images_from: Sequence[str] = ()) -> ImageSet:
    """A set of the user, which is checked. Raises UserError."""
    templates = load_templates(config.templates, name)
    labelled = read_labels(config, name, limits, images_from, config.groups)
    score = functools.partial(_score, labelled.classes, templates, functools.partial(own_metrics, labelled.groups))
    return ImageSet(name, labelled.examples, score, labelled.images)


def _open(one: SuiteSet, files: SetFiles) -> ImageSet:
    """A published set. Raises UserError for classes, labels or metadata that do not fit."""
    classes = load_class_names(f"{files.folder}/{CLASSES}", one.name)
    templates = load_templates(f"{files.folder}/{TEMPLATES}", one.name)

    def examples() -> Iterator[LabelledImage | Refusal]:
        spec = Input(captions=[_LABEL, _METADATA] if one.fields else [_LABEL])
        shards = (raise_on_damage(read_samples(Shard(url), spec), url, one.name) for url in files.shards)
        for item in itertools.chain.from_iterable(shards):
            if isinstance(item, Refusal):
                yield item
            else:
                label = read_label(item.all_sidecars, _LABEL)
                if not isinstance(label, int) or not 0 <= label < len(classes):
                    raise UserError(
                        f"{one.name}: {item.key} has the label {label!r} in its .{_LABEL} member; want the index of "
                        f"one of the {len(classes)} classes in {CLASSES}."
                    )
                target = label, _read_metadata(one, item)
                yield LabelledImage(item.key, functools.partial(bytes, item.image), target)

    def metrics(targets: list[Any], labels: np.ndarray, ranks: np.ndarray, predicted: np.ndarray) -> Metrics:
        further: Metrics = {}
        if one.fields:
            metadata = np.array([values for _, values in targets], np.int64)
            top5 = one.main_metric.startswith("acc_top5")
            prefix, hits = ("acc_top5", ranks < TOP) if top5 else ("acc", ranks == 0)
            further[f"{prefix}_avg"] = float(hits.mean())
            for worst, field in one.groups.items():
                groups = metadata[:, one.fields.index(field)]
                found = {int(group): hits[groups == group] for group in np.unique(groups)}
                for group, inside in found.items():
                    further[f"{prefix}_{field}:{group}"] = float(inside.mean())
                    further[f"count_{field}:{group}"] = float(len(inside))
                further[worst] = min(float(inside.mean()) for inside in found.values())
            if one.main_metric.startswith("F1"):
                further |= {
                    "recall-macro_all": macro_recall(labels, predicted),
                    "F1-macro_all": macro_f1(labels, predicted),
                }
        return further | classification_metrics(labels, ranks, predicted, len(classes))

    return ImageSet(one.name, examples, functools.partial(_score, classes, templates, metrics))


KIND = SetKind("classification", _open, section="zero_shot", open_own=_open_own)


def macro_f1(labels: np.ndarray, predicted: np.ndarray) -> float:
    """Mean F1 of the classes that occur in ``labels``, as WILDS has it. int64 [N] each.

    A class that only occurs in ``predicted`` does not count, but its predictions miss their true classes.
    """
    scores = []
    for label in np.unique(labels):
        hits = ((predicted == label) & (labels == label)).sum()
        scores.append(2 * hits / ((predicted == label).sum() + (labels == label).sum()))
    return float(np.mean(scores))


def _read_metadata(one: SuiteSet, sample: RawSample) -> tuple[int, ...]:
    if not one.fields:
        return ()
    wanted = f"{one.name}: {sample.key}: want the whole numbers {', '.join(one.fields)} in its .{_METADATA} member"
    data = sample.all_sidecars.get(_METADATA)
    if data is None:
        raise UserError(f"{wanted}; it has none.")
    try:
        values = np.load(io.BytesIO(data), allow_pickle=False)
        fits = values.shape == (len(one.fields),) and values.dtype.kind in "iuf" and (values == np.round(values)).all()
        if not fits or not np.isfinite(values).all():
            raise ValueError(f"its shape is {values.shape}, its values are {values.tolist()!r:.100}")
    except (ValueError, OSError, EOFError, AttributeError) as error:
        raise UserError(f"{wanted}; {error}.") from error
    return tuple(int(value) for value in values)
