"""Sets of two parts, with which image features are measured without texts: classifiers learn from one of them.

With k nearest neighbours, each test image gets the class of the most similar training images, as in DINO's evaluation.
A linear probe is softmax regression from the features of the training images to their classes.
"""

from __future__ import annotations

import functools
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

import numpy as np
from pydantic import Field, model_validator

from reinforce.errors import UserError
from reinforce.evaluation.kinds.base import ImageSet, LabelledSource, OwnSet, SetKind, own_metrics, read_labels
from reinforce.evaluation.reading import ImageBatches, LabelledImage
from reinforce.evaluation.report import Metrics, Outcome
from reinforce.source.config import Limits
from reinforce.source.samples import Refusal
from reinforce.terminal import plural

if TYPE_CHECKING:
    import torch

    from reinforce.evaluation.encoding import EvaluatedModels
    from teachers.runtime.accelerator import Accelerator

TRAIN, TEST = "train", "test"
_TEMPERATURE = 0.07  # of the votes, as in DINO, so that scores compare
_LINEAR_SCORES = ("top1", "top5", "mean_per_class")


class ProbeSet(OwnSet):
    """A set of two parts, whose classes are joined by name. Needs no texts.

    Each number K of ``k`` gives the metric ``kK/top1``: the K nearest training images of an image vote for its class,
    each with exp(cosine / 0.07). ``l2`` gives ``linear/top1``, ``top5`` and ``mean_per_class`` of softmax regression.
    """

    train: LabelledSource = Field(description="images that the classifier learns from")
    test: LabelledSource = Field(description="images that it classifies; each class must be in `train`")
    k: list[Annotated[int, Field(ge=1)]] = Field(
        [10, 20, 100, 200], description="numbers of nearest neighbours; each gives a metric; []: no neighbours"
    )
    l2: list[Annotated[float, Field(gt=0)]] = Field(
        [1.0, 0.1, 0.01, 1e-3, 1e-4, 1e-5, 1e-6],
        description="linear probe: weights of the squared norm; of several, the best one on a held-out fifth of the "
        "training part; []: no linear probe",
    )

    @model_validator(mode="after")
    def _check_numbers(self) -> ProbeSet:
        if len({*self.k}) < len(self.k):
            raise ValueError("k: a number is there twice; remove it")
        if not self.k and not self.l2:
            raise ValueError("set numbers of `k`, or weights of `l2`, or both")
        return self

    @property
    def scores(self) -> list[str]:
        linear = [f"linear/{score}" for score in _LINEAR_SCORES] if self.l2 else []
        return [*(f"k{count}/top1" for count in self.k), *linear]

    @property
    def size(self) -> int | None:
        sizes = self.train.size, self.test.size
        return None if None in sizes else sum(filter(None, sizes))


@dataclass(frozen=True)
class PartFeatures:
    """Finite features of unit norm on the CPU, float32 [N, D] and [Q, D], with classes, int64 [N] and [Q].

    Classes of the training part are 0 to the highest without gaps, and those of the test part are among them.
    """

    train: torch.Tensor
    train_labels: np.ndarray
    test: torch.Tensor
    test_labels: np.ndarray


class _Parts:
    """The two parts, read as one set: targets are pairs of the part, 0 or 1, and the index into ``classes``."""

    def __init__(self, config: ProbeSet, name: str, limits: Limits, images_from: Sequence[str]) -> None:
        self._config = config
        sources = {TRAIN: config.train, TEST: config.test}
        self._parts = {
            part: read_labels(source, f"{name}.{part}", limits, images_from, numbers=True)
            for part, source in sources.items()
        }
        # classes by name, and by number among those of equal names: ImageNet's names have two missiles
        keys: dict[str, list[tuple[str, int]]] = {}
        for part, found in self._parts.items():
            seen: Counter[str] = Counter()
            keys[part] = []
            for text in found.classes:
                keys[part].append((text, seen[text]))
                seen[text] += 1
        index = {key: number for number, key in enumerate(dict.fromkeys([*keys[TRAIN], *keys[TEST]]))}
        self.classes = [name for name, _ in index]
        self._index = {part: [index[key] for key in of_part] for part, of_part in keys.items()}
        self._hashes = [np.zeros(part.images, np.uint64) for part in self._parts.values()]
        self.counts = [np.zeros(len(index), np.int64) for _ in self._parts]
        for found, count, place in zip(self._parts.values(), self.counts, self._index.values(), strict=True):
            count[place] = found.counts
        self.images = sum(part.images for part in self._parts.values())

    def fault(self, train: np.ndarray, test: np.ndarray) -> str | None:
        """Why parts with so many images of each class, int64 [C], cannot be used; None if they can."""
        from reinforce.evaluation.ranking import FOLD

        present = np.flatnonzero(train)
        if len(present) < 2:
            only = f"one class, {self.classes[present[0]]!r}" if len(present) else "no usable image"
            return f"the training part has {only}: give images of two classes or more."
        if len(missing := np.flatnonzero((train == 0) & (test > 0))):
            return (
                f"{len(missing):,} of {int((test > 0).sum()):,} classes of the test part have no usable image in the "
                f"training part, such as {self.classes[missing[0]]!r}: add some, or remove those of the test part."
            )
        if not test.any():
            return "the test part has no usable image: check it."
        if max(self._config.k, default=0) > (images := int(train.sum())):
            return (
                f"k of {max(self._config.k)} neighbours is above the {images:,} usable images of the training part: "
                f"set `k` to smaller numbers, such as [{min(10, images)}], or to []."
            )
        if len(self._config.l2) > 1 and train.max() < FOLD:
            return (
                f"no class of the training part has {FOLD} usable images, of which one would be held out to choose "
                "`l2`: set `l2` to one number, such as [0.01], or to []."
            )
        return None

    def examples(self) -> Iterator[LabelledImage | Refusal]:
        for number, (part, found) in enumerate(self._parts.items()):
            for row, item in enumerate(found.examples()):
                if isinstance(item, Refusal):
                    yield replace(item, key=f"{part}/{item.key}")
                else:
                    load = functools.partial(_load, item.load, self._hashes[number], row)
                    target = number, self._index[part][item.target]
                    yield LabelledImage(f"{part}/{item.key}", load, target)

    def note(self) -> str:
        """The images that both parts have, by the hashes of the files that were loaded."""
        train, test = (hashes[hashes > 0] for hashes in self._hashes)
        both = int(np.isin(test, train).sum())
        return f"{plural(both, 'test image')} of {len(test):,} also in the training part" if both else ""


def _load(load: Callable[[], bytes], hashes: np.ndarray, row: int) -> bytes:
    data = load()
    if row < len(hashes):  # else the source has grown since it was opened
        hashes[row] = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") or 1
    return data


def _open(config: ProbeSet, name: str, limits: Limits, images_from: Sequence[str] = ()) -> ImageSet:
    """A set of the user, which is checked. Raises UserError."""
    parts = _Parts(config, name, limits, images_from)
    if fault := parts.fault(*parts.counts):
        raise UserError(f"{name}: {fault}")

    def score(models: EvaluatedModels, images: ImageBatches) -> Outcome:
        vectors, targets = models.encode_all(images)
        if not targets:
            return Outcome({}, len(images.refused), images.refused)
        of_parts, labels = np.array(targets, np.int64).T
        first = int((of_parts == 0).sum())
        counts = [np.bincount(of_part, minlength=len(parts.classes)) for of_part in (labels[:first], labels[first:])]
        total = len(labels) + len(images.refused)
        outcome = Outcome({}, total, images.refused, int((counts[0] > 0).sum()), note=parts.note())
        if fault := parts.fault(*counts):
            return replace(outcome, failed=dict.fromkeys(vectors, fault))
        dense = np.cumsum(counts[0] > 0) - 1  # classes of `classes: imagenet` may have no image
        metrics: dict[str, Metrics] = {}
        for model, of_model in vectors.items():
            features = PartFeatures(of_model[:first], dense[labels[:first]], of_model[first:], dense[labels[first:]])
            finite = bool(of_model.isfinite().all())  # else `evaluate_set` reports how many are not
            metrics[model] = _classify(config, features, models.accelerator) if finite else {}
        return replace(outcome, metrics=metrics)

    return ImageSet(name, parts.examples, score, parts.images)


KIND = SetKind("probes", None, section="probes", open_own=_open)


def _classify(config: ProbeSet, features: PartFeatures, accelerator: Accelerator) -> Metrics:
    """The metrics of both classifiers on the test part, as far as the set asks for them."""
    import torch

    from reinforce.evaluation.ranking import PROBE_BLOCK, classify, fit_probe, rank_classes

    metrics: Metrics = {}
    if config.k:
        device = accelerator.of_float64("nearest neighbours")
        labels, true = (torch.from_numpy(part) for part in (features.train_labels, features.test_labels))
        found = classify(features.train, labels, features.test, config.k, _TEMPERATURE, device)
        metrics |= {f"k{count}/top1": float((predicted == true).double().mean()) for count, predicted in found.items()}
    if config.l2:
        device = accelerator.of_float64("linear probes")
        probe = fit_probe(features.train, features.train_labels, config.l2, device)
        ranked = []
        for start in range(0, len(features.test), PROBE_BLOCK):
            inputs = probe.inputs(device.put(features.test[start : start + PROBE_BLOCK]))
            labels = device.put(features.test_labels[start : start + PROBE_BLOCK])
            ranked.append(torch.stack(rank_classes(inputs, probe.weights, labels)).cpu().numpy())
        ranks, predicted = np.concatenate(ranked, axis=1)
        linear = own_metrics(None, None, features.test_labels, ranks, predicted)
        metrics |= {f"linear/{score}": linear[score] for score in _LINEAR_SCORES}
    return metrics
