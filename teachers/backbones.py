"""Networks of images, and how a class or function of the user's builds one, such as ``torchvision.models:resnet18``."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from teachers import weights
from teachers.backbone_spec import CLASS, CONFIG, BackboneSpec, read_config
from teachers.custom import import_named
from teachers.image_encoder import ImageEncoder
from teachers.open_clip import catalog
from teachers.protocols import ImageSpec
from teachers.runtime.accelerator import Accelerator
from teachers.spec import TeacherSpec
from teachers.timm.family import TimmTeacherSpec


class ImageModel(torch.nn.Module):
    """A network [B, 3, H, W] -> [B, dim] as ``visual.trunk``; it has no text tower and no logit scale."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.visual = _Visual(network)

    @property
    def network(self) -> Any:
        return self.visual.trunk

    def encode_image(self, pixels: torch.Tensor) -> Any:
        return self.visual(pixels)

    def set_grad_checkpointing(self) -> None:
        """Recompute activations in backward passes. Raises ValueError if the network cannot."""
        if not hasattr(self.network, "set_grad_checkpointing"):
            raise ValueError(f"{type(self.network).__name__} has no `set_grad_checkpointing`")
        self.network.set_grad_checkpointing()


class _Visual(torch.nn.Module):
    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.trunk = network

    def forward(self, pixels: torch.Tensor) -> Any:
        return self.trunk(pixels)


def width_of(network: torch.nn.Module, image: ImageSpec, name: str) -> int:
    """The number of features of a network, which it computes of a black image. Raises ValueError for another output."""
    was_training = network.training
    try:
        with torch.no_grad():
            found = network.eval()(torch.zeros(1, 3, image.height, image.width))
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{name} does not take images of {image.height} x {image.width}: {reason}") from error
    finally:
        network.train(was_training)
    if not isinstance(found, torch.Tensor):
        raise ValueError(f"{name} gives a {type(found).__name__} for images, and must give a tensor [B, D]")
    if found.ndim != 2 or found.shape[0] != 1 or not found.is_floating_point():
        raise ValueError(f"{name} gives {found.dtype} {[*found.shape]} for one image, and must give floats [1, D]")
    return found.shape[1]


#: Preprocessing of torchvision's models, where the network has no ``image``.
IMAGENET = ImageSpec(224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bilinear")


def check_class(path: str, options: Mapping[str, Any]) -> Any:
    """Import what builds a network, and check its options. Raises ValueError."""
    build = import_named(path)
    if not callable(build):
        raise ValueError(f"class {path} is a {type(build).__name__}: name a class, or a function that builds a network")
    try:
        inspect.signature(build).bind(**options)
    except TypeError as error:
        raise ValueError(f"options of {path}: {error}; its signature is {inspect.signature(build)}") from error
    except ValueError:
        pass  # it has no signature
    return build


def build_class(
    path: str, options: Mapping[str, Any], without: str | None = None, pretrained: str | Path | None = None
) -> tuple[torch.nn.Module, ImageSpec]:
    """Build ``path(**options)`` on the CPU, and the preprocessing that it states as ``image``, or torchvision's.

    ``without`` names a module of it, such as the classifier, which is replaced by the identity. ``pretrained`` are
    weights of the network, with this module or without. Raises ValueError, and FileNotFoundError for missing files.
    """
    build = check_class(path, options)
    try:
        network = build(**options)
    except Exception as error:  # of the user's code
        raise ValueError(f"class {path} cannot be built: {type(error).__name__}: {error}") from error
    if not isinstance(network, torch.nn.Module):
        raise ValueError(f"class {path} builds a {type(network).__name__}, and must build a torch.nn.Module")
    image = getattr(network, "image", IMAGENET)
    if not isinstance(image, ImageSpec):
        raise ValueError(f"class {path}: `image` must be a teachers.protocols.ImageSpec, got {image!r}")
    state = None if pretrained is None else read_weights(pretrained)
    if state is not None and state.keys() == network.state_dict().keys():
        load_weights(network, state, path, pretrained)
        state = None
    if without is not None:
        parent, _, child = without.rpartition(".")
        try:
            network.get_submodule(without)
            setattr(network.get_submodule(parent), child, torch.nn.Identity())
        except AttributeError:
            known = ", ".join(found for found, _ in network.named_children())
            raise ValueError(f"without: {path} has no module {without!r}; its modules are: {known}") from None
    if state is not None:
        load_weights(network, state, path, pretrained)
    return network.float(), image


def read_weights(pretrained: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of a file, by path or URL. Raises ValueError and FileNotFoundError."""
    from safetensors.torch import load_file

    return load_file(str(weights.as_safetensors(weights.fetch(pretrained))))


def load_weights(network: torch.nn.Module, state: Mapping[str, torch.Tensor], path: str, pretrained: Any) -> None:
    """Load the weights of the file ``pretrained`` into the network of a name. Raises ValueError if they do not fit."""
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"the weights in {pretrained} do not fit {path}: {reason}") from error


WEIGHTS = "model.safetensors"


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
        """Write a folder that plain timm loads as ``local-dir:FOLDER``, or the state dict of the user's network.

        Unless the weights are pretrained, the tag and the licence that timm has of them are left out.
        """
        Path(folder).mkdir(parents=True, exist_ok=True)
        if self.name.startswith(_CLASS):
            about = {"class": self.name.removeprefix(_CLASS), "options": dict(self.options), "without": self.without}
            write_class(model.network, self.image, about, folder)
            return
        from timm.models import save_for_hf

        stated: dict[str, Any] = {} if self.pretrained else {"tag": "", "license": None}
        stated |= {
            "input_size": [3, self.image.height, self.image.width],
            "mean": self.image.mean,
            "std": self.image.std,
            "interpolation": self.image.interpolation,
            "crop_pct": 1.0,
            "crop_mode": "squash" if self.image.resize == "squash" else "center",
        }
        about, options = {"pretrained_cfg": stated}, dict(self.options)
        save_for_hf(model.network, folder, model_config=about, model_args=options, safe_serialization=True)
        config = json.loads(Path(folder, CONFIG).read_text(encoding="utf-8"))
        config.get("model_args", {}).pop("num_classes", None)  # transformers passes the one beside it, too
        Path(folder, CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def build_backbone(spec: BackboneSpec) -> tuple[ImageModel, Backbone]:
    """Build the network of a config, with pretrained weights or random ones of torch's generator, on the CPU.

    Raises ValueError for a network that is unknown or does not fit, and FileNotFoundError for missing files.
    """
    if spec.class_ is not None:
        network, image = build_class(spec.class_, spec.options, spec.without, spec.pretrained)
        pretrained = spec.pretrained is not None
        backbone = Backbone(f"{_CLASS}{spec.class_}", image, 0, pretrained, spec.options, spec.without)
    else:
        network, backbone = _of_timm(spec)
    image = replace(backbone.image, **spec.stated())
    if image.height != image.width:
        raise ValueError(
            f"{backbone.name} takes images of {image.height} x {image.width}, and augmented crops are square: set "
            "`image_size`"
        )
    return ImageModel(network), replace(backbone, image=image, dim=width_of(network, image, backbone.name))


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
    state: dict[str, torch.Tensor] = {}
    if file is not None:  # without the weights of a classifier that the network does not have
        names = network.pretrained_cfg.get("classifier") or ()
        prefixes = tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))
        own = network.state_dict().keys()
        found = read_weights(file).items()
        state = {key: value for key, value in found if key in own or not key.startswith(prefixes)}
    other = any(state[key].shape != value.shape for key, value in network.state_dict().items() if key in state)
    if resize and other:  # weights of a network that was resized before
        network.set_input_size(img_size=spec.image_size)
    if file is not None:
        load_weights(network, state, name, file)
    if resize:
        network.set_input_size(img_size=spec.image_size)
        options["img_size"] = spec.image_size
    return network, Backbone(name, image_spec(network, model), 0, pretrained, options)
