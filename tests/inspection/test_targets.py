"""Entropy and agreement of targets, compared with their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from reinforce.dataset.vectors import normalized
from reinforce.inspection.targets import BATCH, SCALES, Targets


def unit(*shape: int, seed: int) -> np.ndarray:
    return normalized(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def definition(images: np.ndarray, texts: np.ndarray, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    logits = scale * torch.from_numpy(images.astype(np.float64) @ texts.astype(np.float64).T)
    return torch.softmax(logits, 1), torch.softmax(logits.T, 1)


def entropy(targets: torch.Tensor) -> torch.Tensor:
    return torch.distributions.Categorical(targets).entropy()


def test_entropy_and_agreement_are_those_of_the_definition() -> None:
    rows = {"a": (unit(40, 8, seed=0), unit(40, 8, seed=1)), "b": (unit(40, 6, seed=2), unit(40, 6, seed=3))}
    scales = {"a": 10.0, "b": 30.0}
    targets = Targets(scales)
    for part in (slice(0, 25), slice(25, 40)):
        targets.add({name: (images[part], texts[part]) for name, (images, texts) in rows.items()})
    targets.finish()
    place = SCALES.index(10)
    expected = torch.stack([entropy(p).mean() for p in definition(*rows["a"], 10)]).mean() / np.log(40)
    assert targets.entropy("a")[place] == pytest.approx(float(expected), abs=1e-4)
    both = [definition(*rows[name], scale) for name, scale in scales.items()]
    divergences = [entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2 for p, q in zip(both[0], both[1], strict=True)]
    agreement = 1 - torch.stack(divergences).mean(0) / np.log(2)
    np.testing.assert_allclose(targets.agreements(), agreement.numpy(), atol=1e-4)


def test_equal_teachers_agree_fully_and_null_rows_and_teachers_without_a_scale_not_at_all() -> None:
    images, texts = unit(3 * BATCH + 5, 4, seed=0), unit(3 * BATCH + 5, 4, seed=1)
    images[7], texts[700] = np.nan, np.nan
    targets = Targets({"a": 20.0, "b": 20.0})
    targets.add({"a": (images, texts), "b": (images, texts)})
    targets.finish()
    agreement = targets.agreements()
    assert len(agreement) == len(images)
    assert np.flatnonzero(np.isnan(agreement)).tolist() == [7, 700]
    np.testing.assert_allclose(agreement[~np.isnan(agreement)], 1, atol=1e-5)
    rows = {name: (unit(30, 4, seed=n), unit(30, 4, seed=n + 5)) for n, name in enumerate("ab")}
    targets = Targets({"a": 20.0, "b": None})
    targets.add(rows)
    targets.finish()
    assert np.isnan(targets.agreements()).all()
    assert len(targets.entropy("b")) == len(SCALES)
    assert targets.entropy("b") == sorted(targets.entropy("b"), reverse=True)
