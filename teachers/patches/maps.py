"""The spatial map of an image tower of open_clip, timm or transformers, at its end or after one of its stages.

A map has no class or register tokens, and is taken before pooling and projection. The tower's final norm is applied as
in dense uses of these models: to the patches, too, where the tower applies it to the pooled token alone (CLIP). Two
towers give it without one: CoCa's, whose norm follows its attention pooler, and those of timm that normalise what they
have pooled (``fc_norm``). Convolutional towers give the outputs of their stages, FastViT (MobileCLIP's MCi) too.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch

Map = Callable[[torch.Tensor], torch.Tensor]


def spatial_map(tower: Any, stage: int = -1, inputs: Callable[[torch.Tensor], Mapping[str, Any]] | None = None) -> Map:
    """The map of a tower as a function, pixels [B, 3, H, W] -> [B, C, rows, columns].

    ``tower`` is an image tower, or a model that has one. ``stage`` is an index into the blocks of a transformer or the
    stages of another tower, from the end if it is negative. ``inputs`` makes the arguments of a model of transformers.
    Raises ValueError for a tower without a map.
    """
    tower = image_tower(tower)
    if hasattr(tower, "forward_intermediates"):
        return lambda pixels: _intermediates(tower, pixels, stage)
    if hasattr(getattr(tower, "config", None), "model_type"):
        if stage != -1:
            raise ValueError(f"{type(tower).__name__} of transformers gives its last map alone, not stage {stage}")
        return _TransformersMap(tower, inputs or (lambda pixels: {"pixel_values": pixels}))
    raise ValueError(
        f"{type(tower).__name__} has no patches that are known here: use a model of open_clip, timm or transformers, "
        "or a class with a method `encode_patches`"
    )


def features_and_map(visual: Any, pixels: torch.Tensor, stage: int = -1) -> tuple[torch.Tensor, torch.Tensor]:
    """The features [B, D] and the map [B, C, rows, columns] of an open_clip tower or a network of timm, in one pass."""
    network = image_tower(visual)
    if network is not visual:
        last, [grid] = network.forward_intermediates(pixels, indices=[stage], norm=True, output_fmt="NCHW")
        return network.forward_head(last), grid
    found = _open_clip(visual, pixels, stage, intermediates_only=False)
    return found["image_features"], found["image_intermediates"][0]


def image_tower(model: Any) -> Any:
    """The image tower of a model, or the model itself."""
    for name in ("visual", "vision_model", "timm_model"):  # of open_clip, of transformers, of its wrapper of timm
        model = getattr(model, name, model)
    return model if hasattr(model, "forward_intermediates") else getattr(model, "trunk", model)


def resized(model: Any, height: int, width: int) -> Any:
    """A copy of a model's image tower for images of another size in pixels, with interpolated position embeddings.

    Towers that take any size are returned as they are.
    """
    tower = image_tower(model)
    grid = getattr(tower, "grid_size", None)
    trunk = getattr(tower, "trunk", tower)
    if grid is not None and hasattr(tower, "positional_embedding"):  # a transformer of open_clip
        from open_clip.model import resize_pos_embed

        tower = copy.deepcopy(tower)
        tower.image_size = (height, width)
        tower.grid_size = (height // tower.patch_size[0], width // tower.patch_size[1])
        holder = torch.nn.Module()
        holder.visual = tower
        state = {"visual.positional_embedding": tower.positional_embedding.data}
        resize_pos_embed(state, holder)
        tower.positional_embedding = torch.nn.Parameter(state["visual.positional_embedding"], requires_grad=False)
    elif hasattr(trunk, "set_input_size"):
        tower = copy.deepcopy(tower)
        getattr(tower, "trunk", tower).set_input_size((height, width))
    return tower


def _intermediates(tower: Any, pixels: torch.Tensor, stage: int) -> torch.Tensor:
    if "normalize_intermediates" in inspect.signature(tower.forward_intermediates).parameters:
        found = _open_clip(tower, pixels, stage, intermediates_only=True)["image_intermediates"]
    else:
        found = tower.forward_intermediates(
            pixels, indices=[stage], norm=True, stop_early=True, intermediates_only=True, output_fmt="NCHW"
        )
    grid: torch.Tensor = found[0]
    return grid


def _open_clip(visual: Any, pixels: torch.Tensor, stage: int, intermediates_only: bool) -> dict[str, Any]:
    # open_clip's ResNet cuts its stages after the last index where it should not: all are asked for
    resnet = hasattr(visual, "attnpool")
    found: dict[str, Any] = visual.forward_intermediates(
        pixels,
        indices=None if resnet else [stage],
        stop_early=intermediates_only,
        normalize_intermediates=getattr(visual, "attn_pool", None) is None,
        intermediates_only=intermediates_only,
    )
    if not resnet:
        return found
    maps = found["image_intermediates"]
    if not -len(maps) <= stage < len(maps):
        raise ValueError(f"feature index {stage} is out of range (0 to {len(maps) - 1})")
    return {**found, "image_intermediates": [maps[stage]]}


class _TransformersMap:
    """The last hidden states of a model of transformers, without the tokens before the patches, as a map."""

    def __init__(self, tower: Any, inputs: Callable[[torch.Tensor], Mapping[str, Any]]) -> None:
        self._tower, self._inputs = tower, inputs
        self._any_size = "interpolate_pos_encoding" in inspect.signature(tower.forward).parameters
        self._norm = getattr(tower, "post_layernorm", None)

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        ranks: list[int] = []
        hook = self._norm and self._norm.register_forward_hook(lambda _, args, __: ranks.append(args[0].ndim))
        options = {"interpolate_pos_encoding": True} if self._any_size else {}
        try:
            hidden = self._tower(**self._inputs(pixels), **options).last_hidden_state
        finally:
            if hook is not None:
                hook.remove()
        if hidden.ndim == 4:
            grid: torch.Tensor = hidden
            return grid
        patches = hidden[:, self._prefix(hidden, pixels) :]
        if self._norm is not None and ranks == [2]:  # the model has normalised its pooled token alone
            patches = self._norm(patches)
        rows, columns = self._grid(pixels)
        return patches.transpose(1, 2).unflatten(2, (rows, columns))

    def _grid(self, pixels: torch.Tensor) -> tuple[int, int]:
        patch = getattr(self._tower.config, "patch_size", None)
        if patch is None:
            raise ValueError(f"the config of {type(self._tower).__name__} states no `patch_size`")
        height, width = (patch, patch) if isinstance(patch, int) else (patch[0], patch[-1])
        return pixels.shape[2] // height, pixels.shape[3] // width

    def _prefix(self, hidden: torch.Tensor, pixels: torch.Tensor) -> int:
        """The number of tokens before the patches: none, or those that the config and the weights state."""
        config = self._tower.config
        rows, columns = self._grid(pixels)
        found = hidden.shape[1] - rows * columns
        distilled = any("distillation_token" in name for name, _ in self._tower.named_parameters())
        stated = getattr(config, "num_summary_tokens", None) or (
            1 + (getattr(config, "num_register_tokens", None) or 0) + distilled
        )
        if found not in (0, stated):
            raise ValueError(
                f"{type(self._tower).__name__} gives {hidden.shape[1]} tokens, which are no grid of {rows} x {columns} "
                f"after {stated} others"
            )
        return found
