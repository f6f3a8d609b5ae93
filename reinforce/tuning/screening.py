"""What stored embeddings alone say of logit scales: no training, no images, a few seeded batches.

Of a batch of B pairs, teacher t at scale s has P = softmax(s I_t X_t^T) for images and the same for texts. Means over
rows, both directions, kinds of text and batches are taken of

- ``entropy``: that of P / log B; 1 says nothing, 0 knows no second choice. Also apart, by direction;
- ``true_pair``: the probability that P gives the true pair;
- ``calibration``: -log of that, the cross-entropy with the true pairs; the scale where it is lowest is the most likely
  one (temperature scaling, arXiv 1706.04599), given as ``calibrated``;
- ``agreement``: 1 - the Jensen-Shannon divergence of the teachers' P / log T, the others at the scales in force; with
  one teacher there is none.

``top1`` is how often the true pair is the first choice, which no scale changes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from reinforce.student.config import StudentConfig
from reinforce.student.data.stream import Lane, orders_of
from reinforce.student.data.survey import survey
from reinforce.student.distillation import IMAGE

MEASURES = ("entropy", "true_pair", "calibration", "agreement")
_LARGEST = 4096
_READERS = 2
_LOWEST, _HIGHEST = 1.0, 1000.0  # among which the most likely scale is looked for

#: Cosines [B, B] of images with texts, by teacher and kind of text.
Cosines = Mapping[str, Mapping[str, torch.Tensor]]


@dataclass(frozen=True)
class Measured:
    """The measures of one teacher at one scale."""

    scale: float
    entropy: float
    entropy_of_images: float
    entropy_of_texts: float
    true_pair: float
    calibration: float
    agreement: float | None


@dataclass(frozen=True)
class Screened:
    """One teacher's measures at every scale, and what does not depend on one."""

    scales: Sequence[Measured]
    calibrated: float
    top1: float

    def curve(self, measure: str) -> list[float | None]:
        return [getattr(at, measure) for at in self.scales]

    def json(self) -> dict[str, Any]:
        return asdict(self)


def screen(
    config: StudentConfig,
    teachers: Sequence[str],
    scales: Mapping[str, Sequence[float]],
    in_force: Mapping[str, float],
    batches: int,
    size: int | None,
) -> dict[str, Screened]:
    """Measure ``scales`` (by teacher) on the first batches of a student's training.

    ``teachers`` are all of the ensemble, each with images and texts; ``in_force`` their scales. Raises UserError as
    reading does.
    """
    found = list(_batches(config, teachers, batches, size or min(config.train.batch, _LARGEST)))
    return {name: _screened(name, values, found, in_force) for name, values in scales.items()}


def _batches(config: StudentConfig, teachers: Sequence[str], count: int, size: int) -> Iterator[Cosines]:
    """The cosines of ``count`` batches, in the order in which one stream of the training would read."""
    corpora = survey(config.data, config.seed, teachers)
    targets = corpora[0].targets
    ends = np.cumsum([dim for _, dim in targets])[:-1]
    orders = orders_of(corpora, config.seed, 1, config.data.window)
    pool = ThreadPoolExecutor(_READERS, "screening")
    try:
        lane = Lane(corpora, orders, config.seed, 0, 0, pool)
        for _ in range(count):
            vectors = np.split(np.stack([next(lane).vectors for _ in range(size)]), ends, axis=1)
            by_target = {target: torch.from_numpy(v) for (target, _), v in zip(targets, vectors, strict=True)}
            kinds = dict.fromkeys(what for _, what in by_target if what != IMAGE)
            yield {
                name: {kind: by_target[name, IMAGE] @ by_target[name, kind].T for kind in kinds} for name in teachers
            }
    finally:
        pool.shutdown(cancel_futures=True)


def _screened(
    teacher: str, scales: Sequence[float], batches: Sequence[Cosines], in_force: Mapping[str, float]
) -> Screened:
    own = [cosines for batch in batches for cosines in batch[teacher].values()]
    others = [
        [batch[name][kind] * in_force[name] for name in batch if name != teacher]
        for batch in batches
        for kind in batch[teacher]
    ]
    measured = []
    for scale in scales:
        rows = [_measures(scale * cosines, beside) for cosines, beside in zip(own, others, strict=True)]
        means = {key: _mean([row[key] for row in rows]) for key in rows[0]}
        measured.append(Measured(scale=scale, **means))  # type: ignore[arg-type]
    hits = [
        (values.argmax(dim=1) == torch.arange(len(values))).float().mean().item()
        for cosines in own
        for values in (cosines, cosines.T)
    ]
    return Screened(measured, _most_likely(own), float(np.mean(hits)))


def _measures(logits: torch.Tensor, others: Sequence[torch.Tensor]) -> dict[str, float | None]:
    entropies, true, likelihood, agreements = [], [], [], []
    for direction in (0, 1):
        logs = (logits.T if direction else logits).log_softmax(dim=1)
        probabilities = logs.exp()
        entropies.append(_entropy(probabilities).mean().item() / math.log(len(logs)))
        true.append(probabilities.diagonal().mean().item())
        likelihood.append(-logs.diagonal().mean().item())
        if others:
            all_of = [probabilities, *((o.T if direction else o).softmax(dim=1) for o in others)]
            middle = torch.stack(all_of).mean(dim=0)
            divergence = _entropy(middle) - torch.stack([_entropy(p) for p in all_of]).mean(dim=0)
            agreements.append(1 - divergence.mean().item() / math.log(len(all_of)))
    return {
        "entropy": float(np.mean(entropies)),
        "entropy_of_images": entropies[0],
        "entropy_of_texts": entropies[1],
        "true_pair": float(np.mean(true)),
        "calibration": float(np.mean(likelihood)),
        "agreement": float(np.mean(agreements)) if agreements else None,
    }


def _entropy(probabilities: torch.Tensor) -> torch.Tensor:
    """[B, B] -> [B], in nats."""
    return torch.special.entr(probabilities).sum(dim=1)


def _most_likely(cosines: Sequence[torch.Tensor]) -> float:
    """The scale with the lowest cross-entropy with the true pairs, which is convex in it: by golden sections."""

    def loss(log_scale: float) -> float:
        total = 0.0
        for values in cosines:
            logits = math.exp(log_scale) * values
            for of_rows in (logits, logits.T):
                total += (of_rows.logsumexp(dim=1) - of_rows.diagonal()).mean().item()
        return total

    low, high, part = math.log(_LOWEST), math.log(_HIGHEST), (math.sqrt(5) - 1) / 2
    left, right = high - part * (high - low), low + part * (high - low)
    of_left, of_right = loss(left), loss(right)
    while high - low > 0.005:
        if of_left < of_right:
            high, right, of_right = right, left, of_left
            left = high - part * (high - low)
            of_left = loss(left)
        else:
            low, left, of_left = left, right, of_right
            right = low + part * (high - low)
            of_right = loss(right)
    return float(f"{math.exp((low + high) / 2):.3g}")


def _mean(values: Sequence[float | None]) -> float | None:
    numbers = [value for value in values if value is not None]
    return float(np.mean(numbers)) if numbers else None
