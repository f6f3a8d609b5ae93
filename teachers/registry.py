"""Load a model from its spec. ``describe_*`` is used while planning, ``load_*`` in the workers."""

from __future__ import annotations

from typing import Any, cast

from teachers.describe import ModelInfo, describe_captioner, describe_teacher, errors_naming, import_class
from teachers.protocols import Captioner, ImageSpec, Teacher
from teachers.spec import CaptionerSpec, ModelSpec, TeacherSpec

__all__ = ["ModelInfo", "describe_captioner", "describe_teacher", "load_captioner", "load_teacher"]


def load_teacher(name: str, spec: TeacherSpec, device: str) -> Teacher:
    """Load a teacher with its weights on a device (``auto``, ``cpu``, ``cuda:0``, ...).

    Raises ValueError, OSError (FileNotFoundError included) for a wrong config and RuntimeError for errors in the
    model's own code. Each message starts with the teacher's name.
    """
    from teachers.device.accelerator import Accelerator

    with errors_naming(f"teacher {name}"):
        if spec.class_ is not None:
            return _load_custom_teacher(spec, device)
        accelerator = Accelerator(device, spec.precision)
        if spec.family == "transformers":
            from teachers.transformers.teacher import load

            return load(spec, accelerator)
        from teachers.open_clip.teacher import OpenClipTeacher

        return OpenClipTeacher(spec, accelerator)


def load_captioner(name: str, spec: CaptionerSpec, device: str) -> Captioner:
    """Load a captioner with its weights on a device; raises as ``load_teacher`` does."""
    from teachers.device.accelerator import Accelerator

    with errors_naming(f"captioner {name}"):
        if spec.class_ is not None:
            return _load_custom_captioner(spec, device)
        if spec.family == "openai":
            from teachers.server.captioner import ServerCaptioner

            return ServerCaptioner(name, spec)
        accelerator = Accelerator(device, spec.precision)
        if spec.family == "transformers":
            from teachers.transformers.captioner import load

            return load(spec, accelerator)
        from teachers.coca.captioner import CocaCaptioner

        return CocaCaptioner(spec, accelerator)


def _load_custom_teacher(spec: TeacherSpec, device: str) -> Teacher:
    teacher = _build(spec, device)
    dim = getattr(teacher, "dim", None)
    if not isinstance(dim, int) or dim < 1:
        raise ValueError(f"class {spec.class_} must set `dim`, the length of its embeddings, got {dim!r}")
    if callable(getattr(teacher, "encode_images", None)):
        if not hasattr(teacher, "image"):
            raise ValueError(
                f"class {spec.class_} has `encode_images` and must set `image` to a teachers.protocols.ImageSpec"
            )
        if teacher.image is not None and not isinstance(teacher.image, ImageSpec):
            raise ValueError(
                f"class {spec.class_}: `image` must be a teachers.protocols.ImageSpec, got {teacher.image!r}"
            )
    else:
        teacher.image = None
    if spec.logit_scale is not None or not hasattr(teacher, "logit_scale"):
        teacher.logit_scale = spec.logit_scale
    return cast(Teacher, teacher)


def _load_custom_captioner(spec: CaptionerSpec, device: str) -> Captioner:
    captioner = _build(spec, device)
    if not isinstance(getattr(captioner, "image", None), ImageSpec):
        raise ValueError(f"class {spec.class_} must set `image` to a teachers.protocols.ImageSpec")
    captions = getattr(captioner, "captions", spec.captions)
    if captions != spec.captions:
        raise ValueError(
            f"class {spec.class_} gives {captions} captions an image and the config has `captions: {spec.captions}`: "
            "make them equal"
        )
    captioner.captions = captions
    return cast(Captioner, captioner)


def _build(spec: ModelSpec, device: str) -> Any:
    from teachers.device.accelerator import Accelerator

    return import_class(spec)(Accelerator(device).device, **spec.options)
