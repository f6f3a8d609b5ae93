"""The probabilities term: linear classifiers on the student's features of images learn stored probabilities of classes.

Stored are the k most likely classes of the softmax of a classifier's logits / T, and the rest's sum, so the student's
probabilities q are compared with the stored p over k + 1 cells, the last of which has all other classes:

    L = weight * T^2 * sum over the cells of p * log(p / q),   q = softmax(head(sqrt(D) * feature) / T)

T^2 keeps the size of gradients the same for any temperature (arXiv 1503.02531). The loss is the mean over the rows and
over the classifiers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from reinforce.dataset.kinds.probabilities import ClassProbabilities
from reinforce.errors import UserError
from reinforce.student.config import Loss
from reinforce.student.teachers import IMAGE
from reinforce.student.terms.base import TargetModels, Tensors, Term, check_rows, head_name


@dataclass(frozen=True)
class ProbabilitiesTerm(Term):
    """``probabilities/CLASSIFIER``; ``entries`` are those of the layers in dataset.json, by classifier."""

    weight: float
    entries: Mapping[str, Mapping[str, Any]]

    def heads(self, width: int) -> Mapping[str, torch.nn.Module]:
        return {
            head_name(name, "classes"): torch.nn.Linear(width, entry["dim"]) for name, entry in self.entries.items()
        }

    def losses_of_rows(
        self, features: Tensors, targets: Mapping[str, Tensors], heads: torch.nn.ModuleDict
    ) -> dict[str, torch.Tensor]:
        images, share = features[IMAGE], self.weight / len(self.entries)
        losses = {}
        for name, entry in self.entries.items():
            logits, stored = heads[head_name(name, "classes")](math.sqrt(images.shape[1]) * images), targets[name]
            values = stored["classes"], stored["probabilities"], stored["rest"]
            losses[ClassProbabilities.pattern.replace("*", name)] = share * probabilities(
                logits, *values, float(entry["temperature"])
            )
        return losses


def make(loss: Loss, models: TargetModels) -> ProbabilitiesTerm | None:
    """The term of a config. Raises UserError if the datasets have no classifier."""
    if loss.probabilities is None:
        return None
    entries = models.entries("classifiers", None)
    if not entries:
        raise UserError(
            "loss.probabilities needs layers probabilities/CLASSIFIER, and the datasets have none. Name a model under "
            "`classifiers` in the config of `reinforce run`, and run it."
        )
    uses = {
        ("classifiers", name): f"probabilities of the {entry['top']} most likely of {entry['dim']:,} classes"
        for name, entry in entries.items()
    }
    return ProbabilitiesTerm(loss.probabilities, entries, uses=uses)


def probabilities(
    logits: torch.Tensor,
    classes: torch.Tensor,
    values: torch.Tensor,
    rest: torch.Tensor,
    temperature: float = 1.0,
) -> torch.Tensor:
    """Divergence of a linear head's ``logits`` [B, C] from a classifier's stored probabilities, times temperature^2.

    ``classes`` and ``values`` [B, k] are the stored ones, ``rest`` [B] the sum of those of other classes.
    """
    check_rows("probabilities", {"logits": logits}, {"classes": classes, "values": values})
    if not isinstance(rest, torch.Tensor) or rest.shape != classes.shape[:1]:
        raise UserError(f"probabilities: want rest [{len(classes)}], one number for each row of classes.")
    # Not on an accelerator: training runs do not wait for it, and check the classes when they read them.
    if classes.device.type == "cpu" and not 0 <= int(classes.min()) <= int(classes.max()) < logits.shape[1]:
        raise UserError(f"probabilities: want classes from 0 to {logits.shape[1] - 1:,}, as logits have.")
    if temperature <= 0:
        raise UserError(f"probabilities: temperature: want a number above 0, got {temperature}.")
    return temperature**2 * divergence(logits.float() / temperature, classes, values, rest).mean()


def divergence(
    logits: torch.Tensor, classes: torch.Tensor, probabilities: torch.Tensor, rest: torch.Tensor
) -> torch.Tensor:
    """Kullback-Leibler divergence [B] of softmax(logits) [B, C] from stored probabilities.

    ``classes`` and ``probabilities`` [B, k] are the stored ones, ``rest`` [B] is the sum of those of other classes.
    """
    classes = classes.long()
    others = logits.scatter(1, classes, -torch.inf).logsumexp(dim=1, keepdim=True)
    cells, stored = logits.gather(1, classes), probabilities
    if classes.shape[1] < logits.shape[1]:
        cells = torch.cat([cells, others], dim=1)  # the logsumexp of the cells is that of all logits
        stored = torch.cat([stored, rest[:, None]], dim=1)
    stored = stored / stored.sum(dim=1, keepdim=True)  # 1 up to the rounding of what is stored
    return (torch.special.xlogy(stored, stored) - stored * cells.log_softmax(dim=1)).sum(dim=1)
