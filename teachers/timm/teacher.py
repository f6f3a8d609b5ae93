"""Image teachers of timm: DINOv2, DINOv3, SigLIP's image tower, and any other model that pools its features."""

from __future__ import annotations

from typing import Any

import timm

from teachers import weights
from teachers.image_encoder import ImageEncoder
from teachers.protocols import ImageSpec
from teachers.runtime.accelerator import Accelerator
from teachers.spec import ModelSpec, TeacherSpec
from teachers.timm.family import check_model, timm_name, weights_file


class TimmTeacher(ImageEncoder):
    """An image encoder: the features that a model of timm pools for its classifier, at unit norm.

    Raises ValueError or FileNotFoundError for a wrong spec.
    """

    def __init__(self, spec: TeacherSpec, accelerator: Accelerator) -> None:
        model = load_model(spec)
        model.reset_classifier(0)
        super().__init__(accelerator.prepare(model), image_spec(model, spec), accelerator, model)
        self.logit_scale = spec.logit_scale
        features = self._embed_black()
        if features.ndim != 2:
            raise ValueError(
                f"model {spec.name} gives features of shape {[*features.shape[1:]]} for an image, not one vector: set "
                "`global_pool` in `options`, such as {global_pool: avg}"
            )
        self.dim = features.shape[1]
        self._make_fast(model, spec)


def load_model(spec: ModelSpec) -> Any:
    """Load the model of a spec with its weights, in float32 on the CPU. Never returns random weights.

    Raises ValueError for weights that do not fit the model, and FileNotFoundError for missing files.
    """
    path, overlay = weights_file(spec), None
    if path is not None:
        # In the place of the weights that timm names, and of as many classes as the model has, so that all are loaded.
        file = weights.as_safetensors(weights.fetch(path))
        overlay = {"source": "", "file": str(file), "custom_load": False, "label_offset": 0}
        overlay |= {key: spec.options[key] for key in ("num_classes",) if key in spec.options}
    name = timm_name(spec.name)
    try:
        return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **spec.options).float()
    except RuntimeError as error:
        if path is None:
            raise
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"the weights in {path} do not fit {spec.name}: {reason}") from error


def random_model(spec: ModelSpec) -> Any:
    """Build the model of a spec with random weights, in float32 on the CPU, without downloads. Raises ValueError."""
    check_model(spec.name)
    return timm.create_model(timm_name(spec.name), pretrained=False, **spec.options).float()


def image_spec(model: Any, spec: ModelSpec) -> ImageSpec:
    """The preprocessing of a model of timm, which resizes the whole shorter side. Raises ValueError."""
    size = spec.options.get("img_size")
    side = [size, size] if isinstance(size, int) else size
    config = timm.data.resolve_model_data_config(model, args={"input_size": (3, *side)} if side else None)
    channels, height, width = config["input_size"]
    if channels != 3:
        raise ValueError(f"model {spec.name} takes images of {channels} channels, not of 3")
    found = config["interpolation"]
    return ImageSpec(
        size=height if height == width else (height, width),
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        interpolation=found if found in ("bilinear", "nearest") else "bicubic",
        resize="squash" if config["crop_mode"] == "squash" else "crop",
    )
