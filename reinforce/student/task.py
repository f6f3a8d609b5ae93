"""A student as the training loop sees it."""

from __future__ import annotations

import logging

import torch

from reinforce.errors import UserError
from reinforce.evaluation.evaluator import Evaluator
from reinforce.store import MANIFEST, Store
from reinforce.student import gather, online
from reinforce.student.config import StudentConfig
from reinforce.student.export import export
from reinforce.student.lesson import Lesson, plan_lesson, stored_teachers
from reinforce.student.loss import Objective, contrast
from reinforce.student.model import Student, build_student, tokenizer_of
from reinforce.training.task import Batch, Encoded
from teachers.device import Accelerator
from teachers.protocols import Teacher

log = logging.getLogger(__name__)


class StudentTask:
    """Distils what the config says into the student it names; see ``reinforce.training.task.Task``.

    Reads dataset.json of the datasets, loads the student on the CPU and, with ``targets: online``, the teachers on
    ``device``. Raises UserError for what cannot be trained.
    """

    def __init__(self, config: StudentConfig, device: str = "cpu") -> None:
        loss = config.loss
        self._config = config
        self._teachers: dict[str, Teacher] = {}
        if loss.lambda_ > 0 and loss.targets == "online":
            self._teachers = online.load_teachers(loss.teachers, device)
            known = {name: online.known_of(teacher, loss.teachers[name]) for name, teacher in self._teachers.items()}
        else:
            known = stored_teachers(config, {source.url: _manifest(source.url) for source in config.data.datasets})
        self.lesson: Lesson = plan_lesson(loss, known)
        self._teachers = {name: self._teachers[name] for name in self.lesson.teachers if name in self._teachers}
        self._objective = Objective(loss.lambda_, loss.form, self.lesson.scales, loss.logit_biases)
        self.model: Student = build_student(
            config.student,
            seed=config.seed,
            form=loss.form,
            features=self.lesson.features,
            features_weight=loss.lambda_ * loss.features_weight,
            checkpointing=config.train.compute.gradient_checkpointing,
        )
        self.tokenizer = tokenizer_of(self.model)
        self._evaluator = Evaluator(config.evaluate) if gather.rank() == 0 else None
        if gather.rank() == 0:
            for note in self.lesson.notes:
                log.info(note)

    def prepare(self, batch: Batch) -> Batch:
        """Teachers in the loop, if there are any, put their targets in the place of views and texts."""
        return online.teach(batch, self._teachers) if self._teachers else batch

    def losses(self, encoded: Encoded, batch: Batch) -> dict[str, torch.Tensor]:
        """``clip/KIND`` and ``distill/KIND`` over the batches of all ranks; see ``reinforce.student.loss``."""
        scalars = encoded.scalars
        return contrast(
            self._objective,
            encoded.features,
            scalars["logit_scale"],
            scalars.get("logit_bias"),
            batch.get("targets", {}),
        )

    def evaluate(self, model: torch.nn.Module) -> dict[str, float]:
        """Metrics of the sets under ``evaluate``, by the names in ``reinforce.evaluation``; on rank 0 alone."""
        assert isinstance(model, Student)
        assert self._evaluator is not None
        device = str(next(model.parameters()).device)
        accelerator = Accelerator(device, self._config.train.compute.precision)
        return self._evaluator.evaluate_module(model.clip, model.image, self.tokenizer, accelerator).metrics

    def export(self, model: torch.nn.Module, folder: str) -> None:
        """A folder for ``open_clip.create_model_and_transforms("local-dir:FOLDER")`` and its ``get_tokenizer``."""
        assert isinstance(model, Student)
        export(model, folder)


def _manifest(url: str) -> dict:
    manifest = Store(url).read_json(MANIFEST)
    if manifest is None:
        raise UserError(f"{url} is not a reinforced dataset: it has no {MANIFEST}.")
    return manifest
