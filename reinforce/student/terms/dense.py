"""The dense term: linear heads on the student's spatial map learn the grids of patch vectors of teachers.

    L = weight * mean over teachers, rows and patches of (c * (1 - cos(f, v)) + (1 - c) * mean_d s(f_d - v_d)),
    f = bilinear(head(map)) at the teacher's grid,   s(x) = x^2 / 2 if |x| < 1, else |x| - 1/2

where v is standardised by channel: stored grids are, and with online teachers the term standardises them by the
same statistics. With ``balance: phi-s``, v is the teacher's own vector, balanced as in ``balance``; of a stored one,
the same product takes the standardisation back. 0.9 and 0.1 are the defaults, the weights of Theia (arXiv 2407.20179),
which takes one cosine of the whole grid. The head comes first: it commutes with the interpolation, and the student's
grid is mostly smaller.

The rows are computed in chunks, whose intermediate results are computed again in the backward pass. A batch of 256 maps
of 14 x 14 x 768 with grids of 14 x 14 x 1024 takes 0.4 GB beside both, the gradient of the map among it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch.utils.checkpoint import checkpoint

from reinforce.errors import UserError
from reinforce.student.config import DenseLoss, Loss
from reinforce.student.terms.balance import Balance, Moments, balances
from reinforce.student.terms.base import MAP, TargetModels, Tensors, Term, head_name

#: Name of the targets, under which they are asked for.
PATCHES = "patches"
#: Numbers of a chunk's grids (32 MiB in float32).
CHUNK = 1 << 23
#: Names of the heads that balance targets.
_BALANCE = {"standardise": f"standardise-{PATCHES}", "phi-s": f"balance-{PATCHES}"}


@dataclass(frozen=True)
class Dense(Term):
    """``dense/TEACHER`` for each teacher; ``grids`` have (rows, columns, D).

    ``moments`` are those of the teachers' vectors, for targets that are not yet balanced. Those that are ``stored`` are
    standardised by their means and deviations.
    """

    loss: DenseLoss
    grids: Mapping[str, tuple[int, int, int]]
    moments: Mapping[str, Moments] = field(default_factory=dict, compare=False)
    stored: bool = False
    weights: Mapping[str, float] = field(default_factory=dict)
    key = "dense"

    def map_heads(self, width: int) -> Mapping[str, torch.nn.Module]:
        made: dict[str, torch.nn.Module] = {
            head_name(name, PATCHES): torch.nn.Linear(width, dim) for name, (_, _, dim) in self.grids.items()
        }
        return made | {
            head_name(name, _BALANCE[self.loss.balance]): self._balance(of) for name, of in self.moments.items()
        }

    def _balance(self, moments: Moments) -> Balance:
        balance = balances(self.loss.balance, {PATCHES: moments})[PATCHES]
        if not self.stored:
            return balance
        assert balance.matrix is not None
        return Balance(torch.zeros_like(moments.mean), None, moments.deviation[:, None] * balance.matrix)

    def losses_of_rows(
        self, features: Tensors, targets: Mapping[str, Tensors], heads: torch.nn.ModuleDict
    ) -> dict[str, torch.Tensor]:
        found, losses = features[MAP], dict[str, torch.Tensor]()
        own = {name: self.weights.get(name, 1.0) for name in self.grids}
        for name in self.grids:
            target = targets[name][PATCHES]
            rows = max(1, CHUNK // target[0].numel())
            total = found.new_zeros((), dtype=torch.float32)
            head = heads[head_name(name, PATCHES)]
            balance = heads[head_name(name, _BALANCE[self.loss.balance])] if name in self.moments else None
            for part, of_target in zip(found.split(rows), target.split(rows), strict=True):
                arguments = (part, of_target, head, balance)
                total = total + checkpoint(self._sum, *arguments, use_reentrant=False, preserve_rng_state=False)
            losses[f"dense/{name}"] = self.loss.weight * own[name] / sum(own.values()) * (total / len(target))
        return losses

    def _sum(
        self, found: torch.Tensor, target: torch.Tensor, head: torch.nn.Module, balance: torch.nn.Module | None
    ) -> torch.Tensor:
        """The sum over rows of the mean over patches."""
        projected = head(found.permute(0, 2, 3, 1)).float()
        target = target.float() if balance is None else balance(target)
        return distances(projected, target, self.loss.cosine).sum()


def dense(projected: torch.Tensor, patches: torch.Tensor, cosine: float = 0.9) -> torch.Tensor:
    """Mean of both weighted distances of a student's grids from a teacher's ``patches`` [B, rows, columns, D].

    The student's are ``projected`` to the teacher's dimension; they are resized to its rows and columns. Patches are
    standardised by channel, as the stored ones are.
    """
    shapes = [[*grid.shape] if isinstance(grid, torch.Tensor) else [] for grid in (projected, patches)]
    if any(len(shape) != 4 or 0 in shape for shape in shapes) or shapes[0][::3] != shapes[1][::3]:
        got = " and ".join(map(str, shapes))
        raise UserError(f"dense: want two grids [B, rows, columns, D] of equal B and D, got {got}.")
    return distances(projected.float(), patches.float(), cosine).mean()


def distances(projected: torch.Tensor, target: torch.Tensor, cosine: float) -> torch.Tensor:
    """The loss [p] of grids [p, rows, columns, D], of which the ``projected`` are resized to those of the target."""
    grid, own = target.shape[1:3], projected.shape[1:3]
    if own != grid:
        smaller = own[0] > grid[0] or own[1] > grid[1]
        resized = torch.nn.functional.interpolate(
            projected.permute(0, 3, 1, 2), grid, mode="bilinear", antialias=smaller
        )
        projected = resized.permute(0, 2, 3, 1)
    away = 1 - torch.nn.functional.cosine_similarity(projected, target, dim=-1)
    apart = torch.nn.functional.smooth_l1_loss(projected, target, reduction="none").mean(dim=-1)
    return (cosine * away + round(1 - cosine, 12) * apart).mean(dim=(1, 2))  # 0.1 of 0.9, to the bit


def make(loss: Loss, models: TargetModels) -> Dense | None:
    """The term of a config.

    Raises UserError if a teacher that it names, or every teacher, has no patches, and if it names none of several
    online teachers that have some.
    """
    if loss.dense is None:
        return None
    names = loss.dense.teachers
    if names is None and loss.online:  # those whose patches a run with these teachers stores
        names = [name for name, spec in loss.teachers.items() if spec.patches is not None] or None
    found = models.entries(PATCHES, names).items()
    grids = {name: (*entry["grid"], entry["dim"]) for name, entry in found if name in models.teachers}
    wanted = [*grids] if names is None else names
    if names is None and loss.online and len(wanted) > 1:
        raise UserError(
            f"loss.dense: teachers {' and '.join(wanted)} have patches. Name those that are learnt in "
            "loss.dense.teachers, or set `patches` of these in loss.teachers, as for a run that stores them."
        )
    if missing := [name for name in wanted if name not in grids]:
        raise UserError(
            f"loss.dense: teacher {missing[0]} has no patches; those with patches are: {', '.join(grids) or 'none'}."
        )
    if not wanted and loss.online:
        raise UserError("loss.dense: none of `loss.teachers` has patches; name one that has, such as DINOv2.")
    if not wanted:
        raise UserError(
            "loss.dense needs layers patches/TEACHER, and the datasets have none. Set `patches` of a teacher in the "
            "config of `reinforce run`, and run it; or name it under `loss.teachers`."
        )
    turned = loss.dense.balance == "phi-s"
    moments = {name: models.moments(PATCHES, name, turned)[PATCHES] for name in wanted if loss.online or turned}
    grids = {name: grids[name] for name in wanted}
    uses = {
        (PATCHES, name): f"{rows} x {columns} patches of {dim} dimensions{', balanced by phi-s' if turned else ''}"
        for name, (rows, columns, dim) in grids.items()
    }
    return Dense(loss.dense, grids, moments, not loss.online, loss.named_weights, uses=uses, stage=loss.dense.stage)
