"""CoCa's loss (arXiv 2205.01917) as a function of features, weights and the logit scale alone.

    L = contrastive * L_CLIP + caption * sum_b nll_b / sum_b tokens_b

As in open_clip's CoCaLoss the second term is a mean over tokens, not over captions; here it is one over the tokens of
the global batch, however they are spread over ranks and parts. A token counts by its place in the caption, up to the
end: open_clip leaves out by number what it pads with, 0, which is a word as well ("!"). (CoCa's text tower hides by
that number, too. That is part of the model, in training and in use, and is left as it is.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from reinforce.captioning.config import Loss
from reinforce.student.loss import Objective, contrastive_losses
from reinforce.training import gather

#: CLIP's own loss and nothing else.
_CLIP = Objective(lambda_=0.0)


def captioning_losses(
    weights: Loss, features: Mapping[str, torch.Tensor], scale: torch.Tensor, length: Sequence[int]
) -> dict[str, torch.Tensor]:
    """Weighted ``contrastive`` and ``caption`` loss of a rank's b samples; those of weight 0 are left out.

    ``image`` and ``text`` [b, D] of unit norm, ``nll`` [b] summed over the ``length`` [b] tokens of each caption;
    ``scale`` is the logit scale. The mean over the ranks is the loss of the global batch.
    """
    losses = {}
    if weights.contrastive:
        pairs = {name: features[name] for name in ("image", "text")}
        [clip] = contrastive_losses(_CLIP, pairs, scale, None, {}).values()
        losses["contrastive"] = weights.contrastive * clip
    if weights.caption:
        nll = features["nll"]
        tokens = torch.tensor(float(sum(length)), device=nll.device)
        losses["caption"] = weights.caption * nll.sum() / gather.mean(tokens)
    return losses
