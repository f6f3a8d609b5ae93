"""Statistics that make teachers comparable: PHI-S, and what changes of a teacher's vectors must not change."""

from __future__ import annotations

import pytest
import torch

from reinforce.student.terms.balance import Balance, Fit, Moments, balances, equal_variances, hadamard

#: Dimensions with a Hadamard matrix by Sylvester, by Paley and by both; without one.
WIDTHS = [1, 2, 16, 12, 48, 72, 3, 7, 28, 50]


def vectors(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    """Vectors [rows, width] whose directions vary by different amounts, around a mean."""
    random = torch.Generator().manual_seed(seed)
    turned, _ = torch.linalg.qr(torch.randn(width, width, generator=random, dtype=torch.float64))
    spread = torch.logspace(0, -3, width, dtype=torch.float64)
    return torch.randn(rows, width, generator=random, dtype=torch.float64) * spread @ turned + 0.5


def moments(rows: torch.Tensor) -> Moments:
    fit = Fit(covariance=True)
    for part in rows.split(7):
        fit.add(part)
    return fit.moments()


def balanced(rows: torch.Tensor) -> torch.Tensor:
    return balances("phi-s", {"image": moments(rows)})["image"](rows)


def test_hadamard_matrices_are_of_1_and_minus_1_and_orthogonal() -> None:
    for width in (1, 2, 4, 12, 20, 48, 384, 512, 640, 768, 1024, 1152, 1280, 1408, 1536, 1664):
        found = hadamard(width)
        assert found is not None, width
        assert bool((found.abs() == 1).all())
        assert torch.equal(found @ found.T, width * torch.eye(width, dtype=torch.float64))
    assert [width for width in range(1, 30) if width > 2 and width % 4 and hadamard(width) is not None] == []


@pytest.mark.parametrize("width", WIDTHS)
def test_every_width_has_a_rotation_with_equal_variances(width: int) -> None:
    variances = torch.logspace(0, -5, width, dtype=torch.float64)
    turn = equal_variances(variances)
    torch.testing.assert_close(turn @ turn.T, torch.eye(width, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(
        (turn @ torch.diag(variances) @ turn.T).diagonal(), variances.mean().expand(width), rtol=1e-9, atol=0
    )


@pytest.mark.parametrize("width", WIDTHS[1:])
def test_all_dimensions_have_variance_1_and_distances_keep_their_proportions(width: int) -> None:
    rows = vectors(400, width)
    found = balanced(rows).double()
    deviation, mean = torch.std_mean(found, dim=0, correction=0)
    torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-4)
    torch.testing.assert_close(deviation, torch.ones_like(mean), rtol=1e-4, atol=0)
    before, after = torch.pdist(rows), torch.pdist(found)
    torch.testing.assert_close(after / before, (after / before).mean().expand(len(before)), rtol=1e-3, atol=0)


def test_scale_and_offset_change_nothing_and_a_rotation_only_rotates() -> None:
    rows = vectors(300, 12)
    found = balanced(rows)
    torch.testing.assert_close(balanced(30 * rows - 4), found, rtol=0, atol=2e-4)
    torch.testing.assert_close(
        balances("standardise", {"": moments(30 * rows - 4)})[""](30 * rows - 4),
        balances("standardise", {"": moments(rows)})[""](rows),
        rtol=0,
        atol=2e-4,
    )
    turned, _ = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(5), dtype=torch.float64))
    torch.testing.assert_close(torch.pdist(balanced(rows @ turned)), torch.pdist(found), rtol=1e-3, atol=1e-4)


def test_fewer_vectors_than_dimensions_and_a_constant_dimension_stay_finite() -> None:
    few = vectors(5, 12)
    constant = vectors(200, 12)
    constant[:, 3] = 0.25
    for rows in (few, constant):
        found = balanced(rows)
        assert bool(found.isfinite().all())
        assert found.square().mean().item() == pytest.approx(1, rel=1e-4)
        assert bool(balances("phi-s", {"image": moments(rows)})["image"](torch.ones(2, 12)).isfinite().all()), (
            "other vectors"
        )


def test_kinds_of_text_have_their_own_mean_and_scale_and_one_rotation() -> None:
    caption, other = vectors(300, 12), vectors(300, 12, seed=1)
    found: dict[str, Balance] = balances("phi-s", {"caption": moments(caption), "synthetic": moments(5 * other + 2)})
    of_caption, of_other = found["caption"], found["synthetic"]
    assert of_caption.matrix is not None
    assert of_other.matrix is not None
    ratio = of_caption.matrix / of_other.matrix
    torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio), rtol=1e-4, atol=0)
    for rows, balance in ((caption, of_caption), (5 * other + 2, of_other)):
        turned = balance(rows)
        torch.testing.assert_close(turned.mean(dim=0), torch.zeros(12), rtol=0, atol=1e-4)
        assert turned.var(dim=0, correction=0).mean().item() == pytest.approx(1, rel=1e-4)
    both = torch.stack([of_caption(caption).var(dim=0, correction=0), of_other(5 * other + 2).var(dim=0, correction=0)])
    torch.testing.assert_close(both.mean(dim=0), torch.ones(12), rtol=1e-3, atol=0)
