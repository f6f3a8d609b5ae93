"""Students of images alone: networks of timm, and of classes and functions of users."""

from __future__ import annotations

from reinforce.errors import UserError
from reinforce.student.config import Student as StudentSpec
from reinforce.student.layers.pointwise import avoid_faulty_convolutions
from reinforce.student.layers.quantize import can_quantize
from reinforce.student.model import Student
from reinforce.student.terms.registry import Terms
from teachers.backbones.building import build_backbone
from teachers.runtime.determinism import seeded


def build_image_student(
    spec: StudentSpec, *, seed: int, terms: Terms | None = None, checkpointing: bool = False
) -> Student:
    """Build a network of images alone as ``build_student`` does. Raises UserError if it is unknown or does not fit."""
    try:
        with seeded(seed):
            clip, backbone = build_backbone(spec.backbone)
        if checkpointing:
            clip.set_grad_checkpointing()
        if spec.quantize is not None and not can_quantize(clip):
            raise ValueError(f"{backbone.name} has no layer whose weights `quantize` could round: remove the key")
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        raise UserError(f"student: {error}") from error
    avoid_faulty_convolutions(clip)
    with seeded(seed):
        config, towers = {"embed_dim": backbone.dim}, ["image"] * backbone.pretrained
        student = Student(backbone.name, clip.train(), config, backbone.image, towers, terms, backbone=backbone)
    student.keep_start()
    student.set_batch_norm(spec.batch_norm or ("keep" if student.pretrained else "train"))
    return student
