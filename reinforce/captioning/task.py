"""A captioner as the training loop sees it."""

from __future__ import annotations

from collections.abc import Sequence

import open_clip
import torch

from reinforce.captioning.config import Loss
from reinforce.captioning.judge import Judge
from reinforce.captioning.loss import captioning_losses
from reinforce.captioning.model import CaptionerModel
from reinforce.training.task import Batch, Encoded
from teachers.export import write_open_clip


class CaptioningTask:
    """CoCa's two losses and a judge; see ``reinforce.training.task.Task``."""

    def __init__(self, model: CaptionerModel, loss: Loss, judge: Judge, notes: Sequence[str] = ()) -> None:
        self.model: torch.nn.Module = model
        self.notes: Sequence[str] = notes
        self._loss = loss
        self._judge = judge

    def prepare(self, batch: Batch) -> Batch:
        """There is nothing to add."""
        return batch

    def losses(self, encoded: Encoded, batch: Batch) -> dict[str, torch.Tensor]:
        """``contrastive`` and ``caption``; see ``reinforce.captioning.loss``."""
        scale = encoded.scalars["logit_scale"]
        return captioning_losses(self._loss, encoded.features, scale, batch["length"])

    def evaluate(self, model: torch.nn.Module) -> dict[str, float]:
        """Metrics of the held-out images; see ``reinforce.captioning.judge``."""
        assert isinstance(model, CaptionerModel)
        return self._judge(model)

    def export(self, model: torch.nn.Module, folder: str) -> None:
        """A folder for ``model: local-dir:FOLDER``, in open_clip and in ``captioners:`` of a run."""
        assert isinstance(model, CaptionerModel)
        write_open_clip(model.coca, model.config, open_clip.get_tokenizer(model.name), folder)
