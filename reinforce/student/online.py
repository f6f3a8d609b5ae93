"""Online teachers: the baseline that runs teachers in the training loop instead of reading stored embeddings.

They get the augmentations and texts that the stored teachers got, so the targets are equal.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

import torch
from torch.nn.functional import normalize

from reinforce.dataset.kinds.registry import KINDS
from reinforce.dataset.targets import TargetEncoder
from reinforce.errors import UserError
from reinforce.evaluation.encoding import encode_texts
from reinforce.student.teachers import IMAGE, IMAGES, TEXTS, TeacherInfo
from reinforce.training.task import Batch
from teachers.preprocessing.pixels import to_pixels
from teachers.protocols import ImageSpec, Teacher
from teachers.registry import load_model
from teachers.runtime import determinism
from teachers.spec import TeacherSpec

_LOG = logging.getLogger(__name__)
#: Largest number of images or texts in one forward pass.
_MAX_BATCH = 256


def load_teachers(specs: Mapping[str, TeacherSpec], device: str) -> dict[str, Teacher]:
    """Load the teachers on a device. Raises UserError if one cannot be loaded."""
    try:
        return {name: load_model(name, spec, device) for name, spec in specs.items()}
    except (ValueError, OSError, ImportError, RuntimeError, TypeError) as error:
        raise UserError(str(error)) from error


def other_targets(
    section: str, teachers: Mapping[str, Teacher], names: Sequence[str] | None, device: str
) -> dict[str, TargetEncoder]:
    """The targets of the kind of a ``target_section`` of the teachers in ``names``; None: of all that have one.

    Raises ValueError for the others.
    """
    [kind] = (kind for kind in KINDS.values() if kind.target_section == section)
    found = {}
    for name, teacher in teachers.items():
        if names is None or name in names:
            try:
                found[name] = kind.encoder(teacher, torch.device(device))
            except ValueError as error:
                if names is not None:
                    raise ValueError(f"teacher {name}: {error}") from error
                _LOG.warning("teacher %s: no %s are learnt: %s", name, section, error)
    return found


def teacher_info(teacher: Teacher, spec: TeacherSpec, texts: bool = True) -> TeacherInfo:
    """The description of a loaded teacher, with its side of texts only if there are ``texts``."""
    sides = {IMAGES} if teacher.image is not None else set()
    sides |= {TEXTS} if texts and callable(getattr(teacher, "encode_texts", None)) else set()
    source = "config: loss.teachers" if spec.logit_scale is not None else "model"
    return TeacherInfo(teacher.dim, frozenset(sides), teacher.logit_scale, source)


@torch.no_grad()
@determinism.inference()
def add_targets(
    batch: Batch, teachers: Mapping[str, Teacher], others: Sequence[tuple[str, TargetEncoder]] = ()
) -> Batch:
    """The batch with ``targets`` on its device, computed from its ``crops`` and ``texts``; see ``data/assembly.py``.

    They are vectors of ``teachers`` at unit norm, of which half precision takes them away, and ``others``, each with
    the name of its teacher. Stored targets of other models stay.
    """
    device = batch["image"].device
    targets: dict[str, dict[str, torch.Tensor]] = dict(batch.get("targets", {}))
    for name in (*teachers, *(name for name, _ in others)):
        targets[name] = dict(targets.get(name, {}))  # a classifier may have the name of a teacher
    for name, target in others:
        targets[name][target.name] = _encode(target.encode, target.image, batch["crops"][name]).to(device)
    for name, teacher in teachers.items():
        if teacher.image is not None:
            vectors = _encode(teacher.encode_images, teacher.image, batch["crops"][name])
            targets[name][IMAGE] = normalize(vectors, dim=-1).to(device)
        if callable(getattr(teacher, "encode_texts", None)):
            for kind, texts in batch["texts"].items():
                targets[name][kind] = normalize(encode_texts(teacher, texts, _MAX_BATCH), dim=-1).to(device)
    return {**batch, "targets": targets}


def _encode(encode: Callable[[torch.Tensor], torch.Tensor], spec: ImageSpec, crops: torch.Tensor) -> torch.Tensor:
    """uint8 [B, h, w, 3] -> float32 [B, ...]."""
    # Each part is copied: the teacher may reuse its memory in the next call.
    parts = [encode(to_pixels(part, spec)).clone() for part in crops.split(_MAX_BATCH)]
    return torch.cat(parts).float()  # a new tensor: parts may be inference tensors, which autograd refuses
