"""Zero-shot classification on tars with ``cls`` labels, and accuracy by groups of their ``npy`` metadata."""

from __future__ import annotations

import functools
import io
from collections.abc import Iterator

import numpy as np

from reinforce.errors import UserError
from reinforce.evaluation.classes import load_class_names, load_templates
from reinforce.evaluation.fields import read_label
from reinforce.evaluation.ranking import rank_classes
from reinforce.evaluation.reading import Example
from reinforce.evaluation.registry import SuiteSet
from reinforce.evaluation.suite.files import CLASSES, TEMPLATES, SetFiles, read_tars
from reinforce.evaluation.suite.metrics import (
    TOP,
    classification_metrics,
    group_accuracies,
    macro_f1,
    macro_recall,
)
from reinforce.evaluation.suite.models import Models, Outcome
from reinforce.source.samples import RawSample, Refusal

_LABEL, _METADATA = "cls", "npy"


def classify(one: SuiteSet, files: SetFiles, models: Models) -> Outcome:
    """Evaluate models on a classification set. Raises UserError for classes, labels or metadata that do not fit."""
    classes = load_class_names(f"{files.folder}/{CLASSES}", one.name)
    weights = models.classifiers(classes, load_templates(f"{files.folder}/{TEMPLATES}", one.name))
    refused: list[Refusal] = []
    targets: list[tuple[int, tuple[int, ...]]] = []
    ranks: dict[str, list[np.ndarray]] = {name: [] for name in weights}
    predicted: dict[str, list[np.ndarray]] = {name: [] for name in weights}
    for vectors, batch in models.encode_images(_examples(one, files, len(classes)), refused):
        targets += batch
        labels = models.accelerator.put(np.array([label for label, _ in batch], np.int64))
        for name, images in vectors.items():
            ranking = rank_classes(images, weights[name], labels)
            ranks[name].append(ranking.ranks.cpu().numpy())
            predicted[name].append(ranking.predicted.cpu().numpy())
    metrics = {}
    if targets:
        metadata = np.array([values for _, values in targets], np.int64).reshape(len(targets), len(one.fields))
        labels_of = np.array([label for label, _ in targets], np.int64)
        metrics = {
            name: _metrics(one, labels_of, np.concatenate(ranks[name]), np.concatenate(predicted[name]), metadata)
            | classification_metrics(
                labels_of, np.concatenate(ranks[name]), np.concatenate(predicted[name]), len(classes)
            )
            for name in weights
        }
    return Outcome(metrics, len(targets) + len(refused), refused, len(classes))


def _metrics(
    one: SuiteSet, labels: np.ndarray, ranks: np.ndarray, predicted: np.ndarray, metadata: np.ndarray
) -> dict[str, float | None]:
    """Further metrics of a set with metadata: int64 [N] each, ``metadata`` int64 [N, fields]."""
    if not one.fields:
        return {}
    prefix, hits = ("acc_top5", ranks < TOP) if one.main_metric.startswith("acc_top5") else ("acc", ranks == 0)
    metrics: dict[str, float | None] = {f"{prefix}_avg": float(hits.mean())}
    for worst, field in one.groups.items():
        found = group_accuracies(hits, metadata[:, one.fields.index(field)])
        for group, (accuracy, count) in found.items():
            metrics |= {f"{prefix}_{field}:{group}": accuracy, f"count_{field}:{group}": float(count)}
        metrics[worst] = min(accuracy for accuracy, _ in found.values())
    if one.main_metric.startswith("F1"):
        metrics |= {"recall-macro_all": macro_recall(labels, predicted), "F1-macro_all": macro_f1(labels, predicted)}
    return metrics


def _examples(one: SuiteSet, files: SetFiles, classes: int) -> Iterator[Example | Refusal]:
    fields = [_LABEL, _METADATA] if one.fields else [_LABEL]
    for item in read_tars(one, files, fields):
        if isinstance(item, Refusal):
            yield item
        else:
            target = _read_class(one, item, classes), _read_metadata(one, item)
            yield Example(item.key, functools.partial(bytes, item.image), target)


def _read_class(one: SuiteSet, sample: RawSample, classes: int) -> int:
    label = read_label(sample.all_sidecars, _LABEL)
    if not isinstance(label, int):
        raise UserError(
            f"{one.name}: {sample.key} has the label {label!r}; want a class index in its .{_LABEL} member."
        )
    if not 0 <= label < classes:
        raise UserError(f"{one.name}: {sample.key} has the label {label}, but {CLASSES} has {classes} classes.")
    return label


def _read_metadata(one: SuiteSet, sample: RawSample) -> tuple[int, ...]:
    if not one.fields:
        return ()
    wanted = f"{one.name}: {sample.key}: want the whole numbers {', '.join(one.fields)} in its .{_METADATA} member"
    data = sample.all_sidecars.get(_METADATA)
    if data is None:
        raise UserError(f"{wanted}; it has none.")
    try:
        values = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"{wanted}; it cannot be read: {error}.") from error
    if not isinstance(values, np.ndarray) or values.shape != (len(one.fields),) or values.dtype.kind not in "iuf":
        shape = getattr(values, "shape", None)
        raise UserError(f"{wanted}; its shape is {shape}, its type {getattr(values, 'dtype', type(values).__name__)}.")
    if not (np.isfinite(values).all() and (values == np.round(values)).all()):
        raise UserError(f"{wanted}; it has {values.tolist()}.")
    return tuple(int(value) for value in values)
