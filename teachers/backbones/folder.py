"""Folders with a network of images: written for plain timm, or for the code of the user that builds the network."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from teachers.backbones.classes import ImageModel, build_class, width_of
from teachers.backbones.spec import CLASS, CONFIG, read_config
from teachers.image_encoder import ImageEncoder
from teachers.protocols import ImageSpec
from teachers.runtime.accelerator import Accelerator
from teachers.spec import TeacherSpec

WEIGHTS = "model.safetensors"


def write_timm(network: Any, image: ImageSpec, options: Mapping[str, Any], pretrained: bool, folder: str) -> None:
    """Write a model of timm with its preprocessing, which timm loads as ``local-dir:FOLDER``, and transformers.

    ``options`` are the arguments of ``timm.create_model`` that it was built with. Unless it is ``pretrained``, the tag
    and the licence of the weights that timm has of it are left out.
    """
    from timm.models import save_for_hf

    stated: dict[str, Any] = {} if pretrained else {"tag": "", "license": None}
    stated |= {
        "input_size": [3, image.height, image.width],
        "mean": image.mean,
        "std": image.std,
        "interpolation": image.interpolation,
        "crop_pct": 1.0,
        "crop_mode": "squash" if image.resize == "squash" else "center",
    }
    save_for_hf(
        network, folder, model_config={"pretrained_cfg": stated}, model_args=dict(options), safe_serialization=True
    )
    config = json.loads(Path(folder, CONFIG).read_text(encoding="utf-8"))
    config.get("model_args", {}).pop("num_classes", None)  # transformers passes the one beside it, too
    Path(folder, CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def write_class(network: torch.nn.Module, image: ImageSpec, config: Mapping[str, Any], folder: str) -> None:
    """Write the state dict, and ``config`` (class, options, without) with the preprocessing and number of features."""
    target = Path(folder)
    state = {name: value.detach().cpu().clone().contiguous() for name, value in network.state_dict().items()}
    save_file(state, target / WEIGHTS)
    text = json.dumps({**config, "image": asdict(image)}, indent=2)
    (target / CONFIG).write_text(text + "\n", encoding="utf-8")


class ExportedClass(ImageEncoder):
    """An image teacher of a folder that ``write_class`` wrote, whose ``class`` the user names, since its code runs.

    Raises ValueError if the folder is of another class.
    """

    logit_scale: float | None = None

    def __init__(self, device: torch.device, folder: str, name: str) -> None:
        config = read_config(folder)
        if config.get(CLASS) != name:
            raise ValueError(f"{folder} has a network of class {config.get(CLASS)}, not of {name}")
        weights = Path(folder, WEIGHTS)
        network, _ = build_class(name, config.get("options", {}), config.get("without"), weights)
        stated = config["image"].items()
        fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in stated}
        image = ImageSpec(**fields)
        self.dim = width_of(network, image, name)
        accelerator = Accelerator(str(device))
        self.model = accelerator.prepare(ImageModel(network))
        super().__init__(self.model, image, accelerator, self.model.encode_image)


def load_network(spec: TeacherSpec) -> tuple[ImageModel, ImageSpec]:
    """Load the network of a folder, in float32 on the CPU, with its preprocessing. Raises ValueError for others."""
    if spec.class_ is not None:
        teacher = spec.load("", "cpu")
        if not isinstance(teacher, ExportedClass):
            raise ValueError(f"{spec.class_} is a teacher, which is not exported: name the folder of a network")
        assert teacher.image is not None
        return teacher.model, teacher.image
    from teachers.timm.teacher import image_spec, load_model

    network = load_model(spec)
    network.reset_classifier(0)
    return ImageModel(network), image_spec(network, spec)
