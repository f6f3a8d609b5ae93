"""Measures of logit scales and of subsets of teachers, from stored embeddings of a few seeded batches alone.

For a batch of B pairs, teacher t at scale s gives P = softmax(s I_t X_t^T) for images, and the transpose for texts.
Each measure is the mean over rows, both directions, kinds of text and batches:

- ``entropy``: entropy of P / log B, from 0 (one-hot) to 1 (uniform); also by direction;
- ``true_pair``: probability of the true pair under P;
- ``calibration``: cross-entropy of P with the true pairs; the scale that minimizes it is ``calibrated``, the most
  likely one (temperature scaling, arXiv 1706.04599);
- ``agreement``: 1 - the Jensen-Shannon divergence of the T teachers' P / log T, with the other teachers at their
  current scales; None for a single teacher.

``top1`` is how often the true pair has the highest probability; it does not depend on the scale.

A subset of the teachers predicts the mean of their P, which is the target of a student of them. Each teacher is at its
most likely scale, or at its current one where the search has found none. Likelihood and entropy are in nats.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from reinforce.dataset import vectors
from reinforce.student.config import StudentConfig
from reinforce.student.data.datasets import open_datasets
from reinforce.student.data.stream import StreamReader, make_orders
from reinforce.student.teachers import IMAGE

MEASURES = ("entropy", "true_pair", "calibration", "agreement")
#: Key of the subsets in screening.json, whose other keys are names of teachers; these do not begin with "_".
SUBSETS = "_subsets"
#: Of more teachers, only each alone, all but one and all together are measured: 2 N + 1 subsets instead of 2^N - 1.
MOST_TEACHERS = 5
_MAX_BATCH = 4096
_READERS = 2
_LOWEST, _HIGHEST = 1.0, 1000.0  # search range of the most likely scale
_AT_BOUND = 1.01  # ratio to a bound that counts as the bound, since the search stops within 0.005 of it in log scale

#: Cosine similarities [B, B] of images with texts, by teacher and kind of text.
Cosines = Mapping[str, Mapping[str, torch.Tensor]]


@dataclass(frozen=True)
class ScaleMeasures:
    """The measures of one teacher at one scale. The field names are keys of screening.json."""

    scale: float
    entropy: float
    entropy_of_images: float
    entropy_of_texts: float
    true_pair: float
    calibration: float
    agreement: float | None = None


@dataclass(frozen=True)
class TeacherScreening:
    """The measures of one teacher at every scale, its most likely scale, and its top-1 accuracy.

    The field names are keys of screening.json. With a ``fault`` the scale is a bound of the search, and not found.
    """

    scales: Sequence[ScaleMeasures]
    calibrated: float
    top1: float

    def curve(self, measure: str) -> list[float | None]:
        return [getattr(measured, measure) for measured in self.scales]

    @property
    def fault(self) -> str | None:
        return search_fault(self.calibrated)

    def json(self) -> dict[str, Any]:
        return {**asdict(self), "fault": self.fault}


def search_fault(calibrated: float) -> str | None:
    """Why the search has found no most likely scale, and what to do; None unless it ended at a bound."""
    if calibrated <= _LOWEST:
        return (
            f"the search for the most likely scale ended at its lowest, {_LOWEST:g}: true pairs are hardly more alike "
            "than others. Check that the captions belong to their images, or leave the teacher out"
        )
    if calibrated >= _HIGHEST:
        return (
            f"the search for the most likely scale ended at its highest, {_HIGHEST:g}: nearly every true pair is the "
            "most similar one. Raise screening.batch or screening.batches"
        )
    return None


@dataclass(frozen=True)
class SubsetMeasures:
    """What a subset of the teachers predicts: means over the rows of the batches in both directions.

    The field names are keys of screening.json. ``likelihood`` is the log-likelihood of the true pair, ``accuracy`` the
    share of rows where it is the most likely one, and ``agreement`` the share where each teacher has the same most
    likely one; None for a single teacher. ``alone`` is the share that a single teacher gets right and no other of all
    teachers does; None for several.
    """

    teachers: Sequence[str]
    likelihood: float
    entropy: float
    agreement: float | None
    accuracy: float
    alone: float | None


@dataclass(frozen=True)
class SubsetScreening:
    """Subsets in the order of their likelihood, none of fewer than two teachers, at ``scales`` by teacher.

    The field names are keys of screening.json and of table.json. ``left_out`` has the reason for each teacher without
    similarities.
    """

    subsets: Sequence[SubsetMeasures]
    scales: Mapping[str, float]
    left_out: Mapping[str, str]


def screen(
    config: StudentConfig,
    scales: Mapping[str, Sequence[float]],
    current_scales: Mapping[str, float],
    batches: int,
    size: int | None,
) -> tuple[dict[str, TeacherScreening], SubsetScreening]:
    """Measure ``scales`` (by teacher), and subsets of all teachers, on the first batches of a student's training.

    ``current_scales`` are those of the whole ensemble: of each teacher with embeddings of images and texts. ``size`` is
    the batch size. Raises UserError if the data cannot be read.
    """
    cosines = [*_read_batches(config, [*current_scales], batches, size or min(config.train.batch, _MAX_BATCH))]
    by_teacher = {name: [of for batch in cosines for of in batch[name].values()] for name in current_scales}
    calibrated = {name: _most_likely_scale(own) for name, own in by_teacher.items()}
    found = {}
    for teacher, values in scales.items():
        own = by_teacher[teacher]
        others = [
            [batch[name][kind] * current_scales[name] for name in batch if name != teacher]
            for batch in cosines
            for kind in batch[teacher]
        ]
        measured = []
        for scale in values:
            rows = [_measure(scale * of_pairs, logits) for of_pairs, logits in zip(own, others, strict=True)]
            means = {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}
            measured.append(ScaleMeasures(scale, **means))
        hits = [
            (way.argmax(dim=1) == torch.arange(len(way))).float().mean().item()
            for of_pairs in own
            for way in (of_pairs, of_pairs.T)
        ]
        found[teacher] = TeacherScreening(measured, calibrated[teacher], float(np.mean(hits)))
    used = {name: current_scales[name] if search_fault(scale) else scale for name, scale in calibrated.items()}
    return found, SubsetScreening(measure_subsets(cosines, used), used, {})


def measure_subsets(cosines: Sequence[Cosines], scales: Mapping[str, float]) -> list[SubsetMeasures]:
    """Measure subsets of the teachers in ``scales``, those of the highest likelihood first.

    Among equal ones, to six digits, those of fewer teachers are first: a copy of a teacher is not worth its cost.
    Beside the cosines it holds the probabilities of one batch, [T, B, B]. Returns nothing for fewer than two teachers.
    """
    count = len(scales)
    if count < 2:
        return []
    sizes = range(1, count + 1) if count <= MOST_TEACHERS else (1, count - 1, count)
    subsets = [[*subset] for size in sizes for subset in itertools.combinations(range(count), size)]
    sums, alone, rows = np.zeros((len(subsets), 4)), np.zeros(count), 0
    ways = [
        [of_kind.T if turned else of_kind for of_kind in (batch[name][kind] for name in scales)]
        for batch in cosines
        for kind in next(iter(batch.values()))
        for turned in (False, True)
    ]
    for way in ways:
        logits = [scale * of_teacher for scale, of_teacher in zip(scales.values(), way, strict=True)]
        probabilities = torch.stack(logits).log_softmax(dim=2)  # their logarithms until exp_
        true = probabilities.diagonal(dim1=1, dim2=2).clone()  # [T, B]
        likely = probabilities.argmax(dim=2)  # [T, B]
        probabilities.exp_()
        targets = torch.arange(true.shape[1])
        right = likely == targets
        alone += (right & (right.sum(dim=0) == 1)).sum(dim=1).numpy()
        rows += len(targets)
        for number, members in enumerate(subsets):
            mean = sum((probabilities[i] for i in members[1:]), probabilities[members[0]]) / len(members)
            sums[number] += (
                (true[members].logsumexp(dim=0) - math.log(len(members))).sum().item(),
                torch.special.entr(mean).sum().item(),
                (likely[members] == likely[members[0]]).all(dim=0).sum().item(),
                (mean.argmax(dim=1) == targets).sum().item(),
            )
    names, found = [*scales], []
    for members, (likelihood, entropy, agreement, accuracy) in zip(subsets, (sums / rows).tolist(), strict=True):
        one = len(members) == 1
        shares = (None, accuracy, float(alone[members[0]] / rows)) if one else (agreement, accuracy, None)
        found.append(SubsetMeasures([names[i] for i in members], likelihood, entropy, *shares))
    return sorted(found, key=lambda subset: (-round(subset.likelihood, 6), len(subset.teachers)))


def screening_json(screenings: Mapping[str, TeacherScreening], subsets: SubsetScreening) -> dict[str, Any]:
    """The content of screening.json."""
    return {**{name: screening.json() for name, screening in screenings.items()}, SUBSETS: asdict(subsets)}


def _read_batches(config: StudentConfig, teachers: Sequence[str], count: int, size: int) -> Iterator[Cosines]:
    """Yield the cosines of ``count`` batches, in the order in which one stream of the training run reads them."""
    datasets = open_datasets(config.data, config.seed, {"teachers": teachers}, leave_out=True)
    names = [(target.model, target.name) for target in datasets[0].targets]
    orders = make_orders(datasets, config.seed, 1, config.data.window, size)
    pool = ThreadPoolExecutor(_READERS, "screening")
    try:
        reader = StreamReader(datasets, orders, config.seed, 0, 0, pool, size)
        for _ in range(count):
            columns = zip(*(next(reader).targets for _ in range(size)), strict=True)
            by_target = {name: torch.from_numpy(np.stack(rows)) for name, rows in zip(names, columns, strict=True)}
            kinds = dict.fromkeys(what for _, what in by_target if what != IMAGE)
            yield {
                name: {kind: by_target[name, IMAGE] @ by_target[name, kind].T for kind in kinds} for name in teachers
            }
    finally:
        pool.shutdown(cancel_futures=True)


def _measure(logits: torch.Tensor, others: Sequence[torch.Tensor]) -> dict[str, float]:
    """Measures of ``logits`` [B, B]; ``others`` are the scaled logits of the other teachers, none without agreement."""
    entropies, true, losses, agreements = [], [], [], []
    for ensemble in ((logits, *others), (logits.T, *(other.T for other in others))):
        targets = [vectors.softmax(of_teacher.numpy()) for of_teacher in ensemble]
        entropies.append(float(vectors.entropies(targets[0]).mean()) / math.log(len(logits)))
        true.append(float(targets[0].diagonal().mean()))
        losses.append(_calibration(ensemble[0]))
        if others:
            agreements.append(float(vectors.agreements(targets).mean()))
    return {
        "entropy": float(np.mean(entropies)),
        "entropy_of_images": entropies[0],
        "entropy_of_texts": entropies[1],
        "true_pair": float(np.mean(true)),
        "calibration": float(np.mean(losses)),
        **({"agreement": float(np.mean(agreements))} if agreements else {}),
    }


def _calibration(logits: torch.Tensor) -> float:
    """Cross-entropy of the softmax of rows [B, B] with the true pairs."""
    return (logits.logsumexp(dim=1) - logits.diagonal()).mean().item()


def _most_likely_scale(cosines: Sequence[torch.Tensor]) -> float:
    """Minimize the cross-entropy with the true pairs, which is convex in the scale, by golden-section search.

    Returns a bound of the search, to the digit, where it ends there.
    """

    def loss(log_scale: float) -> float:
        total = 0.0
        for values in cosines:
            logits = math.exp(log_scale) * values
            for of_rows in (logits, logits.T):
                total += _calibration(of_rows)
        return total

    low, high, ratio = math.log(_LOWEST), math.log(_HIGHEST), (math.sqrt(5) - 1) / 2
    left, right = high - ratio * (high - low), low + ratio * (high - low)
    left_loss, right_loss = loss(left), loss(right)
    while high - low > 0.005:
        if left_loss < right_loss:
            high, right, right_loss = right, left, left_loss
            left = high - ratio * (high - low)
            left_loss = loss(left)
        else:
            low, left, left_loss = left, right, right_loss
            right = low + ratio * (high - low)
            right_loss = loss(right)
    found = math.exp((low + high) / 2)
    for bound in (_LOWEST, _HIGHEST):
        if bound / _AT_BOUND <= found <= bound * _AT_BOUND:
            return bound
    return float(f"{found:.3g}")
