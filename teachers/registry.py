"""From a spec in a config to a model: described while planning, loaded in the worker."""

from __future__ import annotations

from typing import Any, cast

from teachers.describe import ModelInfo, describe_captioner, describe_teacher, import_class, naming
from teachers.protocols import Captioner, ImageSpec, Teacher
from teachers.spec import CaptionerSpec, ModelSpec, TeacherSpec

__all__ = ["ModelInfo", "describe_captioner", "describe_teacher", "load_captioner", "load_teacher"]


def load_teacher(name: str, spec: TeacherSpec, device: str) -> Teacher:
    """The teacher with its weights on a device (``auto``, ``cpu``, ``cuda:0``, ...).

    Raises ValueError or FileNotFoundError for what the config has wrong, RuntimeError for what the model's own
    code raised; each names the teacher.
    """
    from teachers.device import Accelerator

    with naming(f"teacher {name}"):
        if spec.class_ is not None:
            return _own_teacher(spec, device)
        accelerator = Accelerator(device, spec.precision)
        if spec.family == "transformers":
            from teachers.transformers import load

            return load(spec, accelerator)
        from teachers.open_clip import OpenClipTeacher

        return OpenClipTeacher(spec, accelerator)


def load_captioner(name: str, spec: CaptionerSpec, device: str) -> Captioner:
    """The captioner with its weights on a device; errors as in ``load_teacher``."""
    from teachers.device import Accelerator

    with naming(f"captioner {name}"):
        if spec.class_ is not None:
            return _own_captioner(spec, device)
        accelerator = Accelerator(device, spec.precision)
        if spec.family == "transformers":
            from teachers.transformers_captioner import load

            return load(spec, accelerator)
        from teachers.coca import CocaCaptioner

        return CocaCaptioner(spec, accelerator)


def _own_teacher(spec: TeacherSpec, device: str) -> Teacher:
    teacher = _build(spec, device)
    dim = getattr(teacher, "dim", None)
    if not isinstance(dim, int) or dim < 1:
        raise ValueError(f"class {spec.class_} must state `dim`, the length of its embeddings, got {dim!r}")
    if callable(getattr(teacher, "encode_images", None)):
        if not hasattr(teacher, "image"):
            raise ValueError(
                f"class {spec.class_} must state `image`, a teachers.protocols.ImageSpec, beside `encode_images`"
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


def _own_captioner(spec: CaptionerSpec, device: str) -> Captioner:
    captioner = _build(spec, device)
    if not isinstance(getattr(captioner, "image", None), ImageSpec):
        raise ValueError(f"class {spec.class_} must state `image`, a teachers.protocols.ImageSpec")
    captions = getattr(captioner, "captions", spec.captions)
    if captions != spec.captions:
        raise ValueError(
            f"class {spec.class_} gives {captions} captions an image and the config says `captions: {spec.captions}`: "
            "make them equal"
        )
    captioner.captions = captions
    return cast(Captioner, captioner)


def _build(spec: ModelSpec, device: str) -> Any:
    from teachers.device import Accelerator

    return import_class(spec)(Accelerator(device).device, **spec.options)
