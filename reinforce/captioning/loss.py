"""CoCa's loss (arXiv 2205.01917) as a function of features, weights and the logit scale.

    L = contrastive * L_CLIP + caption * sum_b nll_b / sum_b tokens_b

As in open_clip's CoCaLoss the second term is a mean over tokens, not over captions. Here the mean is over the tokens of
the global batch, for any number of ranks and batch parts. Tokens are selected by position, up to the end token, while
open_clip masks its padding by value: the value is 0, which is also the token of "!". (CoCa's text tower masks by value
too. That is part of the model, in training and inference, and is not changed.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from reinforce.captioning.config import Loss
from reinforce.student.loss import Objective, contrastive_losses
from reinforce.training.distributed import gather

#: CLIP's loss without distillation.
_CLIP = Objective(lambda_=0.0)


def captioning_losses(
    weights: Loss, features: Mapping[str, torch.Tensor], scale: torch.Tensor, length: Sequence[int]
) -> dict[str, torch.Tensor]:
    """Return the weighted ``contrastive`` and ``caption`` losses of a rank's b samples, without those of weight 0.

    ``image`` and ``text`` are unit-norm [b, D], ``nll`` [b] is summed over the ``length`` [b] tokens of each caption,
    ``scale`` is the logit scale. The mean over the ranks is the loss of the global batch.
    """
    losses = {}
    if weights.contrastive:
        pairs = {name: features[name] for name in ("image", "text")}
        [clip] = contrastive_losses(_CLIP, pairs, scale, None, {}).values()
        losses["contrastive"] = weights.contrastive * clip
    if weights.caption:
        nll = features["nll"]
        tokens = torch.full((), float(sum(length)), device=nll.device)  # a copy from the host would wait
        losses["caption"] = weights.caption * nll.sum() / gather.mean(tokens)
    return losses
