"""A network of images with the interface of open_clip's models, as far as images need it."""

from __future__ import annotations

from typing import Any

import torch

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
