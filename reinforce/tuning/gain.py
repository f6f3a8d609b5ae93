"""What models answer for the held-out images, and what an adaptation gains on them.

Answers are classes, captions of images and images of captions. The gain is estimated by shares of the weights that are
chosen on other held-out images.
"""

from __future__ import annotations

import io
import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from reinforce.evaluation.classes import load_templates
from reinforce.evaluation.config import Evaluation
from reinforce.evaluation.encoding import EvaluatedModels
from reinforce.evaluation.kinds.base import ZeroShotSet
from reinforce.evaluation.ranking import rank_classes, rank_matches
from reinforce.evaluation.reading import ImageBatches, LabelledImage
from reinforce.images.policy import decode
from reinforce.reports import picture_address
from reinforce.source.samples import Refusal, T
from reinforce.tuning.adapt_config import DOMAIN, PER_CLASS, Point, Rule, mean

CLASSES, CAPTIONS = f"zero_shot/{DOMAIN}", f"retrieval/{DOMAIN}"
_SIMILARITIES = 2**24  # computed at once, 8 bytes each
_SIDE = 200  # pixels of the longer side of a picture
_FOLDS = 5
_EXACT, _DRAWN, _AT_ONCE = 16, 2**16, 2**10  # changes whose signs are all tried; signs that are drawn for more
_NORMAL = 1.96  # standard errors of an interval of 95 %
_MOST, _TIMES = 0.5, 1.5

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Queries:
    """Queries of a model, images or captions, and which of them it answers right.

    Attributes:
        rows: number of the held-out image of each query; of a caption of several images, the first.
        right: whether each is answered right, as the metric at rank 1 counts it.
        classes: the true class of each; 0 for captions.
        found: the class that the model answers, -1 for none; empty for captions.
    """

    rows: Sequence[int]
    right: Sequence[int]
    classes: Sequence[int]
    found: Sequence[int] = ()


@dataclass(frozen=True)
class Answer:
    """What a model takes an image for: a class or a caption, and whether it is one of the image.

    ``number`` is that of the image in its set, ``truth`` its class or its first caption.
    """

    number: int
    key: str
    truth: str
    text: str
    right: bool


@dataclass(frozen=True)
class AnsweredImage:
    """An image that one of two models gets right, as both answer; ``picture`` is the address of a small WebP of it."""

    before: Answer
    after: Answer
    picture: str


class HeldOutSet:
    """A set of an evaluation, by its name in ``own_sets``, whose images keep their numbers."""

    def __init__(self, evaluation: Evaluation, name: str) -> None:
        self._kind, self._config = evaluation.own_sets[name]
        assert self._kind.open_own is not None
        self._set = self._kind.open_own(self._config, name, evaluation.limits, evaluation.images_from or ())
        self._limits, self._name = evaluation.limits, name

    def answers(self, models: EvaluatedModels) -> list[Answer]:
        """What a model takes the images for; ``models`` has one model."""
        vectors, targets = models.encode_all(ImageBatches(self._numbered, self._set.count, self._limits))
        if not targets:
            return []
        [model] = models.encoders
        if isinstance(self._config, ZeroShotSet):
            texts = [*(self._config.classes or ())]
            templates = load_templates(self._config.templates, self._name)
            candidates = models.classifiers(texts, templates)[model].cpu()
            right = [{int(target)} for _, _, target in targets]
        else:
            texts = [*dict.fromkeys(text for _, _, captions in targets for text in captions)]
            place = {text: number for number, text in enumerate(texts)}
            candidates = models.encode_texts(texts)[model]
            right = [{place[text] for text in captions} for _, _, captions in targets]
        # the most similar of the candidates for each image, by blocks
        columns, best = candidates.double().T, list[int]()
        for block in vectors[model].split(max(1, _SIMILARITIES // len(candidates))):
            best += (block.double() @ columns).argmax(1).tolist()
        found = zip(targets, right, best, strict=True)
        return [Answer(n, key, texts[min(own)], texts[one], one in own) for (n, key, _), own, one in found]

    def queries(self, models: EvaluatedModels) -> dict[str, Any]:
        """``Queries`` as JSON, by the name of their metrics without its last part; ``models`` has one model."""
        vectors, targets = models.encode_all(ImageBatches(self._numbered, self._set.count, self._limits))
        if not targets:
            return {}
        [model], rows = models.encoders, [number for number, _, _ in targets]
        if isinstance(self._config, ZeroShotSet):
            templates = load_templates(self._config.templates, self._name)
            candidates = models.classifiers([*(self._config.classes or ())], templates)[model].cpu()
            labels = torch.tensor([int(target) for _, _, target in targets])
            ranked = rank_classes(vectors[model], candidates, labels)
            right = (ranked.ranks == 0).int().tolist()
            return {self._name: asdict(Queries(rows, right, labels.tolist(), ranked.predicted.tolist()))}
        places: dict[str, int] = {}
        pairs = [
            (image, places.setdefault(text, len(places)))
            for image, (_, _, captions) in enumerate(targets)
            for text in captions
        ]
        texts = models.encode_texts([*places])[model]
        images, captions = np.array(pairs, np.int64).T
        order = np.argsort(captions, kind="stable")
        ranks = {
            "image_to_text": rank_matches(vectors[model], texts, (images, captions), models.accelerator),
            "text_to_image": rank_matches(texts, vectors[model], (captions[order], images[order]), models.accelerator),
        }
        first = images[order][np.unique(captions[order], return_index=True)[1]]
        owners = {"image_to_text": rows, "text_to_image": [rows[image] for image in first]}
        return {
            f"{self._name}/{way}": asdict(Queries(owners[way], (of == 0).astype(int).tolist(), [0] * len(of)))
            for way, of in ranks.items()
        }

    def examples(
        self, before: Sequence[Answer], after: Sequence[Answer], most: int
    ) -> tuple[list[AnsweredImage], list[AnsweredImage]]:
        """Up to ``most`` images that are gained, and that are lost, from one model to another, spread over the set."""
        pairs = [*zip(before, after, strict=True)]
        gained = _spread([pair for pair in pairs if pair[1].right and not pair[0].right], most)
        lost = _spread([pair for pair in pairs if pair[0].right and not pair[1].right], most)
        wanted, pictures = {one.number for one, _ in (*gained, *lost)}, {}
        for item in self._numbered():
            if isinstance(item, LabelledImage) and item.target[0] in wanted:
                picture, buffer = decode(item.load(), self._limits), io.BytesIO()
                picture.thumbnail((_SIDE, _SIDE))
                picture.save(buffer, "WEBP", quality=75)
                pictures[item.target[0]] = picture_address(buffer.getvalue())
        found = ([AnsweredImage(*pair, pictures[pair[0].number]) for pair in of] for of in (gained, lost))
        return next(found), next(found)

    def _numbered(self) -> Iterator[LabelledImage | Refusal]:
        for number, item in enumerate(self._set.examples()):
            yield item if isinstance(item, Refusal) else replace(item, target=(number, item.key, item.target))


def _spread(items: Sequence[T], most: int) -> list[T]:
    """At most so many items, at equal distances."""
    step = max(1.0, len(items) / most)
    return [items[int(number * step)] for number in range(min(most, len(items)))]


#: Queries by share of the weights, and by name of their metrics without its last part.
Answers = Mapping[float, Mapping[str, Queries]]


@dataclass(frozen=True)
class Counted:
    """The queries of a metric that are answered right before and after; ``gained`` and ``lost`` are those between."""

    metric: str
    queries: int
    before: int
    after: int
    gained: int
    lost: int

    def line(self) -> str:
        changed = f"{self.gained:,} gained, {self.lost:,} lost"
        return f"{self.metric}: {self.before:,} -> {self.after:,} of {self.queries:,} right ({changed})"


@dataclass(frozen=True)
class Gain:
    """The mean of the domain metrics before and after, estimated by folds: cross-fitting.

    In each fold it is that of the share chosen on the others, so no image counts that was used to choose.

    Attributes:
        before: of the released model, between 0 and 1.
        after: estimate for the chosen weights.
        low: lower end of the interval of 95 % of the gain.
        high: its upper end.
        p: the probability of such a gain or loss by chance.
        alphas: the shares that were chosen in the folds.
        counted: the queries of each metric.
    """

    before: float
    after: float
    low: float
    high: float
    p: float
    alphas: Sequence[float]
    counted: Sequence[Counted]

    @property
    def gain(self) -> float:
        return self.after - self.before

    @property
    def certainty(self) -> str:
        """The gain in points with its interval and p."""
        ends = f"{100 * self.low:+.1f} to {100 * self.high:+.1f}"
        p = "< 0.01" if self.p < 0.01 else f"= {self.p:.2f}"
        return f"{100 * self.gain:+.1f} points, 95 % interval {ends}, p {p}"

    def lines(self) -> list[str]:
        headline = f"held-out images: {100 * self.before:.1f} -> {100 * self.after:.1f} % ({self.certainty})"
        return [headline, *(f"  {one.line()}" for one in self.counted)]


def cross_fit(points: Sequence[Point], rule: Rule, answers: Answers, units: Sequence[int], seed: int) -> Gain | None:
    """The gain of the shares that a rule chooses; None if the held-out images are too few for two folds.

    ``units`` has a number for each held-out image, equal for copies, which are in one fold and count as one in the
    interval and in p.
    """
    first = answers[points[0].alpha]
    count = max(units, default=-1) + 1
    folds = np.random.default_rng(seed).permutation(count) % min(_FOLDS, max(count, 1))
    of_unit = np.array(units, np.int64)
    chosen = []
    for fold in range(min(_FOLDS, count)):
        others = [
            Point(point.alpha, {**point.metrics, **_metrics(answers[point.alpha], rule, folds[of_unit] != fold)})
            for point in points
        ]
        if not math.isfinite(mean(others[0].metrics, rule.domain)):
            return None
        chosen.append(rule.choose(others).alpha)
    if len(chosen) < 2:
        return None
    changes, counted = np.zeros(count), []
    for metric in rule.domain:
        queries, _, _ = metric.rpartition("/")
        before = first[queries]
        unit = of_unit[np.array(before.rows, np.int64)]
        by_fold = [answers[alpha][queries] for alpha in chosen]
        old = np.array(before.right, np.int64)
        new = np.array([by_fold[fold].right[place] for place, fold in enumerate(folds[unit].tolist())], np.int64)
        np.add.at(changes, unit, (new - old) * _weights(metric, before) / len(rule.domain))
        gained, lost = int((new > old).sum()), int((new < old).sum())
        counted.append(Counted(metric, len(old), int(old.sum()), int(new.sum()), gained, lost))
    start, total = mean(points[0].metrics, rule.domain), float(changes.sum())
    error = _NORMAL * math.sqrt(count / (count - 1) * float(((changes - changes.mean()) ** 2).sum()))
    return Gain(start, start + total, total - error, total + error, chance(changes), chosen, counted)


def chance(changes: Sequence[float] | Floats) -> float:
    """The probability that changes [N] add up to as much or more, up or down, if the sign of each is by chance.

    With equal changes it is the two-sided sign test. Of more than 16 changes, signs are drawn at random.
    """
    found = np.asarray(changes, np.float64)
    found = found[np.abs(found) > 1e-12]
    least = abs(found.sum()) - 1e-9
    if len(found) <= _EXACT:
        signs = np.array([*itertools.product((-1, 1), repeat=len(found))]).reshape(2 ** len(found), -1)
        return float((np.abs(signs @ found) >= least).mean())
    generator, reached = np.random.default_rng(0), 0
    for _ in range(_DRAWN // _AT_ONCE):
        signs = 2 * generator.integers(0, 2, (_AT_ONCE, len(found))) - 1
        reached += int((np.abs(signs @ found) >= least).sum())
    return (reached + 1) / (_DRAWN + 1)


def one_class(answers: Mapping[str, Queries], classes: Sequence[str]) -> Iterator[str]:
    """A warning where a model takes most held-out images for one class, and many more than are of it."""
    if (queries := answers.get(CLASSES)) is None:
        return
    [(most, times)] = Counter(queries.found).most_common(1)
    true = [*queries.classes].count(most)
    if most >= 0 and times > max(_MOST * len(queries.found), _TIMES * true):
        yield (
            f"warning: the chosen weights take {times:,} of {len(queries.found):,} held-out images for "
            f"{classes[most]}, and {true:,} are: add images of the other classes, or train with a lower rate"
        )


def _metrics(answers: Mapping[str, Queries], rule: Rule, used: npt.NDArray[np.bool_]) -> dict[str, float]:
    """The metrics of the domain on some of the held-out images; NaN where none has a query."""
    found = {}
    for metric in rule.domain:
        queries = answers[metric.rpartition("/")[0]]
        inside = used[np.array(queries.rows, np.int64)]
        right, weights = np.array(queries.right)[inside], _weights(metric, queries, inside)
        found[metric] = float(right @ weights) if len(right) else math.nan
    return found


def _weights(metric: str, queries: Queries, inside: npt.NDArray[np.bool_] | None = None) -> Floats:
    """What each query counts in a metric: equal parts, or of each class an equal part [queries]; they add up to 1."""
    classes = np.array(queries.classes, np.int64)
    if inside is not None:
        classes = classes[inside]
    if not metric.endswith(f"/{PER_CLASS}"):
        classes = np.zeros_like(classes)
    _, place, counts = np.unique(classes, return_inverse=True, return_counts=True)
    return 1 / (counts[place] * len(counts))
