"""Networks of images by what a config states of them: a model of timm, or a class or function of the user's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from teachers.backbones.classes import ImageModel, build_class, load_weights, read_weights, width_of
from teachers.backbones.folder import write_class, write_timm
from teachers.backbones.spec import BackboneSpec
from teachers.open_clip import catalog
from teachers.protocols import ImageSpec
from teachers.timm.family import TimmTeacherSpec

_CLASS = "class:"


@dataclass(frozen=True)
class Backbone:
    """How a network was built: its ``name`` and preprocessing; ``dim`` is its number of features.

    ``options`` are the arguments that it was built with.
    """

    name: str
    image: ImageSpec
    dim: int
    pretrained: bool
    options: Mapping[str, Any]
    without: str | None = None

    def export(self, model: ImageModel, folder: str) -> None:
        """Write a folder that plain timm loads as ``local-dir:FOLDER``, or the state dict of the user's network."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        if not self.name.startswith(_CLASS):
            write_timm(model.network, self.image, self.options, self.pretrained, folder)
            return
        about = {"class": self.name.removeprefix(_CLASS), "options": dict(self.options), "without": self.without}
        write_class(model.network, self.image, about, folder)


def build_backbone(spec: BackboneSpec) -> tuple[ImageModel, Backbone]:
    """Build the network of a config, with pretrained weights or random ones of torch's generator, on the CPU.

    Raises ValueError for a network that is unknown or does not fit, and FileNotFoundError for missing files.
    """
    network, backbone = _of_class(spec) if spec.class_ is not None else _of_timm(spec)
    image = replace(backbone.image, **spec.stated())
    if image.height != image.width:
        raise ValueError(
            f"{backbone.name} takes images of {image.height} x {image.width}, and augmented crops are square: set "
            "`image_size`"
        )
    return ImageModel(network), replace(backbone, image=image, dim=width_of(network, image, backbone.name))


def _of_class(spec: BackboneSpec) -> tuple[Any, Backbone]:
    assert spec.class_ is not None
    network, image = build_class(spec.class_, spec.options, spec.without, spec.pretrained)
    pretrained = spec.pretrained is not None
    return network, Backbone(f"{_CLASS}{spec.class_}", image, 0, pretrained, spec.options, spec.without)


def _of_timm(spec: BackboneSpec) -> tuple[Any, Backbone]:
    from teachers.timm.teacher import image_spec, load_model, random_model

    assert spec.model is not None
    name, file, options = spec.model, spec.pretrained, dict(spec.options)
    if file is not None and not catalog.is_checkpoint_file(file):
        name, file = f"{name}.{file}", None  # a tag
    model = TimmTeacherSpec(family="timm", model=name, options=options)
    pretrained = spec.from_weights
    try:
        network: Any = load_model(model) if pretrained and file is None else random_model(model)
    except (TypeError, AssertionError) as error:  # of its constructor
        raise ValueError(f"timm cannot build {name}: {error}. Check `options`") from error
    network.reset_classifier(0)
    resize = spec.image_size is not None and hasattr(network, "set_input_size")
    state = {} if file is None else _without_classifier(network, read_weights(file))
    other = any(state[key].shape != value.shape for key, value in network.state_dict().items() if key in state)
    if resize and other:  # weights of a network that was resized before
        network.set_input_size(img_size=spec.image_size)
    if file is not None:
        load_weights(network, state, name, file)
    if resize:
        network.set_input_size(img_size=spec.image_size)
        options["img_size"] = spec.image_size
    return network, Backbone(name, image_spec(network, model), 0, pretrained, options)


def _without_classifier(network: Any, state: Mapping[str, Any]) -> dict[str, Any]:
    """The weights of a file without those of a classifier that the network does not have."""
    names = network.pretrained_cfg.get("classifier") or ()
    prefixes = tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))
    own = network.state_dict().keys()
    return {key: value for key, value in state.items() if key in own or not key.startswith(prefixes)}
