"""Teachers in the loop: the baseline that reinforcement spares. They see what stored ones saw, so targets are equal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from reinforce.errors import UserError
from reinforce.student.distillation import IMAGE, IMAGES, TEXTS, TeacherInfo
from reinforce.training.task import Batch
from teachers.pixels import to_pixels
from teachers.protocols import Teacher
from teachers.registry import load_teacher
from teachers.spec import TeacherSpec

#: Images or texts in one forward pass.
_PART = 256


def load_teachers(specs: Mapping[str, TeacherSpec], device: str) -> dict[str, Teacher]:
    """Raises UserError where one cannot be loaded."""
    try:
        return {name: load_teacher(name, spec, device) for name, spec in specs.items()}
    except (ValueError, OSError, ImportError, RuntimeError, TypeError) as error:
        raise UserError(str(error)) from error


def known_of(teacher: Teacher, spec: TeacherSpec) -> TeacherInfo:
    """What a loaded teacher states of itself."""
    sides = {IMAGES} if teacher.image is not None else set()
    sides |= {TEXTS} if callable(getattr(teacher, "encode_texts", None)) else set()
    origin = "config: loss.teachers" if spec.logit_scale is not None else "model"
    return TeacherInfo(teacher.dim, frozenset(sides), teacher.logit_scale, origin)


@torch.no_grad()
def teach(batch: Batch, teachers: Mapping[str, Teacher]) -> Batch:
    """The batch with ``targets`` on its device, made of its ``views`` and ``texts``; see ``batch.py``."""
    device = batch["image"].device
    targets: dict[str, dict[str, torch.Tensor]] = {}
    for name, teacher in teachers.items():
        targets[name] = {}
        if teacher.image is not None:
            targets[name][IMAGE] = _encode_images(teacher, batch["views"][name]).to(device)
        if callable(getattr(teacher, "encode_texts", None)):
            for kind, texts in batch["texts"].items():
                targets[name][kind] = _encode_texts(teacher, texts).to(device)
    return {**batch, "targets": targets}


def _encode_images(teacher: Teacher, views: torch.Tensor) -> torch.Tensor:
    assert teacher.image is not None
    parts = [teacher.encode_images(to_pixels(part, teacher.image)).float() for part in views.split(_PART)]
    return torch.cat(parts)  # outside of inference mode, in which some teachers' parts were made


def _encode_texts(teacher: Teacher, texts: Sequence[str]) -> torch.Tensor:
    """Texts of similar length go together, as teachers like it."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    parts = [teacher.encode_texts([texts[i] for i in order[at : at + _PART]]) for at in range(0, len(texts), _PART)]
    found = torch.cat(parts).float()
    return found[torch.tensor(order, device=found.device).argsort()]
