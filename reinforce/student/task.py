"""A student as the training loop sees it."""

from __future__ import annotations

from dataclasses import replace

import torch

from reinforce.dataset.manifest import read_manifest
from reinforce.dataset.store import Store
from reinforce.evaluation.evaluator import Evaluator
from reinforce.student import online
from reinforce.student.config import StudentConfig
from reinforce.student.distillation import (
    CAPTION,
    IMAGE,
    SYNTHETIC,
    DistillationPlan,
    TeacherInfo,
    plan_distillation,
    stored_teachers,
)
from reinforce.student.export import export
from reinforce.student.loss import Objective, contrast, matching
from reinforce.student.model import Student, build_student, scale_of, tokenizer_of
from reinforce.training import gather
from reinforce.training.task import Batch, Encoded
from teachers.device import Accelerator
from teachers.protocols import Teacher


class StudentTask:
    """Distils what a config says into the student it names; see ``reinforce.training.task.Task``.

    Reads dataset.json of the datasets and the sets to evaluate by, loads the student on the CPU and, with
    ``targets: online``, the teachers on ``device``. ``notes`` tell what each teacher is used for, and the logit
    scales. Raises UserError for what cannot be trained.
    """

    def __init__(self, config: StudentConfig, device: str = "cpu") -> None:
        loss = config.loss
        teachers: dict[str, Teacher] = {}
        known: dict[str, TeacherInfo] = {}
        if loss.lambda_ > 0 and loss.targets == "online":
            teachers = online.load_teachers(loss.teachers, device)
            known = {name: online.known_of(teacher, loss.teachers[name]) for name, teacher in teachers.items()}
        elif loss.lambda_ > 0:
            known = stored_teachers(config, {s.url: read_manifest(Store(s.url)) for s in config.data.datasets})
        self.plan: DistillationPlan = plan_distillation(loss, known)
        self.model: Student = build_student(
            config.student,
            seed=config.seed,
            form=loss.form,
            features=self.plan.features,
            features_weight=loss.lambda_ * loss.features_weight,
            scales=self.plan.scales if loss.learn_scales else None,
            checkpointing=config.train.compute.gradient_checkpointing,
        )
        self.tokenizer = tokenizer_of(self.model)
        self._online = {name: teachers[name] for name in self.plan.teachers if name in teachers}
        self._objective = Objective(loss.lambda_, loss.form, self.plan.scales, loss.logit_biases)
        self._precision = config.train.compute.precision
        self._evaluator: Evaluator | None = None
        if gather.rank() == 0:
            self._evaluator = Evaluator(config.evaluate)
        self.notes = [_described(self.model, config), *self.plan.notes]

    def prepare(self, batch: Batch) -> Batch:
        """Images, tokens and targets, those of teachers in the loop included; nothing else.

        A compiled model would take the keys of samples for constants, and be compiled anew for each batch.
        """
        if self._online:
            batch = online.teach(batch, self._online)
        return {name: batch[name] for name in (IMAGE, CAPTION, SYNTHETIC, "targets") if name in batch}

    def losses(self, encoded: Encoded, batch: Batch) -> dict[str, torch.Tensor]:
        """``clip/KIND`` and ``distill/KIND`` over the batches of all ranks; see ``reinforce.student.loss``.

        Where scales are learnt, ``scale/TEACHER`` as well, which moves nothing but them.
        """
        scalars, targets = encoded.scalars, batch.get("targets", {})
        objective = self._objective
        learnt = {name: scalars[scale_of(name)] for name in objective.scales if scale_of(name) in scalars}
        if learnt:
            objective = replace(objective, scales={name: scale.detach() for name, scale in learnt.items()})
        losses = contrast(objective, encoded.features, scalars["logit_scale"], scalars.get("logit_bias"), targets)
        return losses | matching(learnt, targets)

    def evaluate(self, model: torch.nn.Module) -> dict[str, float]:
        """Metrics of the sets under ``evaluate``, by the names in ``reinforce.evaluation``; on rank 0 alone."""
        assert isinstance(model, Student)
        assert self._evaluator is not None
        device = str(next(model.parameters()).device)
        accelerator = Accelerator(device, self._precision)
        return self._evaluator.evaluate_module(model.clip, model.image, self.tokenizer, accelerator).metrics

    def export(self, model: torch.nn.Module, folder: str) -> None:
        """A folder for ``open_clip.create_model_and_transforms("local-dir:FOLDER")`` and its ``get_tokenizer``."""
        assert isinstance(model, Student)
        export(model, folder)


def _described(student: Student, config: StudentConfig) -> str:
    millions = sum(parameter.numel() for parameter in student.clip.parameters()) / 1e6
    start = "pretrained" if student.pretrained else f"random weights of seed {config.seed}"
    return f"student {student.name}: {millions:.1f} M parameters, {student.image.size} pixels, {start}"
