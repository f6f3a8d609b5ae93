"""Online teachers: the baseline that runs teachers in the training loop instead of reading stored embeddings.

They get the augmentations and texts that the stored teachers got, so the targets are equal.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from reinforce.errors import UserError
from reinforce.evaluation.encoding import encode_texts
from reinforce.student.teachers import IMAGE, IMAGES, TEXTS, TeacherInfo
from reinforce.training.task import Batch
from teachers.preprocessing.pixels import to_pixels
from teachers.protocols import Teacher
from teachers.registry import load_model
from teachers.runtime import determinism
from teachers.spec import TeacherSpec

#: Largest number of images or texts in one forward pass.
_MAX_BATCH = 256


def load_teachers(specs: Mapping[str, TeacherSpec], device: str) -> dict[str, Teacher]:
    """Load the teachers on a device. Raises UserError if one cannot be loaded."""
    try:
        return {name: load_model(name, spec, device) for name, spec in specs.items()}
    except (ValueError, OSError, ImportError, RuntimeError, TypeError) as error:
        raise UserError(str(error)) from error


def teacher_info(teacher: Teacher, spec: TeacherSpec, texts: bool = True) -> TeacherInfo:
    """The description of a loaded teacher, with its side of texts only if there are ``texts``."""
    sides = {IMAGES} if teacher.image is not None else set()
    sides |= {TEXTS} if texts and callable(getattr(teacher, "encode_texts", None)) else set()
    source = "config: loss.teachers" if spec.logit_scale is not None else "model"
    return TeacherInfo(teacher.dim, frozenset(sides), teacher.logit_scale, source)


@torch.no_grad()
@determinism.inference()
def add_targets(batch: Batch, teachers: Mapping[str, Teacher]) -> Batch:
    """The batch with ``targets`` on its device, computed from its ``crops`` and ``texts``; see ``batch.py``.

    Stored targets of other models stay.
    """
    device = batch["image"].device
    targets: dict[str, dict[str, torch.Tensor]] = dict(batch.get("targets", {}))
    for name, teacher in teachers.items():
        targets[name] = dict(targets.get(name, {}))  # a classifier may have the name of a teacher
        if teacher.image is not None:
            targets[name][IMAGE] = _encode_images(teacher, batch["crops"][name]).to(device)
        if callable(getattr(teacher, "encode_texts", None)):
            for kind, texts in batch["texts"].items():
                targets[name][kind] = encode_texts(teacher, texts, _MAX_BATCH).to(device)
    return {**batch, "targets": targets}


def _encode_images(teacher: Teacher, crops: torch.Tensor) -> torch.Tensor:
    """uint8 [B, h, w, 3] -> float32 [B, D]."""
    assert teacher.image is not None
    # Each part is copied: the teacher may reuse its memory in the next call.
    parts = [teacher.encode_images(to_pixels(part, teacher.image)).clone() for part in crops.split(_MAX_BATCH)]
    return torch.cat(parts).float()  # a new tensor: parts may be inference tensors, which autograd refuses
