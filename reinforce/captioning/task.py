"""A captioner as the training loop sees it."""

from __future__ import annotations

from collections.abc import Sequence

import open_clip
import torch

from reinforce.captioning.config import Loss
from reinforce.captioning.judge import Judge
from reinforce.captioning.model import CaptionerModel
from reinforce.student.export import write_open_clip
from reinforce.student.loss import Objective, contrast
from reinforce.training import gather
from reinforce.training.task import Batch, Encoded

#: CLIP's own loss and nothing else.
_CLIP = Objective(share=0.0)


class CaptioningTask:
    """CoCa's two losses (arXiv 2205.01917), and a judge; see ``reinforce.training.task.Task``."""

    def __init__(self, model: CaptionerModel, loss: Loss, judge: Judge, notes: Sequence[str] = ()) -> None:
        self.model: torch.nn.Module = model
        self.notes: Sequence[str] = notes
        self._loss = loss
        self._judge = judge

    def prepare(self, batch: Batch) -> Batch:
        """There is nothing to add."""
        return batch

    def losses(self, encoded: Encoded, batch: Batch) -> dict[str, torch.Tensor]:
        """Weighted ``contrastive`` and ``caption`` loss of the global batch.

        As in open_clip's CoCaLoss, the caption loss is the mean over tokens, not over captions; here over those of
        all ranks and parts, however many each of them has.
        """
        losses = {}
        features = encoded.features
        if self._loss.contrastive:
            pairs = {"image": features["image"], "text": features["text"]}
            [clip] = contrast(_CLIP, pairs, encoded.scalars["logit_scale"], None, {}).values()
            losses["contrastive"] = self._loss.contrastive * clip
        if self._loss.caption:
            nll = features["nll"]
            tokens = torch.tensor(float(sum(batch["length"])), device=nll.device)
            losses["caption"] = self._loss.caption * nll.sum() / gather.mean(tokens)
        return losses

    def evaluate(self, model: torch.nn.Module) -> dict[str, float]:
        """Metrics of the held-out images; see ``reinforce.captioning.judge``."""
        assert isinstance(model, CaptionerModel)
        return self._judge(model)

    def export(self, model: torch.nn.Module, folder: str) -> None:
        """A folder for ``model: local-dir:FOLDER``, in open_clip and in ``captioners:`` of a run."""
        assert isinstance(model, CaptionerModel)
        write_open_clip(model.coca, model.config, open_clip.get_tokenizer(model.name), folder)
