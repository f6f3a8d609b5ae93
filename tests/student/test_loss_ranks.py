"""Two ranks, in separate processes, have the loss and the gradients of one."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from reinforce.student import chunks
from reinforce.student.loss import Objective, contrastive_losses
from tests.helpers.ranks import results_of_ranks

RANKS, PAIRS = 2, 3  # pairs of a rank
WHATS = ("image", "caption", "synthetic")
CASES = {
    f"{form}, lambda {share}": Objective(
        share, form, {"one": 30.0, "two": 55.0}, {"two": -12.0} if form == "sigmoid" else {}
    )
    for form, share in itertools.product(("softmax", "sigmoid"), (0.0, 0.4, 1.0))
}


def unit(dim: int, seed: int) -> torch.Tensor:
    values = torch.randn(RANKS * PAIRS, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(values, dim=-1)


def computed(objective: Objective, rows: slice) -> dict[str, torch.Tensor]:
    """Loss and gradients by name for some rows of the batch."""
    features = {what: unit(6, i)[rows].clone().requires_grad_() for i, what in enumerate(WHATS)}
    targets = {
        teacher: {what: unit(dim, 10 * dim + i)[rows] for i, what in enumerate(WHATS)}
        for teacher, dim in (("one", 4), ("two", 5))
    }
    scalars = {
        "scale": torch.tensor(math.log(15.0), dtype=torch.float64, requires_grad=True),
        "bias": torch.tensor(-2.0, dtype=torch.float64, requires_grad=True),
    }
    losses = contrastive_losses(objective, features, scalars["scale"].exp(), scalars["bias"], targets)
    total = torch.stack(list(losses.values())).sum()
    total.backward()
    gradients = {name: value.grad for name, value in {**features, **scalars}.items() if value.grad is not None}
    return {"loss": total.detach(), **gradients}


def of_rank(rank: int) -> dict[str, dict[str, torch.Tensor]]:
    chunks.CHUNK = 2 * RANKS * PAIRS  # chunks of two rows
    rows = slice(rank * PAIRS, (rank + 1) * PAIRS)
    return {name: computed(objective, rows) for name, objective in CASES.items()}


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, torch.Tensor]]]:
    return results_of_ranks(of_rank, RANKS, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", CASES)
def test_the_mean_over_ranks_is_the_loss_of_the_whole_batch(
    case: str, of_ranks: list[dict[str, dict[str, torch.Tensor]]]
) -> None:
    whole = computed(CASES[case], slice(None))
    parts = [results[case] for results in of_ranks]
    assert all(part.keys() == whole.keys() for part in parts)
    for name, expected in whole.items():
        if name in WHATS:  # each rank's own rows; averaging over ranks divides their gradients
            found = torch.cat([part[name] for part in parts]) / RANKS
        else:
            found = torch.stack([part[name] for part in parts]).mean(dim=0)
        torch.testing.assert_close(found, expected, msg=lambda text, name=name: f"{name}: {text}")
