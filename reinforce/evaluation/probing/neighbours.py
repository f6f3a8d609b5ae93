"""Classification by the nearest training images, weighted as in DINO: a class gets the sum of exp(cosine / T).

Scores are those of ``ranking``. Among equal scores the image with the lower index is nearer, and among equal sums the
class with the lower index wins, so that results are the same on every device and for every block size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from reinforce.evaluation.ranking import BLOCK, scores_of
from teachers.runtime.accelerator import Accelerator

_SIGN, _INDEX = 0x7FFFFFFF, 0xFFFFFFFF


def classify(
    train: torch.Tensor,
    labels: torch.Tensor,
    test: torch.Tensor,
    counts: Sequence[int],
    temperature: float,
    accelerator: Accelerator,
    block: int = BLOCK,
) -> dict[int, torch.Tensor]:
    """Predict the classes of ``test`` by each number of neighbours in ``counts`` -> int64 [Q] on the CPU, by number.

    ``train`` [N, D] and ``test`` [Q, D] are float32 of unit norm on the CPU, ``labels`` int64 [N] are at least 0. No
    count is above N. Memory on the device is bounded by ``block`` and the largest count.
    """
    found: dict[int, list[torch.Tensor]] = {count: [] for count in counts}
    classes = int(labels.max()) + 1
    for start in range(0, len(test), block):
        scores, indices = find_nearest(test[start : start + block], train, max(counts), accelerator, block)
        weights = ((scores.double() - scores[:, :1]) / temperature).exp()  # relative to the nearest, as exp overflows
        votes = torch.zeros(len(scores), classes, dtype=torch.float64)
        done = 0
        for count in sorted(found):
            votes.scatter_add_(1, labels[indices[:, done:count]], weights[:, done:count])
            found[count].append(votes.argmax(1))
            done = count
    return {count: torch.cat(parts) for count, parts in found.items()}


def find_nearest(
    queries: torch.Tensor, train: torch.Tensor, count: int, accelerator: Accelerator, block: int = BLOCK
) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``count`` nearest of ``train`` [N, D] for ``queries`` [Q, D], nearest first, on the CPU.

    Returns scores, float32 [Q, count], and indices, int64 [Q, count].
    """
    part = accelerator.put(queries)
    best: torch.Tensor | None = None
    for left in range(0, len(train), block):
        scores = scores_of(part, accelerator.put(train[left : left + block]))
        keys = _keys(scores, left)
        best = keys if best is None else torch.cat([best, keys], 1)
        best = best.topk(min(count, best.shape[1]), dim=1).values
    assert best is not None
    bits = (best >> 32).to(torch.int32)
    return _flip(bits).view(torch.float32).cpu(), (_INDEX - (best & _INDEX)).cpu()


def _keys(scores: torch.Tensor, first: int) -> torch.Tensor:
    """Distinct int64 keys [Q, C] that order candidates by score, then by index, which starts at ``first``.

    The upper half has the bits of the score, the lower one the index: topk alone has no order among equal scores.
    """
    bits = _flip((scores + 0.0).view(torch.int32))  # + 0.0 makes -0.0 equal to 0.0
    indices = torch.arange(first, first + scores.shape[1], device=scores.device)
    return (bits.long() << 32) | (_INDEX - indices)


def _flip(bits: torch.Tensor) -> torch.Tensor:
    """Bits of float32 as int32 in the order of the floats, and back."""
    return torch.where(bits < 0, bits ^ _SIGN, bits)
