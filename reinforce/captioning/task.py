"""The fine-tuning of a captioner as a task of the training loop, with CoCa's loss (arXiv 2205.01917).

    L = contrastive * L_CLIP + caption * sum_b nll_b / sum_b tokens_b

As in open_clip's CoCaLoss the second term is a mean over tokens, not over captions. Here the mean is over the tokens of
the global batch, for any number of ranks and microbatches. Tokens are selected by position, up to the end token, while
open_clip masks its padding by value: the value is 0, which is also the token of "!". (CoCa's text tower masks by value
too. That is part of the model, in training and inference, and is not changed.)
"""

from __future__ import annotations

from collections.abc import Sequence

import open_clip
import torch

from reinforce.captioning.config import Loss
from reinforce.captioning.evaluator import CaptionerEvaluator
from reinforce.captioning.model import CaptionerModel
from reinforce.student.loss import Objective, contrastive_losses
from reinforce.training.distributed import gather
from reinforce.training.task import Batch, Encoded, Task
from teachers.open_clip.building import write_open_clip

#: CLIP's loss without distillation.
_CLIP = Objective(lambda_=0.0)


class CaptioningTask(Task):
    """CoCa's two losses, and an evaluator of held-out images. Batches have the lengths of their captions."""

    def __init__(
        self, model: CaptionerModel, loss: Loss, evaluator: CaptionerEvaluator, notes: Sequence[str] = ()
    ) -> None:
        self.model, self.notes = model, notes
        self._loss, self._evaluator = loss, evaluator

    def losses(self, encoded: Encoded, batch: Batch) -> dict[str, torch.Tensor]:
        """Return the weighted ``contrastive`` and ``caption`` losses of a rank's b samples, without those of weight 0.

        ``image`` and ``text`` are unit-norm [b, D], ``nll`` [b] is summed over the ``length`` [b] tokens of each
        caption. The mean over the ranks is the loss of the global batch.
        """
        losses, weights, features = {}, self._loss, encoded.features
        if weights.contrastive:
            pairs = {name: features[name] for name in ("image", "text")}
            [clip] = contrastive_losses(_CLIP, pairs, encoded.scalars["logit_scale"], None, {}).values()
            losses["contrastive"] = weights.contrastive * clip
        if weights.caption:
            nll = features["nll"]
            tokens = torch.full((), float(sum(batch["length"])), device=nll.device)  # a copy from the host would wait
            losses["caption"] = weights.caption * nll.sum() / gather.mean(tokens)
        return losses

    def evaluate(self, model: torch.nn.Module) -> dict[str, float]:
        """Return metrics of the held-out images; see ``reinforce.captioning.evaluator``."""
        assert isinstance(model, CaptionerModel)
        return self._evaluator.evaluate(model)

    def export(self, model: torch.nn.Module, folder: str) -> None:
        """Write a folder that open_clip and a run's ``captioners:`` load as ``local-dir:FOLDER``."""
        assert isinstance(model, CaptionerModel)
        write_open_clip(model.coca, model.config, open_clip.get_tokenizer(model.name), folder)
