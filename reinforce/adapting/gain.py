"""What an adaptation gains on held-out images, by shares of the weights that are chosen on others of them."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from reinforce.adapting.choosing import Point, Rule, mean
from reinforce.adapting.held_out import CLASSES, Queries
from reinforce.adapting.steps import PER_CLASS

_FOLDS = 5
_EXACT, _DRAWN, _AT_ONCE = 16, 2**16, 2**10  # changes whose signs are all tried; signs that are drawn for more
_NORMAL = 1.96  # standard errors of an interval of 95 %
_MOST, _TIMES = 0.5, 1.5

#: Queries by share of the weights, and by name of their metrics without its last part.
Answers = Mapping[float, Mapping[str, Queries]]
Floats = npt.NDArray[np.float64]


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
        before = first[_queries_of(metric)]
        unit = of_unit[np.array(before.rows, np.int64)]
        by_fold = [answers[alpha][_queries_of(metric)] for alpha in chosen]
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
        queries = answers[_queries_of(metric)]
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


def _queries_of(metric: str) -> str:
    return metric.rpartition("/")[0]
