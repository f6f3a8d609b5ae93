"""The fine-tuning of a captioner as a task of the training loop."""

from __future__ import annotations

from collections.abc import Sequence

import open_clip
import torch

from reinforce.captioning.config import Loss
from reinforce.captioning.evaluator import CaptionerEvaluator
from reinforce.captioning.loss import captioning_losses
from reinforce.captioning.model import CaptionerModel
from reinforce.training.task import Batch, Encoded
from teachers.open_clip.export import write_open_clip


class CaptioningTask:
    """CoCa's two losses, and an evaluator of held-out images; implements ``reinforce.training.task.Task``."""

    def __init__(
        self, model: CaptionerModel, loss: Loss, evaluator: CaptionerEvaluator, notes: Sequence[str] = ()
    ) -> None:
        self.model: torch.nn.Module = model
        self.notes: Sequence[str] = notes
        self._loss = loss
        self._evaluator = evaluator

    def begin_step(self, step: int, steps: int) -> None:
        """Do nothing: all steps are alike."""

    def prepare(self, batch: Batch) -> Batch:
        """Return the batch as it is; this task adds nothing."""
        return batch

    def losses(self, encoded: Encoded, batch: Batch) -> dict[str, torch.Tensor]:
        """Return ``contrastive`` and ``caption``; see ``reinforce.captioning.loss``."""
        scale = encoded.scalars["logit_scale"]
        return captioning_losses(self._loss, encoded.features, scale, batch["length"])

    def evaluate(self, model: torch.nn.Module) -> dict[str, float]:
        """Return metrics of the held-out images; see ``reinforce.captioning.evaluator``."""
        assert isinstance(model, CaptionerModel)
        return self._evaluator.evaluate(model)

    def export(self, model: torch.nn.Module, folder: str) -> None:
        """Write a folder that open_clip and a run's ``captioners:`` load as ``local-dir:FOLDER``."""
        assert isinstance(model, CaptionerModel)
        write_open_clip(model.coca, model.config, open_clip.get_tokenizer(model.name), folder)
