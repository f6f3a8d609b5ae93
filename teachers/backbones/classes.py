"""Networks of images, and how a class or function of the user's builds one, such as ``torchvision.models:resnet18``."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from teachers import weights
from teachers.custom.family import import_named
from teachers.protocols import ImageSpec


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
        _remove(network, without, path)
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


def _remove(network: torch.nn.Module, name: str, path: str) -> None:
    """Replace a module of a network by the identity. Raises ValueError if it has none of this name."""
    parent, _, child = name.rpartition(".")
    try:
        network.get_submodule(name)
        setattr(network.get_submodule(parent), child, torch.nn.Identity())
    except AttributeError:
        known = ", ".join(found for found, _ in network.named_children())
        raise ValueError(f"without: {path} has no module {name!r}; its modules are: {known}") from None
