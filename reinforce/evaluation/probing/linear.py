"""A linear probe: softmax regression on standardised features, by full-batch L-BFGS in float64.

It minimises the mean cross-entropy plus ``l2 / 2`` times the squared norm of the weights, without the bias: of N
images, scikit-learn's LogisticRegression with C = 1 / (l2 N) behind a StandardScaler. Each pass reads the features in
blocks, so that memory on the device does not depend on N. Nothing is random.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from teachers.runtime.accelerator import Accelerator

#: Images of one block; a block takes 16 bytes per image and class.
BLOCK = 4096
#: Every fifth image of a class is held out to choose ``l2``.
FOLD = 5
_ITERATIONS = 300
_GRADIENT = 1e-6  # largest absolute entry at which a fit ends
_CONSTANT = 1e-7  # standard deviation of a feature of unit-norm vectors that differs by rounding alone


@dataclass(frozen=True)
class Probe:
    """``weights`` float64 [C, D + 1] of standardised features and a one, on the device, and the chosen ``l2``."""

    mean: torch.Tensor
    scale: torch.Tensor
    weights: torch.Tensor
    l2: float

    def inputs(self, features: torch.Tensor) -> torch.Tensor:
        """Features [B, D] on the device -> float64 [B, D + 1], of which products with ``weights`` are the logits."""
        return _standardise(features, self.mean, self.scale)


def fit_probe(features: torch.Tensor, labels: np.ndarray, l2: Sequence[float], accelerator: Accelerator) -> Probe:
    """Fit a probe to finite features, float32 [N, D] on the CPU, with classes int64 [N], all of 0 to the highest.

    Of several ``l2``, the one with the most hits among the images of ``hold_out`` is chosen, of equal ones the largest;
    then all images are fitted.
    """
    data = _Data(features, torch.from_numpy(labels), *_moments(features, accelerator), accelerator)
    weights = torch.zeros(int(labels.max()) + 1, features.shape[1] + 1, dtype=torch.float64, device=data.mean.device)
    chosen = l2[0]
    if len(l2) > 1:
        held = hold_out(labels)
        inside, outside = np.flatnonzero(~held), np.flatnonzero(held)
        most, best = -1, weights
        for value in sorted(l2, reverse=True):
            weights = _fit(data, inside, weights, value)  # from the last one's weights, which are near
            if (hits := data.hits(outside, weights)) > most:
                most, best, chosen = hits, weights, value
        weights = best
    return Probe(data.mean, data.scale, _fit(data, np.arange(len(labels)), weights, chosen), chosen)


def hold_out(labels: np.ndarray) -> np.ndarray:
    """Every fifth image of each class, in their order -> bool [N]; none of a class with fewer than five."""
    held = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        held[np.flatnonzero(labels == label)[FOLD - 1 :: FOLD]] = True
    return held


@dataclass(frozen=True)
class _Data:
    features: torch.Tensor
    labels: torch.Tensor
    mean: torch.Tensor
    scale: torch.Tensor
    accelerator: Accelerator

    def blocks(self, rows: np.ndarray) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Standardised features float64 [B, D + 1] and classes [B] of some rows, on the device."""
        for start in range(0, len(rows), BLOCK):
            part = torch.from_numpy(rows[start : start + BLOCK])
            x = _standardise(self.accelerator.put(self.features[part]), self.mean, self.scale)
            yield x, self.accelerator.put(self.labels[part])

    def hits(self, rows: np.ndarray, weights: torch.Tensor) -> int:
        """Number of rows whose class has the highest logit."""
        return sum(int(((x @ weights.T).argmax(1) == classes).sum()) for x, classes in self.blocks(rows))


def _fit(data: _Data, rows: np.ndarray, start: torch.Tensor, l2: float) -> torch.Tensor:
    weights = start.clone()
    optimizer = torch.optim.LBFGS(
        [weights], max_iter=_ITERATIONS, tolerance_grad=_GRADIENT, tolerance_change=0, history_size=10,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> torch.Tensor:
        with torch.no_grad():
            loss, weights.grad = _loss(data, rows, weights, l2)
            return loss

    optimizer.step(closure)
    return weights


def _loss(data: _Data, rows: np.ndarray, weights: torch.Tensor, l2: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The objective of weights [C, D + 1], and its gradient."""
    loss, gradient = weights.new_zeros(()), torch.zeros_like(weights)
    for x, classes in data.blocks(rows):
        log_p = torch.log_softmax(x @ weights.T, 1)
        loss -= log_p.gather(1, classes[:, None]).sum()
        p = log_p.exp_()
        p.scatter_add_(1, classes[:, None], -p.new_ones(len(p), 1))
        gradient += p.T @ x
    free = torch.cat([weights[:, :-1], weights.new_zeros(len(weights), 1)], 1)  # without the bias
    return loss / len(rows) + l2 / 2 * free.square().sum(), gradient / len(rows) + l2 * free


def _moments(features: torch.Tensor, accelerator: Accelerator) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of each feature, float64 [D] on the device; 1 for a feature that is constant."""
    parts = [features[start : start + BLOCK] for start in range(0, len(features), BLOCK)]
    sums = [accelerator.put(part).double().sum(0) for part in parts]
    mean = torch.stack(sums).sum(0) / len(features)
    squares = [(accelerator.put(part).double() - mean).square().sum(0) for part in parts]
    deviation = (torch.stack(squares).sum(0) / len(features)).sqrt()
    return mean, torch.where(deviation > _CONSTANT, deviation, 1.0)


def _standardise(features: torch.Tensor, mean: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    x = (features.double() - mean) / scale
    return torch.cat([x, x.new_ones(len(x), 1)], 1)
